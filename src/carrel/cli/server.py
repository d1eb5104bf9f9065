"""Wires a whole server: the only place where contracts meet their implementations."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvicorn
import websockets.asyncio.server as ws
from websockets.exceptions import ConnectionClosed

from carrel import __version__, killpoints
from carrel.api import Services, create_app
from carrel.auth import AdminKey
from carrel.buses import MemoryBus
from carrel.cli.drain import drain
from carrel.errors import DataFolderInUse, InvalidSettings, OperatorError
from carrel.model import Isolation
from carrel.model_gateway import credentials, scripted
from carrel.model_gateway.app import ModelGateway
from carrel.model_gateway.meter import Meter
from carrel.model_gateway.prices import Prices
from carrel.runtimes.local import LocalRuntime, LocalRuntimeOptions
from carrel.sessions.hub import Hub, LinkConnection
from carrel.sessions.live import Live
from carrel.sessions.owner import Owner, OwnerOptions
from carrel.sessions.reconciler import Reconciler
from carrel.sessions.scheduler import Scheduler
from carrel.sessions.service import ServiceOptions, SessionService
from carrel.sessions.streams import Streams
from carrel.settings import Settings
from carrel.store import SqliteStore
from carrel.workspaces import Folders

log = structlog.get_logger(__name__)

_LONGEST_SOCKET_PATH = 90
_UPSTREAM_TIMEOUT = httpx.Timeout(600.0, connect=15.0, pool=60.0)


@dataclass(frozen=True)
class Running:
    """A server that is up."""

    url: str
    key: str | None
    data: Path
    services: Services
    hub: Hub


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """Run a server in this event loop, from its first start to its last write.

    Raises:
        OperatorError: it cannot start; the message says what to do.
    """
    if settings.kill_at is not None:
        point, _, visits = settings.kill_at.partition(":")
        killpoints.arm(point, int(visits or 1))
    async with AsyncExitStack() as stack:
        folder = _Folder(settings, stack)
        key = AdminKey.load(settings.data / "admin.key") if settings.auth == "key" else None
        parts = await _build(settings, folder, stack, key)
        server = await _listen(settings, create_app(parts.services), stack)
        url = f"http://{_shown(settings.host)}:{server.servers[0].sockets[0].getsockname()[1]}"
        folder.announce(url, stack)
        _say(settings, url, key, parts.source)
        await parts.reconciler.start(stack)
        stack.push_async_callback(drain, parts.owner, parts.services, parts.hub, parts.runtime, settings.drain_seconds)
        yield Running(url, key.key if key else None, settings.data, parts.services, parts.hub)


def serve(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT.

    Raises:
        OperatorError: it cannot start; the message says what to do.
    """

    async def main() -> None:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, over.set)
        async with running(settings):
            await over.wait()
            log.info("server.stopping")
        log.info("server.stopped")

    configure_logging(settings.log_level)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def configure_logging(level: str) -> None:
    """Log lines of JSON to standard error, or readable ones to a terminal."""
    import sys

    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


# ------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Parts:
    services: Services
    owner: Owner
    hub: Hub
    runtime: LocalRuntime
    reconciler: Reconciler
    source: Any


