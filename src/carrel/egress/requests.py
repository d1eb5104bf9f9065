"""Requests at the proxy, read strictly: what could be understood in two ways is not understood at all."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from carrel.hostnames import AddressLiteral, canonical_host

__all__ = ["BadRequest", "Head", "Target", "answer_head", "body", "read_head"]

HEAD_BYTES = 64 * 1024
_MOST_HEADERS = 200
_LONGEST_CHUNK_LINE = 1024
_PIECE_BYTES = 64 * 1024

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/1\.([01])")
_HEADER = re.compile(rf"({_TOKEN}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_ABSOLUTE = re.compile(r"http://([^/?#@\\]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
_STATUS = re.compile(r"HTTP/1\.[01] ([1-5][0-9][0-9])( [^\x00-\x08\x0a-\x1f\x7f]*)?")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_BETWEEN_NEIGHBOURS = frozenset(
    {
        "connection",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that are between a client and its proxy, or a proxy and its server, and go no further."""


class BadRequest(Exception):
    """It is no request that a proxy could pass on; its text says why."""


@dataclass(frozen=True)
class Target:
    """Where a request is to go, as it was written: whether that is a name at all is asked later."""

    host: str
    port: int
    path: str = ""

    def name(self) -> str:
        """The host in the one form of its name. Raises AddressLiteral, ValueError."""
        if self.host.startswith("["):
            raise AddressLiteral(self.host)
        return canonical_host(self.host)


@dataclass(frozen=True)
class Head:
    """The first lines of a request."""

    method: str
    target: str
    version: int
    headers: tuple[tuple[str, str], ...]
    """Names in small letters."""

    def values(self, name: str) -> list[str]:
        """What the headers of this name say."""
        return [value for each, value in self.headers if each == name]

    @property
    def greets(self) -> bool:
        """Whether it only says whose the connection is."""
        return self.method == "OPTIONS" and self.target == "*"

    @property
    def token(self) -> str | None:
        """What it authenticates with."""
        given = self.values("proxy-authorization")
        if len(given) != 1:
            return None
        scheme, _, credential = given[0].partition(" ")
        if scheme.lower() == "bearer":
            return credential.strip() or None
        if scheme.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(credential.strip(), validate=True).decode("ascii").partition(":")
        except (binascii.Error, UnicodeDecodeError):  # no credential of ours is written so
            return None
        return password or user or None

    def where(self) -> Target:
        """Where it is to go. Raises BadRequest."""
        if self.method == "CONNECT":
            return _authority(self.target, default_port=None)
        match = _ABSOLUTE.fullmatch(self.target)
        if match is None:
            raise BadRequest("A proxy wants CONNECT, or a whole address that begins with http://.")
        authority, path = match[1], match[2] or "/"
        found = _authority(authority, default_port=80)
        return Target(found.host, found.port, path if path.startswith("/") else f"/{path}")

    @property
    def expects(self) -> bool:
        """Whether its sender waits to be told to send the body."""
        return any(value.lower() == "100-continue" for value in self.values("expect"))

    def framing(self) -> int | None:
        """How long the body is; None: in chunks. Raises BadRequest where that can be understood in two ways."""
        encodings, lengths = self.values("transfer-encoding"), self.values("content-length")
        if encodings:
            if lengths or len(encodings) > 1 or encodings[0].lower() != "chunked" or self.version == 0:
                raise BadRequest("The length of the body can be understood in more than one way.")
            return None
        if not lengths:
            return 0
        if len(lengths) > 1 or re.fullmatch(r"[0-9]{1,18}", lengths[0]) is None:
            raise BadRequest("The length of the body can be understood in more than one way.")
        return int(lengths[0])

    def onward(self, name: str, target: Target) -> bytes:
        """The same request for the server. Which host it is for is said by us, whatever the request's own header says."""
        length = self.framing()
        lines = [
            f"{self.method} {target.path} HTTP/1.1",
            f"Host: {name}{'' if target.port == 80 else f':{target.port}'}",
        ]
        lines += [f"{each}: {value}" for each, value in self._passed_on()]
        if length is None:
            lines.append("Transfer-Encoding: chunked")
        elif length or self.values("content-length"):
            lines.append(f"Content-Length: {length}")
        return _joined([*lines, "Connection: close"])

    def _passed_on(self) -> Iterator[tuple[str, str]]:
        dropped = _dropped(self.headers) | {"host", "content-length"}
        return ((name, value) for name, value in self.headers if name not in dropped)


