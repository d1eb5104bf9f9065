"""The proxy: HTTP's CONNECT for whatever is encrypted, whole addresses for plain HTTP. It reads where, never what.

A connection is one sandbox's, by the token of its agent, and carries one request: what comes after that request's body is
not looked for. The policy is the one that the sandbox was launched with. Every verdict is put on record.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog

from carrel import abc
from carrel.egress import requests
from carrel.egress.dialling import Dialler, NotDialled
from carrel.egress.ledger import Ledger
from carrel.egress.requests import BadRequest, Head, Target
from carrel.errors import StoreUnavailable
from carrel.hostnames import AddressLiteral, HostPattern
from carrel.model import GATEWAY_ONLY, Sandbox

__all__ = ["EgressLimits", "EgressProxy"]

log = structlog.get_logger(__name__)

_HEAD_SECONDS = 15.0
_MOST_NAMELESS = 256
_PIECE_BYTES = 64 * 1024
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 16 * 1024 * 1024
_LONGEST_HOST = 253

_WORDS = {
    "not_listed": "is not among the names that this session may reach",
    "port": "is allowed on other ports alone",
    "address": "is an address; only names can be allowed",
    "malformed": "is no name of a host",
    "private_address": "leads to an address that is not public",
    "unresolved": "has no address",
    "unreachable": "cannot be connected to",
    "too_many": "waits for one of this session's other connections to end",
}
_STATUS = {"unresolved": 502, "unreachable": 502, "too_many": 429, "malformed": 400}
_PHRASES = {
    400: "Bad Request",
    403: "Forbidden",
    407: "Proxy Authentication Required",
    413: "Content Too Large",
    429: "Too Many Requests",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


@dataclass(frozen=True, kw_only=True)
class EgressLimits:
    """How much one sandbox may take."""

    connections: int = 64
    """At once."""
    idle_seconds: float = 120.0
    """Without a byte in either direction."""
    bytes_each_way: int = 4096 * 2**20
    """That one connection carries at most."""


class _Refused(Exception):
    """The request goes nowhere; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _TooMuch(BadRequest):
    """More than one connection may carry."""


class _Carried:
    """What passes over one connection: not too much of it, and not with too long a silence."""

    def __init__(self, limits: EgressLimits, timeout: asyncio.Timeout) -> None:
        self._limits = limits
        self._timeout = timeout

    async def pass_on(self, pieces: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
        """Pass on all of one direction."""
        left = self._limits.bytes_each_way
        async for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise _TooMuch("It is more than one connection may carry.")
            writer.write(piece)
            await writer.drain()
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._limits.idle_seconds)


