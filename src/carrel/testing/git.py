"""Git over HTTP on loopback: repositories in a folder, some of them behind a name and a password."""

from __future__ import annotations

import base64
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["GitHost", "make_repository"]

_HERMETIC = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
}


def make_repository(folder: Path, commits: list[Mapping[str, str]]) -> list[str]:
    """Make a bare repository with one commit for each of these sets of files, and answer their ids."""
    work = folder.with_name(folder.name + ".work")
    work.mkdir(parents=True)
    _git(work, "init", "--quiet", "--initial-branch=main")
    found = []
    for number, files in enumerate(commits):
        for path, text in files.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text)
        _git(work, "add", "--all")
        _git(work, "-c", "user.name=n", "-c", "user.email=n@example.com", "commit", "--quiet", "-m", str(number))
        found.append(_git(work, "rev-parse", "HEAD"))
    _git(work, "clone", "--quiet", "--bare", str(work), str(folder))
    return found


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, env=_HERMETIC, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@dataclass
class GitHost:
    """`with GitHost(folder).up() as host`: what is below the folder is served at `host.url`."""

    folder: Path
    passwords: dict[str, str] = field(default_factory=dict)
    """`user:password` by the name of the repository that wants it."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Where requests for these repositories are led."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Every request's path and authorization."""
    url: str = ""

    @contextmanager
    def up(self) -> Iterator[GitHost]:
        """Serve until the block ends."""
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host._answer(self)

            def do_POST(self) -> None:
                host._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing is said."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://localhost:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="git host")
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        given = request.headers.get("Authorization")
        self.asked.append((request.path, given))
        name = path.strip("/").partition("/")[0]
        wanted = self.passwords.get(name)
        if name in self.redirects:
            request.send_response(301)
            request.send_header("Location", self.redirects[name] + request.path)
            request.end_headers()
            return
        if wanted is not None and given != "Basic " + base64.b64encode(wanted.encode()).decode():
            request.send_response(401)
            request.send_header("WWW-Authenticate", 'Basic realm="git"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        variables = {
            **_HERMETIC,
            "GIT_PROJECT_ROOT": str(self.folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "uploadpack.allowAnySHA1InWant",
            "GIT_CONFIG_VALUE_0": "true",
            "REQUEST_METHOD": request.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": request.headers.get("Content-Length", ""),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
        }
        body = request.rfile.read(int(request.headers.get("Content-Length", "0")))
        done = subprocess.run(["git", "http-backend"], env=variables, input=body, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = [line.decode().partition(": ")[::2] for line in head.split(b"\r\n")]
        status = next((int(value.split()[0]) for name, value in headers if name == "Status"), 200)
        request.send_response(status)
        for name, value in headers:
            if name != "Status":
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