def _authority(text: str, *, default_port: int | None) -> Target:
    bracket, closing, after = text.partition("]")
    host, colon, digits = (f"{bracket}]", *after.partition(":")[1:]) if closing else text.partition(":")
    if closing and after and not after.startswith(":"):
        raise BadRequest("It names no host.")
    if not colon and default_port is not None:
        return Target(host, default_port)
    if re.fullmatch(r"[0-9]{1,5}", digits) is None or not 0 < int(digits) < 65536:
        raise BadRequest("It names no port.")
    return Target(host, int(digits))


def _dropped(headers: tuple[tuple[str, str], ...]) -> frozenset[str]:
    named = [value for name, value in headers if name in ("connection", "proxy-connection")]
    return _BETWEEN_NEIGHBOURS | {option.strip().lower() for value in named for option in value.split(",")}


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next request's head; None where the connection ends instead. Raises BadRequest."""
    lines = await _lines(reader)
    if lines is None:
        return None
    match = _REQUEST.fullmatch(lines[0])
    if match is None:
        raise BadRequest("It is no request of HTTP/1.")
    return Head(match[1], match[2], int(match[3]), _headers(lines[1:]))


async def answer_head(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """A server's answer: its status, and its head as it is passed back. Raises BadRequest."""
    lines = await _lines(reader)
    match = _STATUS.fullmatch(lines[0]) if lines else None
    if lines is None or match is None:
        raise BadRequest("The server's answer is no HTTP/1.")
    headers = _headers(lines[1:])
    # How the body is framed is passed back as it came, for it is passed back as it came itself.
    dropped = _dropped(headers) - {"transfer-encoding", "trailer"}
    kept = [f"{name}: {value}" for name, value in headers if name not in dropped]
    status = int(match[1])
    return status, _joined([lines[0], *kept, *(["Connection: close"] if status >= 200 else [])])


async def _lines(reader: asyncio.StreamReader) -> list[str] | None:
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BadRequest("It breaks off.") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise BadRequest("Its head is too large.") from error
    return data[:-4].decode("latin-1").split("\r\n")


def _headers(lines: list[str]) -> tuple[tuple[str, str], ...]:
    if len(lines) > _MOST_HEADERS:
        raise BadRequest("It has too many headers.")
    matches = [_HEADER.fullmatch(line) for line in lines]
    if not all(matches):
        raise BadRequest("One of its headers is none.")
    return tuple((match[1].lower(), match[2]) for match in matches if match is not None)


def _joined(lines: list[str]) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def body(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    """The body as it is passed on, in pieces: so many bytes, or (None) in chunks, written anew. Raises BadRequest."""
    try:
        if length is not None:
            async for piece in _exactly(reader, length):
                yield piece
            return
        while True:
            line = await _line(reader)
            match = _CHUNK.fullmatch(line)
            if match is None:
                raise BadRequest("One of its chunks is none.")
            size = int(match[1], 16)
            if size == 0:
                break
            yield b"%x\r\n" % size
            async for piece in _exactly(reader, size):
                yield piece
            if await reader.readexactly(2) != b"\r\n":
                raise BadRequest("One of its chunks is longer than it says.")
            yield b"\r\n"
        for _ in range(_MOST_HEADERS):
            if not await _line(reader):  # what stands after the last chunk says nothing that we would pass on
                yield b"0\r\n\r\n"
                return
        raise BadRequest("It has too many headers.")
    except asyncio.IncompleteReadError as error:
        raise BadRequest("It breaks off.") from error


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readuntil(b"\r\n")
    except asyncio.LimitOverrunError as error:
        raise BadRequest("One of its lines is too long.") from error
    if len(line) > _LONGEST_CHUNK_LINE:
        raise BadRequest("One of its lines is too long.")
    return line[:-2]


async def _exactly(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    while length:
        piece = await reader.read(min(length, _PIECE_BYTES))
        if not piece:
            raise BadRequest("It breaks off.")
        length -= len(piece)
        yield piece
