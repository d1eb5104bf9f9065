"""S3 at RUSTFS_ADDRESS, and a page in the place of the console at RUSTFS_CONSOLE_ADDRESS."""

import http.server
import os
import signal
from pathlib import Path

from carrel.testing.s3 import S3Server, rclone_program


def _address(name: str) -> tuple[str, int]:
    host, _, port = os.environ[name].rpartition(":")
    return host or "0.0.0.0", int(port)


class _Console(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"console")


def _end(*_: object) -> None:
    raise SystemExit


program = rclone_program()
assert program is not None
server = S3Server(
    program,
    Path(os.environ["RUSTFS_VOLUMES"]),
    bucket="",
    access_key=Path(os.environ["RUSTFS_ACCESS_KEY_FILE"]).read_text(),
    secret_key=Path(os.environ["RUSTFS_SECRET_KEY_FILE"]).read_text(),
    address=_address("RUSTFS_ADDRESS"),
)
signal.signal(signal.SIGTERM, _end)
server.start()
try:
    http.server.ThreadingHTTPServer(_address("RUSTFS_CONSOLE_ADDRESS"), _Console).serve_forever()
finally:
    server.stop()
