"""`carrel socket-proxy`: stand between a gateway in a container and its engine's socket."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer

from carrel.observability import configure_logging
from carrel.socket_proxy import SocketProxy, SocketProxyOptions

__all__ = ["socket_proxy"]


def socket_proxy(
    listen: Annotated[Path, typer.Option(help="The socket that the gateway is shown.")],
    engine: Annotated[Path, typer.Option(help="The engine's socket.")] = Path("/var/run/docker.sock"),
    owner: Annotated[
        str | None, typer.Option(help="Whose the containers are. (default: the compose project that it is of)")
    ] = None,
    bindable: Annotated[
        Path, typer.Option(help="What our own container is shown below this folder, sandboxes may be shown.")
    ] = Path("/data"),
    image: Annotated[
        list[str] | None, typer.Option(help="Images that may be run, such as carrel-sandbox:*. (default: any)")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="Networks that sandboxes may be in. (default: none)")
    ] = None,
) -> None:
    """Let a gateway make sandboxes on an engine, and do nothing else there. Runs in a container of its own."""
    configure_logging("info")
    options = SocketProxyOptions(
        listen=listen,
        engine=engine,
        owner=owner,
        bindable=bindable,
        images=tuple(image or ("*",)),
        networks=tuple(network or ("none",)),
    )
    asyncio.run(_run(options))


async def _run(options: SocketProxyOptions) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with AsyncExitStack() as exit_stack:
        await SocketProxy(options).start(exit_stack)
        await ended.wait()
