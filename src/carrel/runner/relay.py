"""The road from a loopback port of the sandbox to the gateway's egress proxy.

What an agent runs is told of an ordinary HTTP proxy on 127.0.0.1. Behind the port stands the runner, which passes every
connection on to the proxy's unix socket and says there, before anything else, whose it is: programs need no credential.
Where the runner is inside of the sandbox, it listens. Where it stands outside of the wall, the wall waits on a pipe,
with its network made and no program begun, until the runner has put its listening socket into that network.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from pathlib import Path

import structlog

from carrel.protocol.bootstrap import EgressRoad
from carrel.runner.namespaces import listen_within

__all__ = ["Relay"]

log = structlog.get_logger(__name__)

_MOST_CONNECTIONS = 512
_CONNECT_SECONDS = 10.0
_CHUNK_BYTES = 64 * 1024
_DIRECT = "localhost,127.0.0.1,::1,gateway"
_AWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Relay:
    """Listens within one sandbox."""

    def __init__(self, road: EgressRoad, token: str) -> None:
        """Make the relay; nothing is opened before `open`. `token`: the agent's, by which the proxy knows the sandbox."""
        self._road = road
        self._greeting = f"OPTIONS * HTTP/1.1\r\nproxy-authorization: Bearer {token}\r\n\r\n".encode()
        self._server: asyncio.Server | None = None
        self._opening: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def variables(self) -> dict[str, str]:
        """What tells programs of the proxy, in both spellings; the road to the model leads past it."""
        proxy = f"http://127.0.0.1:{self._road.port}"
        named = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": _DIRECT}
        return named | {name.lower(): value for name, value in named.items()}

    def open(self) -> asyncio.Task[None]:
        """Begin to listen, as soon as there is where. To be called before the sandbox's wall is started.

        The task ends when programs can connect; it raises OSError where they never will. The wall does not wait longer.
        """
        if self._road.entrance is None:
            self._opening = asyncio.create_task(self._listen(), name="relay-open")
        else:
            wall = _Wall(Path(self._road.entrance))
            self._opening = asyncio.create_task(self._listen_within(wall), name="relay-open")
        return self._opening

    async def _listen(self) -> None:
        await self._serve(socket.create_server(("127.0.0.1", self._road.port)))

    async def _listen_within(self, wall: _Wall) -> None:
        with contextlib.closing(wall):
            pid = await wall.process()
            await self._serve(listen_within(pid, self._road.port))
            wall.let_go()

    async def _serve(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._take, sock=listener)

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= _MOST_CONNECTIONS:
                await self._pass_on(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.info("relay.broken", error=repr(error))
            with contextlib.suppress(OSError):
                writer.write(_AWAY)
        except asyncio.CancelledError:  # the sandbox ends; nobody awaits this task for its result
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_CONNECT_SECONDS):
            proxy_reader, proxy_writer = await asyncio.open_unix_connection(self._road.socket)
        try:
            proxy_writer.write(self._greeting)
            async with asyncio.timeout(_CONNECT_SECONDS):
                welcome = await proxy_reader.readuntil(b"\r\n\r\n")
            if not welcome.startswith(b"HTTP/1.1 200 "):
                writer.write(welcome)
                return
            ways = {
                asyncio.create_task(_pump(reader, proxy_writer), name="relay-out"),
                asyncio.create_task(_pump(proxy_reader, writer), name="relay-in"),
            }
            try:
                await asyncio.gather(*ways)
            except OSError:  # one side has gone away in the middle: so does the other
                pass
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            proxy_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


class _Wall:
    """Two pipes of a wall that is being built: it says its process on one, and waits for a byte on the other."""

    def __init__(self, folder: Path) -> None:
        # Open for both ways: so neither we nor the wall wait for the other to open its end.
        self._told, self._go = (
            os.open(folder / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for name in ("wall", "go")
        )

    async def process(self) -> int:
        """The id of the process that is in the sandbox's namespaces."""
        loop = asyncio.get_running_loop()
        said = b""
        while b"}" not in said:
            ready = asyncio.Event()
            loop.add_reader(self._told, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(self._told)
            said += os.read(self._told, 4096)
        return int(json.loads(said)["child-pid"])

    def let_go(self) -> None:
        """Have it go on."""
        os.write(self._go, b".")

    def close(self) -> None:
        """Close our ends. A wall that still waits finds no writer any more, and goes on without a network."""
        os.close(self._told)
        os.close(self._go)
