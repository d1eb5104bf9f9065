"""An HTTP/1.1 client of few instructions: what is measured is the server, not the client."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

_FRAME_LIMIT = 64 * 2**20
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key it wants."""

    host: str
    port: int
    key: str = ""


@dataclass(frozen=True)
class Frame:
    """A server-sent event, and when it was here (seconds since the epoch)."""

    event: str
    data: bytes
    at: float


def request_bytes(address: Address, method: str, path: str, body: Any = None, *, stream: bool = False) -> bytes:
    """One request as it goes over the wire."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address.host}:{address.port}", f"Content-Length: {len(content)}"]
    lines += ["Content-Type: application/json"] if content else []
    lines += [f"Authorization: Bearer {address.key}"] if address.key else []
    lines += ["Accept: text/event-stream"] if stream else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


class Connection:
    """A connection that is kept open, for one request at a time."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address = address
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect."""
        return cls(address, *await asyncio.open_connection(address.host, address.port, limit=_FRAME_LIMIT))

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and take the answer's JSON. Raises RuntimeError for an error."""
        self._writer.write(request_bytes(self._address, method, path, body))
        status, head = await self._head()
        length = _LENGTH.search(head)
        if length:
            content = await self._reader.readexactly(int(length[1]))
        elif b"chunked" in head:
            content = b"".join([chunk async for chunk in self._chunks()])
        else:
            content = b""
        if status >= 400:
            raise RuntimeError(f"{method} {path}: {status} {content[:500].decode(errors='replace')}")
        return json.loads(content) if content else None

    async def stream(self, method: str, path: str, body: Any = None) -> AsyncIterator[bytes]:
        """Send a request and take the answer's body piece by piece."""
        self._writer.write(request_bytes(self._address, method, path, body, stream=True))
        status, head = await self._head()
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {head.decode(errors='replace')}")
        async for chunk in self._chunks():
            yield chunk

    async def frames(self, method: str, path: str, body: Any = None) -> AsyncIterator[Frame]:
        """Send a request and take the answer's events. Carrel never cuts one in two."""
        async for chunk in self.stream(method, path, body):
            now = time.time()
            for text in chunk.split(b"\n\n"):
                fields = dict(line.split(b": ", 1) for line in text.split(b"\n") if b": " in line)
                if b"data" in fields:
                    yield Frame(fields[b"event"].decode(), fields[b"data"], now)

    async def _head(self) -> tuple[int, bytes]:
        head = await self._reader.readuntil(b"\r\n\r\n")
        return int(head[9:12]), head

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # whoever was at the other end is gone already