class EgressProxy:
    """Leads sandboxes to the names that their policies allow."""

    def __init__(self, store: abc.Store, dialler: Dialler, ledger: Ledger, limits: EgressLimits | None = None) -> None:
        """Make the proxy.

        Args:
            store: says whose a token is, and which policy its sandbox has.
            dialler: connects to names.
            ledger: is told of every verdict.
            limits: of one sandbox.
        """
        self._store = store
        self._dialler = dialler
        self._ledger = ledger
        self._limits = limits or EgressLimits()
        self._nameless: Counter[int] = Counter()
        self._open: Counter[str] = Counter()
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, path: Path, exit_stack: AsyncExitStack) -> None:
        """Listen on a unix socket that every sandbox may connect to; closing is registered with `exit_stack`."""
        await self._dialler.start(exit_stack)
        await self._ledger.start(exit_stack)
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._take, path, limit=requests.HEAD_BYTES)
        path.chmod(0o666)

        async def close() -> None:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            path.unlink(missing_ok=True)

        exit_stack.push_async_callback(close)

    # ------------------------------------------------------------------------------------------------ one connection

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, _TooMuch) as error:  # either side went away, was silent or talked for too long
            log.debug("egress.broken", error=repr(error))
        except asyncio.CancelledError:  # the server ends; nobody awaits this task for its result
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            found = await self._begin(reader, writer)
        except BadRequest as error:
            await _answer(reader, writer, 400, "malformed", str(error))
            return
        except StoreUnavailable as error:
            await _answer(reader, writer, 503, "unavailable", error.message)
            return
        if found is None:
            return
        sandbox, head = found
        self._open[sandbox.id] += 1
        try:
            await self._lead(sandbox, head, reader, writer)
        finally:
            self._open[sandbox.id] -= 1
            if not self._open[sandbox.id]:
                del self._open[sandbox.id]

    async def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Sandbox, Head] | None:
        """Whose the connection is, and its one request."""
        user = _user_of(writer)
        if self._nameless[user] >= _MOST_NAMELESS:
            return None
        self._nameless[user] += 1
        try:
            async with asyncio.timeout(_HEAD_SECONDS):
                head = await requests.read_head(reader)
                if head is None:
                    return None
                sandbox = await self._sandbox(head.token)
                if sandbox is None:
                    await _answer(reader, writer, 407, "unknown", "This proxy wants the token of a running sandbox.")
                    return None
        finally:
            self._nameless[user] -= 1
            if not self._nameless[user]:
                del self._nameless[user]
        if head.greets:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            async with asyncio.timeout(self._limits.idle_seconds):
                head = await requests.read_head(reader)
        return (sandbox, head) if head is not None else None

    async def _sandbox(self, token: str | None) -> Sandbox | None:
        if token is None:
            return None
        digest = sha256(token.encode()).hexdigest()
        return await self._store.read(lambda tx: tx.sandboxes.by_agent_token(digest))

    async def _lead(
        self, sandbox: Sandbox, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            target = head.where()
            head.framing()
        except BadRequest as error:
            self._ledger.record(sandbox.session_id, head.target[:_LONGEST_HOST], 0, "refused", "malformed")
            await _answer(reader, writer, 400, "malformed", str(error))
            return
        shown = target.host[:_LONGEST_HOST].lower()
        try:
            name = shown = self._permitted(sandbox, target)
            far_reader, far_writer = await self._dialler.connect(name, target.port)
        except (_Refused, NotDialled) as error:
            verdict = "allowed" if error.reason in ("unresolved", "unreachable") else "refused"
            self._ledger.record(sandbox.session_id, shown, target.port, verdict, error.reason)  # type: ignore[arg-type]
            text = f"{shown}, port {target.port}, {_WORDS[error.reason]}."
            await _answer(reader, writer, _STATUS.get(error.reason, 403), error.reason, text)
            return
        self._ledger.record(sandbox.session_id, name, target.port, "allowed", "listed")
        try:
            async with asyncio.timeout(self._limits.idle_seconds) as timeout:
                carried = _Carried(self._limits, timeout)
                if head.method == "CONNECT":
                    await _tunnel(carried, reader, writer, far_reader, far_writer)
                else:
                    await _exchange(carried, head, name, target, reader, writer, far_reader, far_writer)
        finally:
            far_writer.close()

    def _permitted(self, sandbox: Sandbox, target: Target) -> str:
        """The name, if its sandbox may be led there. Raises _Refused."""
        if self._open[sandbox.id] > self._limits.connections:
            raise _Refused("too_many")
        try:
            name = target.name()
        except AddressLiteral as error:
            raise _Refused("address") from error
        except ValueError as error:
            raise _Refused("malformed") from error
        policy = sandbox.network or GATEWAY_ONLY
        if policy.permits(name, target.port):
            return name
        listed = any(HostPattern.parse(each).names(name) for each in policy.allow)
        raise _Refused("port" if listed else "not_listed")


# -------------------------------------------------------------------------------------------------------- what passes


async def _tunnel(
    carried: _Carried,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def way(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        await carried.pass_on(_pieces(source), sink)
        if sink.can_write_eof():
            sink.write_eof()

    await _both(way(reader, far_writer), way(far_reader, writer))


async def _exchange(
    carried: _Carried,
    head: Head,
    name: str,
    target: Target,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """One request of plain HTTP, and its answer."""

    async def ask() -> None:
        far_writer.write(head.onward(name, target))
        await carried.pass_on(requests.body(reader, head.framing()), far_writer)

    begun = False

    async def answer() -> None:
        nonlocal begun
        status = 100
        while status < 200:
            status, text = await requests.answer_head(far_reader)
            begun = True
            writer.write(text)
        await carried.pass_on(_pieces(far_reader), writer)

    if head.expects:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    asking = asyncio.create_task(ask(), name="egress-ask")
    answering = asyncio.create_task(answer(), name="egress-answer")
    try:
        await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
        wrong = asking.exception() if asking.done() else None
        if isinstance(wrong, BadRequest):
            status = 413 if isinstance(wrong, _TooMuch) else 400
            raise wrong
        # A server may answer, and close, before it has read the whole question: the answer counts.
        status = 502
        await answering
    except BadRequest as error:
        if not begun:
            await _answer(reader, writer, status, "too_large" if status == 413 else "malformed", str(error))
    finally:
        await _end(asking, answering)


async def _both(one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]) -> None:
    tasks = [asyncio.create_task(each, name="egress-tunnel") for each in (one, other)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(*tasks)


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(_PIECE_BYTES):
        yield piece


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, reason: str, text: str
) -> None:
    body = f"{text}\n".encode("utf-8", "replace")
    lines = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        "content-type: text/plain; charset=utf-8",
        f"content-length: {len(body)}",
        f"x-carrel-reason: {reason}",
        "connection: close",
    ]
    if status == 407:
        lines.append('proxy-authenticate: Basic realm="carrel"')
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    # Who is still sending would lose the answer to a connection that is closed at once.
    with contextlib.suppress(OSError, TimeoutError):  # or nobody waits for it any more
        async with asyncio.timeout(_LINGER_SECONDS):
            await writer.drain()
            writer.write_eof()
            left = _LINGER_BYTES
            while left > 0 and (piece := await reader.read(_PIECE_BYTES)):
                left -= len(piece)


def _user_of(writer: asyncio.StreamWriter) -> int:
    """The user at the other end: where Carrel is root, each session's agent is one of its own."""
    raw = writer.get_extra_info("socket")
    _, user, _ = struct.unpack("3i", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)
