"""The roads from loopback ports of the sandbox to the gateway: to its egress proxy, and to its MCP servers.

What an agent runs is told of an ordinary HTTP proxy on 127.0.0.1. Behind the port stands the runner, which passes every
connection on to the proxy's unix socket and says there, before anything else, whose it is: programs need no credential.
MCP servers have a port of the same kind; there the agent says whose it is by itself, as to the model gateway.
Where the runner is inside of the sandbox, it listens. Where it stands outside of the wall, the wall waits on a pipe,
with its network made and no program begun, until the runner has put its listening sockets into that network.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from carrel.protocol.bootstrap import GATEWAY_URL, Road
from carrel.runner.namespaces import listen_within

__all__ = ["Relay"]

log = structlog.get_logger(__name__)

_TOKEN_VARIABLE = "CARREL_AGENT_TOKEN"
_MOST_CONNECTIONS = 512
_CONNECT_SECONDS = 10.0
_CHUNK_BYTES = 64 * 1024
_DIRECT = "localhost,127.0.0.1,::1,gateway"
_AWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Relay:
    """Listens within one sandbox."""

    def __init__(self, token: str, *, egress: Road | None = None, mcp: Road | None = None) -> None:
        """Make the relay; nothing is opened before `open`.

        Args:
            token: the agent's, by which the proxy knows the sandbox.
            egress: the road to the egress proxy, if there is one.
            mcp: the road to the MCP servers that the gateway answers for, if there are any.
        """
        self._egress, self._mcp = egress, mcp
        self._token = token
        self._greeting = f"OPTIONS * HTTP/1.1\r\nproxy-authorization: Bearer {token}\r\n\r\n".encode()
        self._mcp_port = mcp.port if mcp is not None else None
        self._servers: list[asyncio.Server] = []
        self._opening: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def variables(self) -> dict[str, str]:
        """What tells programs of the proxy, in both spellings, and the agent of its token for MCP servers.

        The road to the model and these servers lead past the proxy.
        """
        known = {_TOKEN_VARIABLE: self._token} if self._mcp is not None else {}
        if self._egress is None:
            return known
        proxy = f"http://127.0.0.1:{self._egress.port}"
        named = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": _DIRECT}
        return known | named | {name.lower(): value for name, value in named.items()}

    def servers(self, given: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """MCP servers as the agent is told of them, once `open` was called: those of the gateway by the road to it."""
        if self._mcp_port is None:
            return dict(given)
        place = f"http://127.0.0.1:{self._mcp_port}/"
        return {name: _by_road(server, place) for name, server in given.items()}

    def open(self) -> asyncio.Task[None]:
        """Begin to listen, as soon as there is where. To be called before the sandbox's wall is started.

        The task ends when programs can connect; it raises OSError where they never will. The wall does not wait longer.

        Raises:
            OSError: a port is taken.
        """
        roads = [road for road in (self._egress, self._mcp) if road is not None]
        entrance = next((road.entrance for road in roads if road.entrance is not None), None)
        if entrance is None:
            listeners = [(road, socket.create_server(("127.0.0.1", road.port))) for road in roads]
            self._mcp_port = next((each.getsockname()[1] for road, each in listeners if road is self._mcp), None)
            self._opening = asyncio.create_task(self._listen(listeners), name="relay-open")
            return self._opening
        wall = _Wall(Path(entrance))
        self._opening = asyncio.create_task(self._listen_within(wall, roads), name="relay-open")
        return self._opening

    async def _listen(self, listeners: list[tuple[Road, socket.socket]]) -> None:
        for road, listener in listeners:
            await self._serve(road, listener)

    async def _listen_within(self, wall: _Wall, roads: list[Road]) -> None:
        with contextlib.closing(wall):
            pid = await wall.process()
            for road in roads:
                await self._serve(road, listen_within(pid, road.port))
            wall.let_go()

    async def _serve(self, road: Road, listener: socket.socket) -> None:
        self._servers.append(await asyncio.start_server(functools.partial(self._take, road), sock=listener))

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        for server in self._servers:
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _take(self, road: Road, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= _MOST_CONNECTIONS:
                await self._pass_on(road, reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.info("relay.broken", error=repr(error))
            with contextlib.suppress(OSError):
                writer.write(_AWAY)
        except asyncio.CancelledError:  # the sandbox ends; nobody awaits this task for its result
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _pass_on(self, road: Road, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_CONNECT_SECONDS):
            far_reader, far_writer = await asyncio.open_unix_connection(road.socket)
        try:
            if road is self._egress:
                far_writer.write(self._greeting)
                async with asyncio.timeout(_CONNECT_SECONDS):
                    welcome = await far_reader.readuntil(b"\r\n\r\n")
                if not welcome.startswith(b"HTTP/1.1 200 "):
                    writer.write(welcome)
                    return
            ways = {
                asyncio.create_task(_pump(reader, far_writer), name="relay-out"),
                asyncio.create_task(_pump(far_reader, writer), name="relay-in"),
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
            far_writer.close()


def _by_road(server: dict[str, Any], place: str) -> dict[str, Any]:
    beginning, _, rest = str(server.get("url", "")).partition(f"{GATEWAY_URL}/")
    if beginning or not rest:
        return server
    # By the variable's name: what an agent is started with, everyone on its host may read among its arguments.
    return server | {"url": place + rest, "headers": {"Authorization": f"Bearer ${{{_TOKEN_VARIABLE}}}"}}


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
