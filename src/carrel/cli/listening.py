"""The sockets a server listens on: its addresses, those of agents, and the one of runners."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvicorn
import websockets.asyncio.server as ws
from websockets.exceptions import ConnectionClosed

from carrel.api.dialects import Listeners
from carrel.api.origins import LOOPBACK_NAMES
from carrel.cli.dialects import addresses
from carrel.errors import OperatorError
from carrel.sessions.hub import Hub, LinkConnection
from carrel.settings import Settings

__all__ = ["listen", "serve_link", "serve_unix"]


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Signals are ours."""
        yield


async def _start(config: uvicorn.Config, stack: AsyncExitStack, sockets: list[socket.socket] | None) -> _Server:
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=sockets), name="http")

    async def close() -> None:
        server.should_exit = True
        await task

    stack.push_async_callback(close)
    while not server.started:
        if task.done():
            task.result()
            raise OperatorError("The server ended while it was starting.")
        await asyncio.sleep(0.005)
    return server


async def listen(settings: Settings, app: Any, stack: AsyncExitStack) -> dict[str, str]:
    """Listen on every address there is to be, and answer on none before all listen. The addresses by name."""
    sockets = {name: _bind(host, port, stack) for name, (host, port) in addresses(settings).items()}
    ports = {name: listener.getsockname()[1] for name, listener in sockets.items()}
    own = {port: name for name, port in ports.items() if name != "api"}
    front = Listeners(
        app, own, loopback=[name for name, (host, _) in addresses(settings).items() if host in LOOPBACK_NAMES]
    )
    config = uvicorn.Config(
        front,
        log_config=None,
        proxy_headers=False,  # uvicorn would believe every local caller; `trusted_proxies` says whom we believe
        access_log=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=settings.max_frame_bytes,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    await _start(config, stack, list(sockets.values()))
    front.up.set()
    return {name: f"http://{_shown(host)}:{ports[name]}" for name, (host, _) in addresses(settings).items()}


def _bind(host: str, port: int, stack: AsyncExitStack) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    stack.callback(listener.close)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OperatorError(f"Cannot listen on {host}:{port}: {error.strerror}. Choose another port.") from error
    return listener


async def serve_unix(app: Any, path: Path, stack: AsyncExitStack, *, everyone: bool = False) -> None:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(listener.close)
    listener.bind(str(path))
    path.chmod(0o666 if everyone else 0o600)
    stack.callback(path.unlink, missing_ok=True)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    await _start(config, stack, [listener])


class _WebSocketLink(LinkConnection):
    def __init__(self, connection: ws.ServerConnection) -> None:
        self._connection = connection

    async def receive(self) -> bytes | None:
        """The next message."""
        try:
            message = await self._connection.recv(decode=False)
        except ConnectionClosed:
            return None
        return bytes(message)

    async def send(self, data: bytes) -> None:
        """Send a message."""
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(data)

    async def close(self) -> None:
        """End the connection."""
        await self._connection.close()


async def serve_link(
    hub: Hub, path: Path, max_frame_bytes: int, stack: AsyncExitStack, *, everyone: bool = False
) -> None:
    path.unlink(missing_ok=True)

    async def handle(connection: ws.ServerConnection) -> None:
        await hub.serve(_WebSocketLink(connection))

    server = await ws.unix_serve(
        handle, str(path), max_size=max_frame_bytes * 2, compression=None, ping_interval=20, ping_timeout=60
    )
    path.chmod(0o666 if everyone else 0o600)

    async def close() -> None:
        server.close()
        await server.wait_closed()
        path.unlink(missing_ok=True)

    stack.push_async_callback(close)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