async def _build(settings: Settings, folder: _Folder, stack: AsyncExitStack, key: AdminKey | None) -> _Parts:
    bus = MemoryBus()
    await bus.start(stack)
    live = Live(bus)
    store = SqliteStore(
        None if settings.memory else settings.data / "carrel.db", durability=settings.durability, on_commit=live.stored
    )
    await store.start(stack)
    source, client = await _upstream(settings, folder, stack)
    gateway = ModelGateway(store, Meter(store, Prices.shipped()), source, client)
    stack.push_async_callback(gateway.close)
    await _serve_unix(gateway.app(), folder.sandbox_side / "gateway.sock", stack, everyone=True)
    isolation = settings.isolation or Isolation.BUBBLEWRAP
    runtime = LocalRuntime(_runtime_options(settings, folder))
    await runtime.start(stack)
    own_users = os.geteuid() == 0 and isolation is Isolation.BUBBLEWRAP
    folders = Folders(settings.data / "sessions", first_uid=settings.first_sandbox_uid if own_users else None)
    scheduler: Scheduler
    hub = Hub(store, live, lambda session_id: scheduler.poke(session_id))
    owner = Owner(
        store,
        runtime,
        folders,
        hub,
        check_model=source.headers,
        run_blocking=asyncio.to_thread,
        options=OwnerOptions(
            idle_timeout_seconds=settings.idle_timeout_seconds,
            launch_timeout_seconds=settings.launch_timeout_seconds,
            reconnect_window_seconds=settings.reconnect_window_seconds,
            default_model=settings.anthropic_model,
        ),
    )
    scheduler = Scheduler(owner.step)
    await scheduler.start(stack)
    await _serve_link(hub, folder.link_socket, settings.max_frame_bytes, stack)
    streams = Streams(store, bus, live, buffer_bytes=settings.stream_buffer_bytes)
    service = SessionService(
        store,
        streams,
        owner,
        scheduler,
        hub,
        folders,
        run_blocking=asyncio.to_thread,
        options=ServiceOptions(
            max_queued_turns=settings.max_queued_turns,
            allow_bypass=runtime.isolated or settings.allow_bypass_without_isolation,
        ),
    )

    async def ready() -> dict[str, Any]:
        await store.read(lambda tx: tx.sessions.get(""))
        return {"store": True, "accepting": not owner.draining}

    services = Services(
        store=store,
        sessions=service,
        admin_key=key,
        ready=ready,
        models=gateway.offered,
        max_file_bytes=settings.max_file_bytes,
        heartbeat_seconds=settings.heartbeat_seconds,
    )
    return _Parts(services, owner, hub, runtime, Reconciler(store, runtime, scheduler), source)


def _runtime_options(settings: Settings, folder: _Folder) -> LocalRuntimeOptions:
    return LocalRuntimeOptions(
        folder=settings.data / "sandboxes",
        link_socket=folder.link_socket,
        gateway_folder=folder.sandbox_side,
        cli_path=settings.cli_path or bundled_cli(),
        isolation=settings.isolation,
        network=settings.network,
        read_only_paths=tuple(settings.read_only_paths),
        reconnect_window_seconds=settings.reconnect_window_seconds,
        max_frame_bytes=settings.max_frame_bytes,
        outbox_memory_bytes=settings.outbox_memory_bytes,
        outbox_disk_bytes=settings.outbox_disk_bytes,
    )


def bundled_cli() -> Path:
    """The Claude Code program that comes with the Agent SDK.

    Raises:
        OperatorError: it is not there.
    """
    from importlib.util import find_spec

    spec = find_spec("claude_agent_sdk")
    path = Path(spec.origin).parent / "_bundled" / "claude" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise OperatorError("The Claude Code program is missing. Install claude-agent-sdk anew, or set cli_path.")
    return path


async def _upstream(settings: Settings, folder: _Folder, stack: AsyncExitStack) -> tuple[Any, httpx.AsyncClient]:
    """The credential, and a client whose base is the model's API."""
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    chosen = settings.model_upstream
    if chosen == "scripted" or chosen.startswith("scripted:"):
        path = chosen.partition(":")[2]
        try:
            script = scripted.load_script(Path(path)) if path else None
        except (scripted.ScriptError, OSError) as error:
            raise InvalidSettings(f"model_upstream: {error}") from error
        socket_path = folder.private / "scripted.sock"
        await _serve_unix(scripted.create_app(script), socket_path, stack)
        transport = httpx.AsyncHTTPTransport(uds=str(socket_path), limits=limits)
        client = httpx.AsyncClient(base_url="http://scripted", transport=transport, timeout=_UPSTREAM_TIMEOUT)
        source: Any = credentials.NotNeeded()
    else:
        base = settings.anthropic_base_url if chosen == "anthropic" else chosen
        client = httpx.AsyncClient(base_url=base.rstrip("/"), timeout=_UPSTREAM_TIMEOUT, limits=limits)
        source = credentials.choose(
            api_key=_secret(settings.anthropic_api_key),
            auth_token=_secret(settings.anthropic_auth_token),
            oauth_token=_secret(settings.claude_code_oauth_token),
        )
        if chosen != "anthropic" and isinstance(source, credentials.NoCredential):
            source = credentials.NotNeeded()
    stack.push_async_callback(client.aclose)
    return source, client


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value is not None else None


