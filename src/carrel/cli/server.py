"""Wires a whole server: the only place where contracts meet their implementations."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import structlog

from carrel import killpoints
from carrel.api import Services, create_app
from carrel.api.dialects import create_dialect, mount
from carrel.api.operations import Operations
from carrel.auth import AdminKey, Authenticator
from carrel.budgets import Allowances
from carrel.buses import MemoryBus
from carrel.cli.authentication import authenticator_of
from carrel.cli.data_folder import DataFolder
from carrel.cli.dialects import dialect_options, prepare_dialects, say_dialects
from carrel.cli.direct import check_direct, direct_environment
from carrel.cli.drain import drain
from carrel.cli.kept_files import KeptFiles
from carrel.cli.listening import listen, serve_link, serve_unix
from carrel.cli.logins import logins_of
from carrel.cli.runtimes import choose_runtimes
from carrel.cli.seen import Seen, build_edges, configure_logs
from carrel.cli.storage import open_store
from carrel.egress import CheckedTransport, Dialler, EgressLimits, EgressProxy, Judge, Ledger
from carrel.errors import InvalidSettings
from carrel.mcp_gateway import McpGateway
from carrel.model import Isolation, utc_now
from carrel.model_gateway import credentials, scripted
from carrel.model_gateway.app import ModelGateway
from carrel.model_gateway.logins import Logins
from carrel.model_gateway.meter import Meter
from carrel.model_gateway.prices import Prices
from carrel.protocol.bootstrap import EGRESS_SOCKET
from carrel.protocol.environments import EnvironmentSpec
from carrel.protocol.spec import SessionSpec
from carrel.sessions.admission import Admission
from carrel.sessions.archives import ArchiveBounds, Archives
from carrel.sessions.artifacts import Artifacts
from carrel.sessions.children import Children
from carrel.sessions.diffs import Diffs
from carrel.sessions.disk import DiskWatch
from carrel.sessions.environment_life import EnvironmentLife
from carrel.sessions.environments import Environments, check_environment
from carrel.sessions.guard import Guard
from carrel.sessions.history import History
from carrel.sessions.hub import Hub
from carrel.sessions.interactions import Interactions
from carrel.sessions.live import Live
from carrel.sessions.memory import Memory
from carrel.sessions.owner import Owner, OwnerOptions
from carrel.sessions.pool import Pool, Recipes
from carrel.sessions.reconciler import Reconciler
from carrel.sessions.rules import Rules
from carrel.sessions.runtimes import Runtimes
from carrel.sessions.scheduler import Scheduler
from carrel.sessions.secrets import Keyring, Secrets
from carrel.sessions.service import ServiceOptions, SessionService
from carrel.sessions.snapshots import Snapshots
from carrel.sessions.spending import Spending
from carrel.sessions.streams import Streams
from carrel.sessions.tree_streams import TreeStreams
from carrel.sessions.trees import TreeLimits
from carrel.sessions.workspaces import NamedWorkspaces
from carrel.settings import Limits, Settings
from carrel.tools import ToolServer, inside, outside
from carrel.workspaces import Folders
from carrel.workspaces.reserve import Reserve

log = structlog.get_logger(__name__)

_ANSWER_SECONDS = 3.0
_MOST_MCP_CONNECTIONS = 1000
_UPSTREAM_TIMEOUT = httpx.Timeout(600.0, connect=15.0, pool=60.0)


@dataclass(frozen=True)
class Running:
    """A server that is up."""

    url: str
    key: str | None
    data: Path
    services: Services
    hub: Hub
    guard: Guard
    pool: Pool
    listeners: Mapping[str, str]
    """The address of every listener by its name: `api`, and the dialects that have one of their own."""


@asynccontextmanager
async def running(settings: Settings, *, span_exporter: Any = None) -> AsyncIterator[Running]:
    """Run a server in this event loop, from its first start to its last write.

    Args:
        settings: how it runs.
        span_exporter: where traces go, if they are switched on; default: where the OTEL_ variables say.

    Raises:
        OperatorError: it cannot start; the message says what to do.
    """
    if settings.kill_at is not None:
        point, _, visits = settings.kill_at.partition(":")
        killpoints.arm(point, int(visits or 1))
    async with AsyncExitStack() as stack:
        folder = DataFolder(settings, stack)
        if settings.limits.disk_reserve_mb:
            await Reserve(settings.data / "reserve", settings.limits.disk_reserve_mb * 2**20).start(stack)
        key = AdminKey.load(settings.data / "admin.key") if settings.auth == "key" else None
        seen = await Seen.start(settings, stack, span_exporter)
        parts = await _build(settings, folder, stack, key, seen)
        app = create_app(parts.services)
        await prepare_dialects(settings, parts.services.environments)
        for name in settings.dialects:
            options = dialect_options(
                settings, name, parts.authenticator, parts.source, isolated=parts.runtimes.isolated
            )
            mount(app, name, create_dialect(name, parts.services, options))
        # The framework prepares its routes when they are first looked through: not while somebody waits.
        await asyncio.to_thread(list, Operations(app))
        listeners = await listen(settings, app, stack)
        url = listeners["api"]
        folder.announce(listeners, stack)
        _say(settings, url, key, parts.source)
        say_dialects(settings, listeners)
        await parts.reconciler.start(stack)
        await parts.guard.start(stack)
        await parts.pool.start(stack)
        stack.push_async_callback(drain, parts.owner, parts.services, parts.hub, parts.runtimes, settings.drain_seconds)
        yield Running(
            url, key.key if key else None, settings.data, parts.services, parts.hub, parts.guard, parts.pool, listeners
        )


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

    configure_logs(settings)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


# ------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Parts:
    services: Services
    owner: Owner
    hub: Hub
    runtimes: Runtimes
    reconciler: Reconciler
    pool: Pool
    guard: Guard
    authenticator: Authenticator
    source: Any


async def _build(
    settings: Settings, folder: DataFolder, stack: AsyncExitStack, key: AdminKey | None, seen: Seen
) -> _Parts:
    bus = MemoryBus()
    await bus.start(stack)
    live = Live(bus, seen.observer)
    store = seen.measured(open_store(settings, on_commit=live.stored))
    await store.start(stack)
    await seen.follow(store, stack)
    authenticator = await authenticator_of(settings, store, key, stack)
    source, client = await _upstream(settings, folder, stack)
    allowances = Allowances(**dict(settings.budgets))
    meter = Meter(
        store,
        Prices.load(settings.prices_file),
        allowances=allowances,
        poke=lambda session_id: scheduler.poke(session_id),
    )
    await meter.settle_stale(utc_now())
    logins = logins_of(settings) if settings.credentials != "direct" else None
    gateway = ModelGateway(store, meter, source, client, logins)
    stack.push_async_callback(gateway.close)
    secrets = Secrets(store, Keyring.of_text(_secret(settings.secrets_key) or ""))
    await secrets.start()
    dialler = Dialler(Judge(settings.egress.private_networks))
    mcp = McpGateway(store, secrets.opened, await _checked_client(dialler, stack))
    await mcp.start(stack)
    ledger = Ledger(store, seen.metrics.egress)
    proxy = EgressProxy(store, dialler, ledger, _egress_limits(settings))
    await proxy.start(folder.sandbox_side / EGRESS_SOCKET, stack)
    isolation = settings.isolation or Isolation.BUBBLEWRAP
    direct = direct_environment(settings)

    def check_model(environment: str) -> None:
        if direct is not None:
            check_direct(direct)
        elif logins is None or not logins.has(environment):
            source.headers()

    async def check_credential(environment: str) -> None:
        if logins is None or await logins.headers(environment) is None:
            check_model(environment)

    _say_logins(logins)
    defaults = SessionSpec.model_validate(settings.defaults.model_dump(exclude={"ttl_seconds"}))
    runtimes = await choose_runtimes(settings, folder, store, direct)
    await runtimes.start(stack)
    own_users = os.geteuid() == 0 and (isolation is Isolation.BUBBLEWRAP or "docker" in runtimes.names)
    folders = Folders(
        settings.data / "sessions",
        users=settings.users.base_dir or settings.data / "users",
        workspaces=settings.data / "workspaces",
        first_uid=settings.first_sandbox_uid if own_users else None,
        make_user_directories=settings.users.auto_create_dir,
        environments=settings.data / "environments",
    )
    allow_bypass = runtimes.isolated or settings.allow_bypass_without_isolation
    scheduler: Scheduler
    hub = Hub(store, live, lambda session_id: scheduler.poke(session_id), seen.observer)
    admission = Admission(
        store,
        lambda session_id: scheduler.poke(session_id),
        max_concurrent_turns=settings.limits.max_concurrent_turns,
    )
    live.observers.append(admission.heard)
    kept = await KeptFiles.open(
        settings, store, folders, lambda session_id: scheduler.poke(session_id), stack, secrets=secrets
    )
    keeper = kept.keeper
    live.observers.append(keeper.heard)
    owner = Owner(
        store,
        runtimes,
        folders,
        hub,
        admission,
        check_model=check_model,
        run_blocking=asyncio.to_thread,
        options=OwnerOptions(
            idle_timeout_seconds=settings.idle_timeout_seconds,
            launch_timeout_seconds=settings.launch_timeout_seconds,
            reconnect_window_seconds=settings.reconnect_window_seconds,
            default_model=settings.anthropic_model,
            mcp_servers=settings.mcp_servers,
            defaults=defaults,
            exposed=secrets.exposed,
            defer_after_seconds=settings.defer_after_seconds,
            live_hold_seconds=settings.live_hold_seconds,
            allowances=allowances,
            network=settings.network,
        ),
        keeper=keeper,
        memory=_memory(settings.limits),
    )
    scheduler = Scheduler(owner.step)
    await scheduler.start(stack)
    await admission.start(stack)
    await keeper.start(stack)
    await serve_link(hub, folder.link_socket, settings.max_frame_bytes, stack)
    recipes = Recipes(defaults=defaults, default_size=settings.warm_pool)
    pool = Pool(store, owner, scheduler, recipes, shows_config=folders.shows, run_blocking=asyncio.to_thread)
    await pool.forget()
    if "docker" in runtimes.names:
        await serve_link(hub, folder.containers_link, settings.max_frame_bytes, stack, everyone=True)
    streams = Streams(store, bus, live, buffer_bytes=settings.stream_buffer_bytes, observer=seen.observer)
    service = SessionService(
        store,
        streams,
        owner,
        scheduler,
        hub,
        folders,
        admission,
        keeper,
        run_blocking=asyncio.to_thread,
        options=ServiceOptions(
            max_queued_turns=settings.max_queued_turns,
            max_waiting_turns=settings.limits.max_waiting_turns,
            max_sessions=settings.limits.max_sessions,
            max_sessions_per_user=settings.limits.max_sessions_per_user,
            metered=direct is None,
            allow_bypass=allow_bypass,
            defaults=defaults,
            trees=TreeLimits(
                depth=settings.limits.max_depth, children=settings.limits.max_children, tree=settings.limits.max_tree
            ),
            default_ttl_seconds=settings.defaults.ttl_seconds or None,
            trace=seen.trace,
        ),
        pool=pool,
    )

    workspaces = NamedWorkspaces(store, folders, run_blocking=asyncio.to_thread)
    await workspaces.finish_deletions()
    disk = DiskWatch(store, folders, default_mb=settings.limits.sandbox_disk_mb, run_blocking=asyncio.to_thread)
    guard = Guard(store, runtimes, hub, owner, scheduler, disk=disk)

    async def ready() -> dict[str, Any]:
        await store.read(lambda tx: tx.sessions.get(""))
        return {"store": True, "accepting": not owner.draining}

    def fits(spec: EnvironmentSpec) -> None:
        check_environment(
            spec,
            runtimes,
            allow_bypass=allow_bypass,
            metered=direct is None,
            allow_open=settings.allow_insecure or settings.wants_keys,
        )

    life = EnvironmentLife(
        store,
        pool,
        runtimes,
        scheduler,
        check_model=check_credential,
        check_environment=lambda environment: fits(environment.spec),
        check_secrets=secrets.opened,
        check_server=mcp.problem,
        reachable=answers,
        mcp_servers=settings.mcp_servers,
    )
    children = Children(
        store,
        service,
        owner,
        scheduler,
        folders,
        keeper,
        run_blocking=asyncio.to_thread,
        allowances=allowances,
    )
    interactions = Interactions(store, hub, owner, check_mode=service.check_mode)
    tools = ToolServer(inside=inside(store, service, children), outside=outside(service, children, interactions))
    await tools.start(stack)
    by_token = functools.partial(authenticator.authenticate, accept=frozenset({"sandbox"}))
    sandbox_side = gateway.app(beside=[tools.for_sandboxes(by_token), *mcp.routes()])
    await serve_unix(seen.model_requests(sandbox_side), folder.sandbox_side / "gateway.sock", stack, everyone=True)
    services = Services(
        store=store,
        sessions=service,
        workspaces=workspaces,
        interactions=interactions,
        children=children,
        tools=tools,
        trees=TreeStreams(store, streams),
        rules=Rules(store, owner),
        secrets=secrets,
        snapshots=Snapshots(store, keeper, scheduler),
        artifacts=Artifacts(
            store, kept.objects, keeper, run_blocking=asyncio.to_thread, max_bytes=settings.max_file_bytes
        ),
        archives=Archives(
            store,
            keeper,
            folders,
            workspaces,
            run_blocking=asyncio.to_thread,
            bounds=ArchiveBounds(upload_bytes=settings.max_file_bytes, unpacked_bytes=settings.max_archive_bytes),
        ),
        diffs=Diffs(store, kept.vault, folders, run_blocking=asyncio.to_thread),
        environments=Environments(store, check=fits),
        life=life,
        authenticator=authenticator if settings.auth != "none" else None,
        spending=Spending(store, allowances),
        history=History(store),
        ready=ready,
        models=gateway.offered,
        settle_network=ledger.flush,
        max_file_bytes=settings.max_file_bytes,
        heartbeat_seconds=settings.heartbeat_seconds,
        edges=await build_edges(
            settings, store, seen, stack, links=lambda: len(hub), memory=lambda: _memory_seen(guard, owner.memory)
        ),
    )
    reconciler = Reconciler(store, runtimes, scheduler)
    return _Parts(services, owner, hub, runtimes, reconciler, pool, guard, authenticator, source)


def _egress_limits(settings: Settings) -> EgressLimits:
    egress = settings.egress
    return EgressLimits(
        connections=egress.max_connections, idle_seconds=egress.idle_seconds, bytes_each_way=egress.max_mb * 2**20
    )


def _memory_seen(guard: Guard, memory: Memory) -> dict[str, int]:
    """Bytes of sandboxes as last measured, for the metrics."""
    looked = guard.latest()
    largest = max((each.memory_bytes for each in looked.sandboxes.values()), default=0)
    limit = {} if memory.limit_bytes is None else {"limit": memory.limit_bytes}
    return {"used": looked.memory_bytes, "largest": largest, **limit}


def _memory(limits: Limits) -> Memory:
    most = None if limits.memory_mb is None else limits.memory_mb * 2**20
    return Memory(most, wait_seconds=limits.memory_wait_seconds)


async def _upstream(settings: Settings, folder: DataFolder, stack: AsyncExitStack) -> tuple[Any, httpx.AsyncClient]:
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
        await serve_unix(scripted.create_app(script), socket_path, stack)
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


async def _checked_client(dialler: Dialler, stack: AsyncExitStack) -> httpx.AsyncClient:
    """A client for what is asked on behalf of sandboxes: it connects to public addresses, and what the operator adds."""
    client = httpx.AsyncClient(transport=CheckedTransport(dialler, max_connections=_MOST_MCP_CONNECTIONS))
    stack.push_async_callback(client.aclose)
    return client


async def answers(url: str) -> bool:
    """Whether anything that speaks HTTP answers at the address. No credential is sent to find out."""
    try:
        async with httpx.AsyncClient(timeout=_ANSWER_SECONDS) as client, client.stream("GET", url):
            return True
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value is not None else None


def _say_logins(logins: Logins | None) -> None:
    for name in logins.names() if logins is not None else ():
        why = "sessions of this environment use the operator's own subscription: for a single operator alone"
        log.warning("environment.login", environment=name, why=why)


def _say(settings: Settings, url: str, key: AdminKey | None, source: Any) -> None:
    log.info("server.started", url=url, data=str(settings.data), model=settings.model_upstream)
    if key is not None and key.new:
        path = settings.data / "admin.key"
        if sys.stdout.isatty():  # anywhere else it would be a line of a log that is kept
            print(f"The admin key, shown once (it is in {path}):\n\n    {key.key}\n", flush=True)
        else:
            log.info("server.admin_key", path=str(path))
    if settings.allow_insecure:
        log.warning("server.insecure", why="allow_insecure is set", auth=settings.auth, host=settings.host)
    if settings.auth == "none":
        log.warning("server.no_auth", why="auth is none: every local process can use this server")
    if settings.unwalled is not None:
        log.warning(
            "server.not_isolated",
            isolation=settings.unwalled,
            why="sessions can see each other, and reach whatever this host can",
        )
    if settings.credentials == "direct":
        log.warning(
            "server.credentials_direct",
            why="every sandbox holds the model's credential: its agent can read it, use it elsewhere, and nothing of "
            "that is metered",
        )
    elif isinstance(source, credentials.NoCredential):
        from carrel.errors import MissingCredential

        log.warning("server.no_credential", message=MissingCredential().message)
    else:
        log.info("server.credential", credential=source.describe())
