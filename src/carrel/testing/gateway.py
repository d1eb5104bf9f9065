"""A whole gateway without HTTP, model and CLI: the real store, bus, hub, owner and service over fake sandboxes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from carrel import abc
from carrel.buses import MemoryBus
from carrel.errors import CarrelError
from carrel.model import Principal, Session, SessionStatus, Turn
from carrel.objects import MemoryPlace, Objects
from carrel.protocol.environments import EnvironmentSpec
from carrel.protocol.events import StoredEvent
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import CreateSession, CreateTurn
from carrel.sessions.admission import Admission
from carrel.sessions.archives import ArchiveBounds, Archives
from carrel.sessions.artifacts import Artifacts
from carrel.sessions.children import Children
from carrel.sessions.diffs import Diffs
from carrel.sessions.environment_life import EnvironmentLife
from carrel.sessions.environments import Environments, check_environment
from carrel.sessions.guard import Guard
from carrel.sessions.hub import Hub
from carrel.sessions.interactions import Interactions
from carrel.sessions.keeper import Keeper
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
from carrel.sessions.streams import Streams
from carrel.sessions.tree_streams import TreeStreams
from carrel.sessions.workspaces import NamedWorkspaces
from carrel.store import SqliteStore
from carrel.testing.fakes import FakeHost, FakeRuntime
from carrel.testing.vault import FolderVault
from carrel.workspaces.folders import Folders
from carrel.workspaces.pruning import KeepRules

__all__ = ["FakeGateway"]

_PATIENCE_SECONDS = 20.0

ALICE = Principal.of_user("alice")


async def _nothing_answers(url: str) -> bool:
    return False


async def _nothing_wrong(spec: EnvironmentSpec, server: str) -> CarrelError | None:
    return None


class FakeGateway:
    """`async with FakeGateway(host, folder) as gateway`. Another one over the same folder is the same one restarted."""

    service: SessionService
    store: abc.Store
    streams: Streams
    reconciler: Reconciler

    def __init__(
        self,
        host: FakeHost,
        folder: Path,
        *,
        principal: Principal = ALICE,
        owner_options: OwnerOptions = OwnerOptions(),
        service_options: ServiceOptions = ServiceOptions(),
        wrap_store: Callable[[abc.Store], abc.Store] = lambda store: store,
        wrap_bus: Callable[[abc.EventBus], abc.EventBus] = lambda bus: bus,
        wrap_runtime: Callable[[abc.Runtime], abc.Runtime] = lambda runtime: runtime,
        check_model: Callable[[], object] = lambda: None,
        max_concurrent_turns: int | None = None,
        buffer_bytes: int = 4 * 1024 * 1024,
        observer: abc.Observer = abc.Observer(),
        memory: Memory | None = None,
        vault: FolderVault | None = None,
        keep: KeepRules = KeepRules(),
        keys: Sequence[bytes] = (bytes(32),),
        pool: Recipes = Recipes(),
        reachable: Callable[[str], Awaitable[bool]] = _nothing_answers,
        check_server: Callable[[EnvironmentSpec, str], Awaitable[CarrelError | None]] = _nothing_wrong,
    ) -> None:
        """Wire a gateway; nothing is started before it is entered.

        Args:
            host: where its sandboxes run.
            folder: where its rows and files are.
            principal: who the short calls below speak for.
            owner_options: time limits.
            service_options: bounds of what callers may do.
            wrap_store: puts something between the gateway and its store; likewise for bus and runtime.
            wrap_bus: see there.
            wrap_runtime: see there.
            max_concurrent_turns: how many turns may be at work at once.
            check_model: raises a CarrelError while no turn could reach the model.
            buffer_bytes: how much waits for a viewer that does not read.
            observer: told of what happens.
            memory: the soft limit on what sandboxes take; None: none.
            keys: what secrets are sealed with.
            vault: where files are kept; None: nowhere.
            keep: which snapshots go in the course of time.
            pool: which warm pools there are.
            reachable: whether anything answers at an address.
            check_server: what is wrong with an MCP server that the gateway answers for.
        """
        self.host = host
        self.principal = principal
        self.bus = wrap_bus(MemoryBus())
        self.live = Live(self.bus, observer)
        self.runtime = wrap_runtime(FakeRuntime(host))
        self.runtimes = Runtimes([self.runtime])
        self.folders = Folders(
            folder / "sessions", users=folder / "users", workspaces=folder / "workspaces", first_uid=None
        )
        self.scheduler: Scheduler
        self.store = wrap_store(SqliteStore(folder / "carrel.db", on_commit=self.live.stored))
        self.hub = Hub(self.store, self.live, lambda session_id: self.scheduler.poke(session_id), observer)
        self.admission = Admission(
            self.store,
            lambda session_id: self.scheduler.poke(session_id),
            max_concurrent_turns=max_concurrent_turns,
        )
        self.live.observers.append(self.admission.heard)
        if vault is not None:
            vault.folders = self.folders
        self.keeper = Keeper(
            self.store,
            self.folders,
            vault,
            lambda session_id: self.scheduler.poke(session_id),
            run_blocking=asyncio.to_thread,
            rules=keep,
        )
        self.live.observers.append(self.keeper.heard)
        secrets = Secrets(self.store, Keyring(keys))
        owner_options = replace(owner_options, exposed=secrets.exposed)
        self.owner = Owner(
            self.store,
            self.runtimes,
            self.folders,
            self.hub,
            self.admission,
            check_model=lambda environment: check_model(),
            run_blocking=asyncio.to_thread,
            options=owner_options,
            keeper=self.keeper,
            memory=memory,
        )
        self.scheduler = Scheduler(self.owner.step)
        self.pool = Pool(
            self.store,
            self.owner,
            self.scheduler,
            pool,
            shows_config=self.folders.shows,
            run_blocking=asyncio.to_thread,
        )
        self.streams = Streams(self.store, self.bus, self.live, buffer_bytes=buffer_bytes, observer=observer)
        self.service = SessionService(
            self.store,
            self.streams,
            self.owner,
            self.scheduler,
            self.hub,
            self.folders,
            self.admission,
            self.keeper,
            run_blocking=asyncio.to_thread,
            options=service_options,
            pool=self.pool,
        )
        self.children = Children(
            self.store,
            self.service,
            self.owner,
            self.scheduler,
            self.folders,
            self.keeper,
            run_blocking=asyncio.to_thread,
            allowances=owner_options.allowances,
        )
        self.trees = TreeStreams(self.store, self.streams)
        self.interactions = Interactions(self.store, self.hub, self.owner, check_mode=self.service.check_mode)
        self.rules = Rules(self.store, self.owner)
        self.secrets = secrets
        self.environments = Environments(
            self.store,
            check=lambda spec: check_environment(
                spec, self.runtimes, allow_bypass=service_options.allow_bypass, metered=service_options.metered
            ),
        )
        self.snapshots = Snapshots(self.store, self.keeper, self.scheduler)
        self.objects = Objects(MemoryPlace())
        self.artifacts = Artifacts(
            self.store, self.objects, self.keeper, run_blocking=asyncio.to_thread, max_bytes=2**20
        )
        self.diffs = Diffs(self.store, None, self.folders, run_blocking=asyncio.to_thread)

        async def checked_model(environment: str) -> None:
            check_model()

        self.life = EnvironmentLife(
            self.store,
            self.pool,
            self.runtimes,
            self.scheduler,
            check_model=checked_model,
            check_environment=lambda environment: None,
            check_secrets=secrets.opened,
            check_server=check_server,
            reachable=reachable,
            mcp_servers=owner_options.mcp_servers,
        )
        self.workspaces = NamedWorkspaces(self.store, self.folders, run_blocking=asyncio.to_thread)
        self.archives = Archives(
            self.store,
            self.keeper,
            self.folders,
            self.workspaces,
            run_blocking=asyncio.to_thread,
            bounds=ArchiveBounds(upload_bytes=2**20, unpacked_bytes=2**20),
        )
        self.reconciler = Reconciler(self.store, self.runtimes, self.scheduler)
        self.guard = Guard(self.store, self.runtimes, self.hub, self.owner, self.scheduler)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> FakeGateway:
        for part in (self.bus, self.store, self.objects, self.runtimes, self.scheduler, self.admission, self.keeper):
            await part.start(self._stack)
        self.host.connect(self.hub.serve)
        self._stack.push_async_callback(self.host.disconnect)
        await self.pool.forget()
        await self.reconciler.start(self._stack)
        await self.pool.start(self._stack)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # ----------------------------------------------------------------------------------------------------- short calls

    async def create(self, **options: Any) -> Session:
        """A new session."""
        return await self.service.create(self.principal, CreateSession(**options))

    async def prompt(self, session_id: str, prompt: str, **options: Any) -> Turn:
        """Queue a prompt."""
        turn, _ = await self.service.create_turn(self.principal, session_id, CreateTurn(prompt=prompt, **options))
        return turn

    async def run(self, session_id: str, prompt: str, **options: Any) -> TurnResult:
        """Queue a prompt and wait for what comes of it."""
        turn = await self.prompt(session_id, prompt, **options)
        return await self.ended(turn)

    async def ended(self, turn: Turn) -> TurnResult:
        """Wait for the end of a turn."""
        waiting = self.service.wait_for_turn(self.principal, turn.session_id, turn.id, after=0)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            return await waiting

    async def session(self, session_id: str) -> Session:
        """The session as it is now."""
        return await self.service.get(self.principal, session_id)

    async def until(self, session_id: str, status: SessionStatus) -> Session:
        """Wait until the session has this status."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (session := await self.session(session_id)).status is not status:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{session_id} is {session.status} and not {status}")
            await asyncio.sleep(0.005)
        return session

    async def log(self, session_id: str) -> list[StoredEvent]:
        """Every event of the session, the deleted ones' too while their rows are there."""
        return await self.store.read(lambda tx: tx.events.page(session_id, after=0, limit=100_000))