# --------------------------------------------------------------------------------------------------------- listening


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


async def _listen(settings: Settings, app: Any, stack: AsyncExitStack) -> _Server:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    stack.callback(listener.close)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise OperatorError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another --port."
        ) from error
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=settings.max_frame_bytes,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    return await _start(config, stack, [listener])


async def _serve_unix(app: Any, path: Path, stack: AsyncExitStack, *, everyone: bool = False) -> None:
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


async def _serve_link(hub: Hub, path: Path, max_frame_bytes: int, stack: AsyncExitStack) -> None:
    path.unlink(missing_ok=True)

    async def handle(connection: ws.ServerConnection) -> None:
        await hub.serve(_WebSocketLink(connection))

    server = await ws.unix_serve(
        handle, str(path), max_size=max_frame_bytes * 2, compression=None, ping_interval=20, ping_timeout=60
    )
    path.chmod(0o600)

    async def close() -> None:
        server.close()
        await server.wait_closed()
        path.unlink(missing_ok=True)

    stack.push_async_callback(close)


# ------------------------------------------------------------------------------------------------------ data folder


class _Folder:
    """The data folder: locked, private, with the sockets' folders beside it or, where its path is too long, in /tmp."""

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self._data = settings.data
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataFolderInUse(operator_detail=str(self._data)) from error
        run = self._data / "run"
        if len(str(run)) + len("/sandbox/gateway.sock") > _LONGEST_SOCKET_PATH:
            run = _short_folder(self._data)
            stack.callback(_remove_if_empty, run)
        self.private = run
        self.sandbox_side = run / "sandbox"
        self.link_socket = run / "link.sock"
        run.mkdir(mode=0o700, exist_ok=True)
        self.sandbox_side.mkdir(mode=0o755, exist_ok=True)

    def announce(self, url: str, stack: AsyncExitStack) -> None:
        """Let the command line find this server."""
        path = self._data / "server.json"
        path.write_text(json.dumps({"url": url, "pid": os.getpid(), "version": __version__}))
        stack.callback(path.unlink, missing_ok=True)


def _short_folder(data: Path) -> Path:
    """A folder of ours with a short name that follows from the data folder's: a restarted server finds its runners."""
    digest = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"carrel-{os.geteuid()}-{digest}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OperatorError(f"{folder} is not a private folder of ours; remove it.")
    return folder


def _remove_if_empty(run: Path) -> None:
    with contextlib.suppress(OSError):
        (run / "sandbox").rmdir()
        run.rmdir()


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _say(settings: Settings, url: str, key: AdminKey | None, source: Any) -> None:
    log.info("server.started", url=url, data=str(settings.data), model=settings.model_upstream)
    if key is not None and key.new:
        print(f"The admin key, shown once (it is in {settings.data / 'admin.key'}):\n\n    {key.key}\n", flush=True)
    if settings.allow_insecure:
        log.warning("server.insecure", why="allow_insecure is set", auth=settings.auth, host=settings.host)
    if settings.auth == "none":
        log.warning("server.no_auth", why="auth is none: every local process can use this server")
    if settings.isolation in (Isolation.NONE, Isolation.CONTAINER):
        log.warning(
            "server.not_isolated",
            isolation=settings.isolation,
            why="sessions can see each other, and reach whatever this host can",
        )
    if isinstance(source, credentials.NoCredential):
        from carrel.errors import MissingCredential

        log.warning("server.no_credential", message=MissingCredential().message)
    else:
        log.info("server.credential", credential=source.describe())
