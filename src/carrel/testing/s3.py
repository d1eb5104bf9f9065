"""A server that speaks S3, for tests: rclone's, on loopback, over a folder.

Before it stands a relay of ours, since rclone (1.75) answers 200 to a request for a range, where S3 answers 206 and
clients insist on it. The relay changes that word and nothing else, and answers `/health` as such servers do.
"""

from __future__ import annotations

import http.client
import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

__all__ = ["S3Server", "rclone_program"]

_START_SECONDS = 30.0


def rclone_program() -> str | None:
    """Where rclone is, if it is installed."""
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.is_file() else shutil.which("rclone")


class S3Server:
    """One server; it can be stopped and started again at the same address."""

    def __init__(
        self,
        program: str,
        folder: Path,
        *,
        bucket: str = "carrel",
        access_key: str = "a-key-of-this-test",
        secret_key: str = "the-secret-of-this-test",
        address: tuple[str, int] | None = None,
    ) -> None:
        """Prepare a server over a folder of its own, with one bucket, or with none where its name is empty.

        `address` is where it listens (host, port); default: a free port of loopback.
        """
        self._program = program
        self.folder = folder
        self.bucket = bucket
        self.access_key, self.secret_key = access_key, secret_key
        (folder / bucket).mkdir(parents=True, exist_ok=True)
        self._host, self._port = address or ("127.0.0.1", _free_port())
        self._behind = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._relay: http.server.ThreadingHTTPServer | None = None

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [self._program, "serve", "s3", "--addr", f"127.0.0.1:{self._behind}", "--config", "/dev/null"]
        command += ["--auth-key", f"{self.access_key},{self.secret_key}", "--vfs-cache-mode", "off"]
        self._process = subprocess.Popen(
            [*command, str(self.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._behind}", timeout=1).close()
                break
            except urllib.error.HTTPError as answered:
                answered.close()
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("rclone does not serve S3") from None
                time.sleep(0.05)
        handler = type("Relay", (_Relay,), {"behind": self._behind})
        self._relay = http.server.ThreadingHTTPServer((self._host, self._port), handler)
        threading.Thread(target=self._relay.serve_forever, args=(0.05,), name="s3 relay", daemon=True).start()

    def stop(self) -> None:
        """End it; what it holds stays."""
        if self._relay is not None:
            self._relay.shutdown()
            self._relay.server_close()
            self._relay = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class _Relay(http.server.BaseHTTPRequestHandler):
    """Passes each request on as it is: its headers are signed."""

    behind = 0
    timeout = 30

    def _pass(self) -> None:
        self.close_connection = True
        if self.path == "/health":
            self.send_response(200)
            self.end_headers()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        behind = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=30)
        try:
            behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                behind.putheader(name, value)
            behind.endheaders(body)
            answer = behind.getresponse()
            partial = answer.status == 200 and answer.getheader("Content-Range")
            data = answer.read()
            self.send_response_only(206 if partial else answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            # To HEAD the length is that of what was not sent.
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # either side has gone: whoever asked sees a connection that ends
            return
        finally:
            behind.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
