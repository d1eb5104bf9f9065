"""From a name to a connection: resolved here, checked, and connected to the very address that was checked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from ipaddress import ip_address

from carrel.egress.addresses import Judge

__all__ = ["Dialler", "NotDialled", "Resolve"]

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""From a name and a port to addresses."""

_RESOLVE_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_MOST_ADDRESSES = 8
_RESOLVERS = 8


class NotDialled(Exception):
    """There is no connection; `reason` says why, in a stable word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Dialler:
    """Connects to names."""

    def __init__(self, judge: Judge, resolve: Resolve | None = None) -> None:
        """Connect to what `judge` permits. `resolve`: asks for addresses; default: this machine's resolver."""
        self._judge = judge
        self._resolve = resolve or self._ask
        # Of its own: a name server that does not answer must hold up nobody but those who ask it.
        self._threads = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="resolve")

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Register the closing."""
        exit_stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)

    async def _ask(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _getaddrinfo, host, port)
        return list(dict.fromkeys(found))

    async def addresses(self, host: str, port: int) -> list[str]:
        """The name's addresses that may be connected to, a few at most.

        Raises:
            NotDialled: `unresolved`, or `private_address`: there is none, or none of them may be.
        """
        try:
            async with asyncio.timeout(_RESOLVE_SECONDS):
                found = await self._resolve(host, port)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise NotDialled("unresolved") from error
        if not found:
            raise NotDialled("unresolved")
        # A scope (`fe80::1%eth0`) marks what is of one link alone.
        permitted = [each for each in found if "%" not in each and self._judge.permits(ip_address(each))]
        if not permitted:
            raise NotDialled("private_address")
        return permitted[:_MOST_ADDRESSES]

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the name.

        Raises:
            NotDialled: `unresolved`, `private_address`, or `unreachable`.
        """
        for address in await self.addresses(host, port):
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    return await _connect(address, port)
            except (OSError, TimeoutError):  # the name may have another address that answers
                continue
        raise NotDialled("unreachable")


def _getaddrinfo(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


async def _connect(address: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an address, which no resolver is asked for again."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (address, port))
    except BaseException:
        raw.close()
        raise
    return await asyncio.open_connection(sock=raw)
