"""Requests and answers as bytes: one request a connection, read strictly and written anew."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlencode

from carrel.errors import EngineCallRefused

__all__ = ["HEAD_BYTES", "Request", "answer", "head_of", "read_request", "relay", "status_of"]

HEAD_BYTES = 64 * 1024
_BODY_BYTES = 1024 * 1024
_READ_SECONDS = 30.0
_PIECE_BYTES = 64 * 1024
_LINE = re.compile(r"([A-Z]{3,7}) (/[!-~]*) HTTP/1\.[01]")
_PATH = re.compile(r"[A-Za-z0-9/_.:@-]+")


@dataclass(frozen=True)
class Request:
    """A request, as far as it may matter to an engine."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes = b""
    upgrade: bool = False
    """Whether the connection is to become a stream of bytes."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The request of a connection; None where it ended without one.

    Raises:
        EngineCallRefused: it is not written as we want it.
    """
    try:
        async with asyncio.timeout(_READ_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            request = _parsed(head)
            body = await reader.readexactly(int(request.headers.get("content-length", "0")))
    except (asyncio.IncompleteReadError, TimeoutError, ConnectionError):
        return None
    except asyncio.LimitOverrunError as error:
        raise EngineCallRefused("A head of this length is not passed on.") from error
    return Request(request.method, request.path, request.query, body, request.upgrade)


def _parsed(head: bytes) -> Request:
    try:
        line, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
    except UnicodeDecodeError as error:
        raise EngineCallRefused("A head that is not in ASCII is not passed on.") from error
    found = _LINE.fullmatch(line)
    if found is None:
        raise EngineCallRefused("That is no request of HTTP/1.1.")
    path, _, text = found[2].partition("?")
    if _PATH.fullmatch(path) is None:
        raise EngineCallRefused("A path with such characters is not passed on.")
    pairs = parse_qsl(text, keep_blank_values=True)
    query = dict(pairs)
    if len(query) != len(pairs):
        raise EngineCallRefused("A query that says something twice is not passed on.")
    headers = _headers(lines)
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not re.fullmatch(r"[0-9]{1,7}", length) or int(length) > _BODY_BYTES:
        raise EngineCallRefused(f"A body without its length, or of more than {_BODY_BYTES} bytes, is not passed on.")
    upgrade = headers.get("upgrade", "").lower() == "tcp" and "upgrade" in headers.get("connection", "").lower()
    return Request(found[1], path, query, b"", upgrade, headers)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, separator, value = line.partition(":")
        name = name.lower()
        if not separator or not re.fullmatch(r"[a-z0-9-]+", name) or name in headers:
            raise EngineCallRefused("A header that is not well-formed, or comes twice, is not passed on.")
        headers[name] = value.strip()
    return headers


def head_of(method: str, target: str, query: Mapping[str, str], body: bytes, *, upgrade: bool) -> bytes:
    """A request's first bytes, body included, with no header of whoever asked."""
    if query:
        target += "?" + urlencode(query)
    connection = "Connection: Upgrade\r\nUpgrade: tcp" if upgrade else "Connection: close"
    lines = [f"{method} {target} HTTP/1.1", "Host: engine", connection]
    if body:
        lines.append("Content-Type: application/json")
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_of(head: bytes) -> int:
    """The status of an answer, by its first line; 502 where it has none."""
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    return int(found[1]) if found else HTTPStatus.BAD_GATEWAY


def answer(status: int, body: Any) -> bytes:
    """An answer of our own, such as the engine gives."""
    content = json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + content


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on all bytes, then the end."""
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
