"""Moves one session towards what its rows say is wanted: one short step at a time, each safe to repeat.

Nothing here remembers why it was called. A step reads the session's rows and whether its runner is connected, does the
one thing that is due, and says when it wants to look again. So the same code carries a session through its everyday
life, and through a restart of the gateway at any instant of it.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import structlog

from carrel import abc
from carrel.budgets import UNLIMITED, Allowances, accounts_of, spent
from carrel.errors import (
    BudgetReached,
    CarrelError,
    DiskFull,
    RuntimeUnavailable,
    SandboxLaunchFailed,
    SandboxLost,
    SandboxOutOfDisk,
    SandboxOutOfMemory,
    SandboxOutOfProcesses,
    TurnFailure,
    Unavailable,
)
from carrel.killpoints import reached
from carrel.model import (
    GATEWAY_ONLY,
    Failure,
    Interaction,
    NetworkPolicy,
    PermissionMode,
    PermissionRule,
    RuleScope,
    Sandbox,
    SandboxStatus,
    SandboxTemplate,
    Session,
    SessionStatus,
    StopReason,
    Turn,
    TurnStatus,
    new_id,
    utc_now,
)
from carrel.protocol.bootstrap import GATEWAY_URL
from carrel.protocol.environments import Environment, EnvironmentSpec
from carrel.protocol.link import (
    AgentFailed,
    Bind,
    Interrupt,
    SetModel,
    SetPermissionMode,
    SetPermissionRules,
    Shutdown,
    StartTurn,
)
from carrel.protocol.spec import SessionSpec
from carrel.sessions import steps, transitions
from carrel.sessions.admission import Admission
from carrel.sessions.environments import kept_environment
from carrel.sessions.hub import Hub, Link
from carrel.sessions.inheritance import Rights
from carrel.sessions.keeper import RELEASE, Keeper
from carrel.sessions.kept import forget_files
from carrel.sessions.memory import Memory
from carrel.sessions.narrowing import agents_options, with_rules
from carrel.sessions.runtimes import Runtimes

log = structlog.get_logger(__name__)

_LAUNCH_ATTEMPTS = 3
_LOOK_AGAIN_SECONDS = 1.0
_WORKSPACE_LOOK_SECONDS = 0.25
_FETCH_AGAIN_SECONDS = 2.0
_FILES_SECONDS = 1.0
_BELOW_GONE_SECONDS = 0.1
_SOON_SECONDS = 60.0
_EXCESS: dict[abc.Excess, type[TurnFailure]] = {
    abc.Excess.MEMORY: SandboxOutOfMemory,
    abc.Excess.PROCESSES: SandboxOutOfProcesses,
    abc.Excess.DISK: SandboxOutOfDisk,
}


class Folders(Protocol):
    """Where sessions' files are; `carrel.workspaces.Folders` is one."""

    def workspace(self, session: Session) -> Path:
        """Where the session's files are."""

    def within(self, session: Session) -> Path | None:
        """The last folder above the workspace that no agent can change; None where that is the workspace itself."""

    def home(self, session: Session) -> Path:
        """The agent's home."""

    def owner(self, session: Session) -> tuple[int, int] | None:
        """The user and group that the files of this session belong to; None for our own."""

    def make(self, session: Session) -> None:
        """Make both, if they are not there."""

    def remove(self, session_id: str) -> None:
        """Remove what is the session's alone, and all that is in it."""


async def _nothing_exposed(environment: EnvironmentSpec) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class OwnerOptions:
    """How long things may take, and what every agent is given."""

    idle_timeout_seconds: float = 600.0
    launch_timeout_seconds: float = 60.0
    reconnect_window_seconds: float = 300.0
    reconnect_margin_seconds: float = 10.0
    shutdown_grace_seconds: float = 15.0
    default_model: str | None = None
    mcp_servers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """For every session's agent. A session's own win by name, and only they are part of its row."""
    defaults: SessionSpec = field(default_factory=SessionSpec)
    """The options of agents whose session and environment do not name them."""
    exposed: Callable[[EnvironmentSpec], Awaitable[Mapping[str, str]]] = _nothing_exposed
    """The secrets that agents of an environment are handed, by their variables. Raises SecretMissing."""
    defer_after_seconds: float = 30.0
    live_hold_seconds: float = 3600.0
    allowances: Allowances = UNLIMITED
    network: NetworkPolicy = GATEWAY_ONLY
    """Of sandboxes whose template names none."""


class Owner:
    """Takes the steps of every session of this gateway."""

    def __init__(
        self,
        store: abc.Store,
        runtimes: Runtimes,
        folders: Folders,
        hub: Hub,
        admission: Admission,
        *,
        check_model: Callable[[str], object],
        run_blocking: Callable[..., Any],
        options: OwnerOptions,
        keeper: Keeper,
        memory: Memory | None = None,
    ) -> None:
        """Make the owner.

        Args:
            store: the rows.
            runtimes: where sandboxes are made.
            folders: where files are.
            hub: who is connected.
            admission: says when a turn may go to work.
            check_model: raises a CarrelError while no turn of this environment could reach the model.
            run_blocking: runs a function that waits for the disk in another thread.
            options: time limits.
            keeper: keeps files, and puts them back.
            memory: asked before a sandbox is launched; None: there is always room.
        """
        self.memory = memory or Memory()
        self._store = store
        self._runtimes = runtimes
        self._folders = folders
        self._hub = hub
        self.admission = admission
        self._check_model = check_model
        self._run_blocking = run_blocking
        self._options = options
        self.heard_of_pool: Callable[[Session, Failure | None], None] = lambda session, failure: None
        """Told of each session of a warm pool when its agent is connected (None), and why one is lost."""
        self._keeper = keeper
        self._launches: dict[str, int] = {}
        self._missed_since: dict[str, datetime] = {}

    @property
    def draining(self) -> bool:
        """The server is shutting down: no turn is started any more."""
        return self._hub.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._hub.draining = value

    async def step(self, session_id: str) -> float | None:
        """Do what is due for this session. Answers in how many seconds to look again, or None."""
        try:
            return await self._step(session_id)
        except RuntimeUnavailable as error:
            # What runs there goes on, and what is to end there ends when it is back.
            log.warning("runtime.unavailable", session=session_id, detail=error.operator_detail)
            return _LOOK_AGAIN_SECONDS

    async def _step(self, session_id: str) -> float | None:
        view = await self._store.read(lambda tx: steps.view(tx, session_id))
        _name_turn(view.live or next(iter(view.queued), None))
        if view.session is None:
            return await self._remove(session_id, view)
        session = view.session
        # First of all, so that whoever has asked for its end and waits for one step finds it ended.
        if view.sandbox is not None and view.sandbox.status is SandboxStatus.ENDING:
            await self._end(view.sandbox, gracefully=True)
            return 0.0
        if session.restoring is not None and view.sandbox is None:
            await self._keeper.put_back(session)
            return 0.0
        if await self._expire(session, view.queued) or await self._expire_asked(view.asked):
            return 0.0
        if any(each.remind_at is not None and each.remind_at <= utc_now() for each in view.asked):
            await self._store.write(lambda tx: steps.remind(tx, session_id))
            return 0.0
        if session.expires_at is not None and session.expires_at <= utc_now() and _unused(view):
            for below in await self._store.write(lambda tx: steps.mark_deleted(tx, session_id)):
                self._hub.poke(below.id)
            return 0.0
        pause = await self._advance(session, view)
        if pause is None and view.sandbox is None and view.live is not None:
            return _within(_SOON_SECONDS, _sooner(pause, [*view.queued, *view.asked]))
        return _sooner(pause, [*view.queued, *view.asked])

    async def _advance(self, session: Session, view: steps.View) -> float | None:
        if session.reserved is not None and steps.spoilt(session, view.sandbox):
            await self._discard(session)
            return 0.0
        if session.status in (SessionStatus.STOPPED, SessionStatus.FAILED):
            return None
        if view.sandbox is None:
            return await self._without_sandbox(session, view)
        return await self._with_sandbox(session, view, view.sandbox)

    # -------------------------------------------------------------------------------------------------- no sandbox

    async def _without_sandbox(self, session: Session, view: steps.View) -> float | None:
        live, call = view.live, view.open_call
        if live is not None and call is not None:
            left = None if live.deadline_at is None else (live.deadline_at - utc_now()).total_seconds()
            if live.interrupt_reason is not None or (left is not None and left <= 0):
                await self._store.write(lambda tx: steps.end_waiting(tx, session.id, live.id, StopReason.TIMEOUT))
                return 0.0
            if live.status is TurnStatus.WAITING:
                # Whatever is due later is found by the reconciler: thousands that wait have no timers here.
                return left if left is not None and left < _SOON_SECONDS else None
        if live is not None and not steps.goes_on(live, call):
            await self._lose(session.id, None)
            return 0.0
        if view.live is None and not view.queued and session.reserved is None:
            if session.status is not SessionStatus.IDLE:
                await self._store.write(lambda tx: steps.settle(tx, session.id))
            self._launches.pop(session.id, None)
            return None
        if self.draining:
            return None
        if (
            view.live is None
            and view.queued
            and await self._store.read(lambda tx: self._spent(tx, session, view.queued[0]) is not None)
        ):
            await self._store.write(lambda tx: self._fail_if_spent(tx, view.queued[0].id))
            return 0.0
        try:
            self._check_model(session.environment)
        except CarrelError as error:
            await self._fail_all(session.id, error, stop_reason=StopReason.ERROR)
            return 0.0
        if not self.memory.admit(session.id):
            return _LOOK_AGAIN_SECONDS
        return await self._launch(session, view.environment)

    def network_given(self, template: SandboxTemplate | None = None) -> NetworkPolicy:
        """What a sandbox may reach: as its template says, or else the settings."""
        given = template.network if template is not None else None
        return given or self._options.network

    def network(self, session: Session, template: SandboxTemplate | None = None) -> NetworkPolicy:
        """What the session's next sandbox may reach: what it is given, narrowed by its own wish."""
        return self.network_given(template).narrowed(SessionSpec.model_validate(session.spec).network)

    async def _launch(self, session: Session, environment: Environment | None) -> float | None:
        if self._launches.get(session.id, 0) >= _LAUNCH_ATTEMPTS:
            await self._start_failed(session.id, SandboxLaunchFailed(operator_detail="lost before it was connected"))
            return 0.0
        try:
            if environment is None:
                raise SandboxLaunchFailed(operator_detail="the version of its environment is gone")
            runtime = self._runtimes.named(environment.spec.runtime)
            await self._options.exposed(environment.spec)
        except SandboxLaunchFailed as error:
            log.error("sandbox.launch_failed", session=session.id, detail=error.operator_detail)
            await self._start_failed(session.id, error)
            return 0.0
        try:
            if not await self._keeper.ensured(session, _FILES_SECONDS):
                self.memory.release(session.id)
                return _LOOK_AGAIN_SECONDS
            await self._run_blocking(self._folders.make, session)
        except Unavailable as error:
            # Its files are lost here and cannot be fetched now: an agent that began without them would be worse.
            log.warning("workspace.not_restored", session=session.id, code=error.code, detail=error.operator_detail)
            self.memory.release(session.id)
            return _FETCH_AGAIN_SECONDS
        except CarrelError as error:
            # A user's directory that is gone, or that an agent has put something else in the place of; or no clone.
            await self._fail_all(session.id, error, stop_reason=StopReason.ERROR)
            return 0.0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            await self._fail_all(session.id, DiskFull(), stop_reason=StopReason.ERROR)
            return 0.0
        template = environment.spec.sandbox
        within = self._folders.within(session)
        spec = abc.LaunchSpec(
            sandbox_id=new_id(),
            session_id=session.id,
            session_number=session.number,
            generation=session.generation + 1,
            link_token=secrets.token_urlsafe(32),
            agent_token="cak-" + secrets.token_urlsafe(32),
            workspace=str(self._folders.workspace(session)),
            workspace_within=None if within is None else str(within),
            home=str(self._folders.home(session)),
            owner=self._folders.owner(session),
            template=template.model_copy(update={"network": self.network(session, template)}),
            mcp=bool(environment.spec.behind_gateway),
        )
        stored = await self._store.write(lambda tx: steps.launching(tx, spec, runtime.name, self.admission))
        if stored is not steps.Launching.STORED:
            self.memory.release(session.id)
            if stored is steps.Launching.OCCUPIED:
                return await self._await_workspace(session)
            return 0.0 if stored is steps.Launching.OUTDATED else None
        self._launches[session.id] = self._launches.get(session.id, 0) + 1
        reached("sandbox.stored")
        try:
            async for state in runtime.launch(spec):
                await self._store.write_surely(lambda tx, s=state: tx.sandboxes.update(spec.sandbox_id, state=s))  # type: ignore[misc]
                reached("sandbox.checkpoint")
            reached("sandbox.forked")
        except (DiskFull, RuntimeUnavailable) as error:
            # Neither is the session's fault: its next prompt may find it over.
            log.error("sandbox.not_launched", session=session.id, code=error.code, detail=error.operator_detail)
            await self._store.write(lambda tx: tx.sandboxes.update(spec.sandbox_id, status=SandboxStatus.ENDING))
            await self._fail_all(session.id, type(error)(), stop_reason=StopReason.ERROR)
            return 0.0
        except SandboxLaunchFailed as error:
            log.error("sandbox.launch_failed", session=session.id, detail=error.operator_detail)
            await self._store.write(lambda tx: tx.sandboxes.update(spec.sandbox_id, status=SandboxStatus.ENDING))
            await self._start_failed(session.id, error)
            return 0.0
        return self._options.launch_timeout_seconds

    async def _await_workspace(self, session: Session) -> float:
        """Others are in the session's workspace: whoever rests in it makes room; for those at work, wait."""
        for sandbox in await self._store.read(lambda tx: steps.occupants(tx, session)):
            link = self._hub.link(sandbox.id)
            rests = link is not None and link.ready and link.background_tasks == 0
            if rests and await self.free(sandbox.session_id, sandbox.id):
                log.info("sandbox.freed", session=sandbox.session_id, sandbox=sandbox.id, why="workspace")
            self._hub.poke(sandbox.session_id)
        return _WORKSPACE_LOOK_SECONDS

    # ------------------------------------------------------------------------------------------------ with a sandbox

    async def _with_sandbox(self, session: Session, view: steps.View, sandbox: Sandbox) -> float | None:
        if (
            view.live is None
            and steps.outdated(session, sandbox)
            and await self._store.write(lambda tx: steps.replace(tx, session.id, sandbox.id))
        ):
            return 0.0
        link = self._hub.link(sandbox.id)
        failed = self._hub.take_failure(sandbox.id)
        if failed is not None:
            await self._agent_failed(session, sandbox, failed)
            return 0.0
        if link is None or link.ended:
            return await self._unconnected(session, sandbox)
        self._missed_since.pop(sandbox.id, None)
        if not link.bound:
            await self._bind(session, view, sandbox, link)
            return self._options.launch_timeout_seconds
        if not link.ready:
            return await self._late(session, sandbox) or _LOOK_AGAIN_SECONDS
        if not link.up_to_date:
            await self.apply_live_options(session.id)
        self._launches.pop(session.id, None)
        if view.live is not None:
            return await self._tend(session, view.live, sandbox, link)
        if view.queued and not self.draining:
            if not await self._lives(link):
                await self._lose(session.id, sandbox)
                return 0.0
            return 0.0 if await self._start(view.queued[0], link) else _LOOK_AGAIN_SECONDS
        return await self._rest(session, view, sandbox, link)

    async def _unconnected(self, session: Session, sandbox: Sandbox) -> float | None:
        """No link: the runner is still starting, is on its way back, or is gone."""
        if not await self._runtimes.alive(sandbox.runtime, sandbox.id, sandbox.state):
            await self._lose(session.id, sandbox)
            return 0.0
        if sandbox.status is SandboxStatus.LAUNCHING:
            return await self._late(session, sandbox) or _LOOK_AGAIN_SECONDS
        window = self._options.reconnect_window_seconds + self._options.reconnect_margin_seconds
        if self._away(sandbox.id) > window:
            await self._lose(session.id, sandbox)
            return 0.0
        return _LOOK_AGAIN_SECONDS

    def _away(self, sandbox_id: str) -> float:
        """For how many seconds this gateway has missed the sandbox."""
        since = self._missed_since.setdefault(sandbox_id, utc_now())
        return (utc_now() - since).total_seconds()

    async def _late(self, session: Session, sandbox: Sandbox) -> float | None:
        """A sandbox that should have connected its agent by now has failed. None while it has time."""
        age = (utc_now() - sandbox.created_at).total_seconds()
        if age < self._options.launch_timeout_seconds:
            return None
        log.error("sandbox.late", session=session.id, sandbox=sandbox.id, logs=await self._logs(sandbox))
        await self._lose(session.id, sandbox)
        return 0.001

    async def _logs(self, sandbox: Sandbox) -> str:
        if not sandbox.state:
            return ""
        return "\n".join([line async for line in self._runtimes.named(sandbox.runtime).logs(sandbox.state)][-20:])

    async def _bind(self, session: Session, view: steps.View, sandbox: Sandbox, link: Link) -> None:
        spec, mode = await self.options_of(session, sandbox.runtime)
        try:
            exposed = await self._options.exposed(view.environment.spec) if view.environment is not None else {}
        except SandboxLaunchFailed as error:  # it was there when the sandbox was launched
            log.error("sandbox.bind_failed", session=session.id, detail=error.operator_detail)
            await self._store.write(lambda tx: tx.sandboxes.update(sandbox.id, status=SandboxStatus.ENDING))
            await self._start_failed(session.id, error)
            return
        if exposed:
            # They go to the runner by this frame alone, which nobody stores.
            spec = spec.model_copy(update={"env_vars": {**(spec.env_vars or {}), **exposed}})
        link.bound = True
        link.live_options, link.rules = (spec.model, mode), spec.permission_rules()
        await link.tell(
            Bind(
                id=new_id(),
                session_id=session.id,
                spec=spec,
                permission_mode=mode,
                tools=bool(spec.session_tools),
                agent_session_id=session.agent_session_id,
                reconcile=sandbox.generation > 1,
                resume_turn=view.live.id if view.live is not None else None,
                asked=await self._store.read(lambda tx: steps.bind_asked(tx, session.id)),
                defer_after_seconds=(
                    self._options.defer_after_seconds if spec.defer_after_seconds is None else spec.defer_after_seconds
                ),
                live_hold_seconds=self._options.live_hold_seconds,
                trace=_trace(view.live or next(iter(view.queued), None)),
            )
        )
        reached("bind.sent")

    def _agent_options(
        self, session: Session, environment: Environment | None, *, isolated: bool
    ) -> tuple[SessionSpec, PermissionMode]:
        """What the session's agent is set up with."""
        spec = SessionSpec.model_validate(session.spec)
        if environment is not None and environment.version > 0:
            # Without one, the defaults stand in the session's row, as they were when it was made.
            spec = _by_gateway(agents_options(environment.spec, spec, self._options.defaults), environment.spec)
        if self._options.mcp_servers:
            servers = dict(self._options.mcp_servers) | (spec.mcp_servers or {})
            spec = spec.model_copy(update={"mcp_servers": servers})
        if spec.model is None and self._options.default_model is not None:
            spec = spec.model_copy(update={"model": self._options.default_model})
        return spec, spec.permission_mode or (PermissionMode.BYPASS if isolated else PermissionMode.DEFAULT)

    def rights(self, session: Session, environment: Environment) -> Rights:
        """What the session's agent may do in this version of an environment.

        Raises:
            SandboxLaunchFailed: there is no such runtime as the environment names.
        """
        isolated = self._runtimes.named(environment.spec.runtime).isolated
        spec, mode = self._agent_options(session, environment, isolated=isolated)
        network = self.network(session, environment.spec.sandbox)
        return Rights(environment=environment, spec=spec, permission_mode=mode, network=network)

    async def apply_live_options(self, session_id: str) -> None:
        """Have the session's agent, if it is connected, use the model and the permission mode that the session asks for.

        What does not arrive is told again when its runner is back, which says what it was told last.
        """
        link = self._hub.bound_link(session_id)
        if link is None:
            return
        # Read when it is one's turn to tell: whoever had read before a change would take it back.
        async with link.telling:
            session = await self._store.read(lambda tx: tx.sessions.get(session_id))
            if session is None:
                return
            spec, mode = await self.options_of(session, link.runtime)
            told, link.live_options = link.live_options, (spec.model, mode)
            link.up_to_date = True
            if told[0] != spec.model:
                await link.tell(SetModel(id=new_id(), model=spec.model))
            if told[1] != mode:
                await link.tell(SetPermissionMode(id=new_id(), mode=mode))
            rules = spec.permission_rules()
            if link.rules != rules:
                link.rules = rules
                await link.tell(SetPermissionRules(id=new_id(), rules=rules))

    async def apply_rules(self) -> None:
        """Have every connected agent know the rules that hold for it now."""
        for session_id in self._hub.sessions():
            await self.apply_live_options(session_id)

    async def options_of(self, session: Session, runtime: str | None = None) -> tuple[SessionSpec, PermissionMode]:
        """What an agent of the session is set up with, rules that people have written included.

        Args:
            session: the session.
            runtime: where the agent runs; None: where the next one would.
        """

        def work(tx: abc.Transaction) -> tuple[Environment | None, Sequence[PermissionRule]]:
            return kept_environment(tx, session), self.rules_of(tx, session)

        environment, written = await self._store.read(work)
        named = runtime or (environment.spec.runtime if environment is not None else None)
        isolated = self._runtimes.named(named).isolated
        spec, mode = self._agent_options(session, environment, isolated=isolated)
        return with_rules(environment.spec if environment is not None else EnvironmentSpec(), spec, written), mode

    def rules_of(self, tx: abc.Transaction, session: Session) -> Sequence[PermissionRule]:
        """The rules that people have written and that hold for the session."""
        targets = [
            (RuleScope.ENVIRONMENT, session.environment),
            (RuleScope.USER, session.owner),
            (RuleScope.SESSION, session.id),
        ]
        if session.workspace_id is not None:
            targets.append((RuleScope.WORKSPACE, session.workspace_id))
        return tx.rules.holding(targets)

    async def idle_agent(self, session_id: str) -> Link | None:
        """The session's agent, if a turn could go to it at once."""
        link = None if self.draining else self._hub.ready_link(session_id)
        return link if link is not None and link.up_to_date and await self._lives(link) else None

    async def _lives(self, link: Link) -> bool:
        """Whether the runner is there: a prompt sent to one that has just died is not sent again."""
        return await self._runtimes.alive(link.runtime, link.sandbox_id, link.state)

    async def _start(self, turn: Turn, link: Link) -> bool:
        started = await self._store.write(lambda tx: self.start_if_free(tx, turn.id, link.sandbox_id))
        reached("turn.started")
        if started is not None:
            await self.hand_over(started, link)
        return started is not None

    def start_if_free(self, tx: abc.Transaction, turn_id: str, sandbox_id: str) -> Turn | None:
        """Start the turn in this sandbox, if it is the session's next one and the sandbox is free for it.

        Where a budget has nothing left, the turn fails instead.
        """
        turn = tx.turns.get(turn_id)
        session = tx.sessions.get(turn.session_id) if turn is not None else None
        if turn is None or session is None or session.status is not SessionStatus.READY:
            return None
        waiting, sandbox = tx.turns.queued(session.id), tx.sandboxes.current(session.id)
        if not waiting or waiting[0].id != turn.id:
            return None
        if sandbox is None or sandbox.id != sandbox_id or sandbox.status is not SandboxStatus.LIVE:
            return None
        if steps.outdated(session, sandbox):
            return None
        if self._keeper.holds(session.id):
            return None
        if self._fail_if_spent(tx, turn.id) or not self.admission.admits(tx, turn.id):
            return None
        return transitions.start_turn(tx, session, turn, sandbox_id)

    def _spent(self, tx: abc.Transaction, session: Session, turn: Turn) -> BudgetReached | None:
        return spent(
            accounts_of(tx, self._options.allowances, user_id=session.owner, session=session, turn=turn, now=utc_now())
        )

    def _fail_if_spent(self, tx: abc.Transaction, turn_id: str) -> bool:
        """Fail a queued turn for which a budget has nothing left, and say so."""
        turn = tx.turns.get(turn_id)
        session = tx.sessions.get(turn.session_id) if turn is not None else None
        if turn is None or session is None or turn.status is not TurnStatus.QUEUED:
            return False
        error = self._spent(tx, session, turn)
        if error is None:
            return False
        failure = Failure(code=error.code, message=error.message)
        transitions.fail_turn(tx, session, turn, failure, StopReason.BUDGET_REACHED)
        tx.sessions.update(session.id, stop_reason=StopReason.BUDGET_REACHED)
        return True

    async def hand_over(self, turn: Turn, link: Link) -> None:
        """Send the agent a turn that has been started. What does not arrive is sent again by a later step."""
        link.last_turn = turn.id
        if (model := turn.options.get("model")) is not None:
            link.live_options = (model, link.live_options[1])
        await link.tell(
            StartTurn(
                id=new_id(),
                turn_id=turn.id,
                content=turn.content,
                max_turns=turn.options.get("max_turns"),
                model=model,
            )
        )

    async def _tend(self, session: Session, turn: Turn, sandbox: Sandbox, link: Link) -> float | None:
        """A turn is at work: hand it over if it has not arrived, interrupt it if it should end."""
        if turn.sandbox_id != sandbox.id:
            await self._store.write(lambda tx: steps.continue_turn(tx, session.id, turn.id, sandbox))
            return 0.0
        if turn.content is not None and link.last_turn != turn.id:
            await self.hand_over(turn, link)
        reason = turn.interrupt_reason
        if reason is None and turn.deadline_at is not None:
            left = (turn.deadline_at - utc_now()).total_seconds()
            if left > 0:
                return left
            reason = StopReason.TIMEOUT
        if reason is not None and link.interrupted_turn != turn.id:
            link.interrupted_turn = turn.id
            await link.tell(Interrupt(id=new_id(), turn_id=turn.id, reason=reason))
        return None

    async def _rest(self, session: Session, view: steps.View, sandbox: Sandbox, link: Link) -> float | None:
        """Nothing to do: free the process once it has been idle for long enough."""
        if session.reserved is not None:
            self.heard_of_pool(session, None)
            return None
        given = view.environment.spec.idle_timeout_seconds if view.environment is not None else None
        idle_timeout_seconds = given or self._options.idle_timeout_seconds
        if link.background_tasks > 0 or session.status is not SessionStatus.READY:
            return idle_timeout_seconds
        left = idle_timeout_seconds - (utc_now() - session.last_active_at).total_seconds()
        if left > 0 and not view.stopped:
            return left
        await self.free(session.id, sandbox.id)
        return 0.0

    async def free(self, session_id: str, sandbox_id: str) -> bool:
        """Have a resting session's sandbox ended by the next step. False where a turn was quicker."""
        freed = await self._store.write(lambda tx: steps.evict(tx, session_id, sandbox_id, self.admission))
        reached("evict.marked")
        return freed

    # -------------------------------------------------------------------------------------------------------- endings

    async def _agent_failed(self, session: Session, sandbox: Sandbox, said: AgentFailed) -> None:
        log.error("agent.failed", session=session.id, code=said.failure.code, detail=said.operator_detail)
        if session.status is not SessionStatus.STARTING or said.failure.code == SandboxLost.code:
            await self._lose(session.id, sandbox, said.failure)
            return
        await self._store.write(lambda tx: tx.sandboxes.update(sandbox.id, status=SandboxStatus.ENDING))
        await self._start_failed(session.id, SandboxLaunchFailed(said.failure.message), said.failure)

    async def _lose(self, session_id: str, sandbox: Sandbox | None, failure: Failure | None = None) -> None:
        """The sandbox is gone, or is taken for gone: end what is left of it, then say so in the rows."""
        if sandbox is not None:
            failure = await self._reason(sandbox, failure)
            log.warning("sandbox.lost", session=session_id, sandbox=sandbox.id, why=failure and failure.code)
            await self._end(sandbox, gracefully=False)
        await self._store.write(lambda tx: steps.lose(tx, session_id, failure))

    async def _reason(self, sandbox: Sandbox, told: Failure | None) -> Failure | None:
        """Why the sandbox is lost. Its runner sees an agent that died; the host may know what it died of."""
        if told is not None and told.code != SandboxLost.code:
            return told
        usage = (await self._runtimes.measure([sandbox])).get(sandbox.id)
        return told if usage is None or usage.excess is None else excess_failure(usage.excess)

    async def _end(self, sandbox: Sandbox, *, gracefully: bool) -> None:
        link = self._hub.link(sandbox.id)
        if gracefully and link is not None:
            await link.tell(Shutdown(id=new_id()))
            await self._gone_within(sandbox, self._options.shutdown_grace_seconds)
        await self._runtimes.terminate(sandbox)
        self._missed_since.pop(sandbox.id, None)
        self._hub.take_failure(sandbox.id)  # nobody asks for it any more
        await self._store.write(lambda tx: _gone(tx, sandbox))
        self._keeper.wake(sandbox.session_id)

    async def _gone_within(self, sandbox: Sandbox, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while await self._runtimes.alive(sandbox.runtime, sandbox.id, sandbox.state):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("sandbox.slow_to_end", sandbox=sandbox.id)

    async def _start_failed(self, session_id: str, error: CarrelError, failure: Failure | None = None) -> None:
        self._launches.pop(session_id, None)
        told = failure or Failure(code=error.code, message=error.message)
        await self._store.write(lambda tx: steps.could_not_start(tx, session_id, told))

    async def _fail_all(self, session_id: str, error: CarrelError, *, stop_reason: StopReason) -> None:
        failure = Failure(code=error.code, message=error.message)
        await self._store.write(lambda tx: steps.fail_waiting(tx, session_id, failure, stop_reason))

    async def _discard(self, session: Session) -> None:
        """A session of a warm pool has lost its sandbox, or got none: the pool makes another."""
        lost = SandboxLost()
        await self._store.write(lambda tx: steps.discard(tx, session.id))
        self.memory.release(session.id)
        self.heard_of_pool(session, session.error or Failure(code=lost.code, message=lost.message))

    async def _expire(self, session: Session, queued: list[Turn]) -> bool:
        now = utc_now()
        late = [turn for turn in queued if turn.expires_at is not None and turn.expires_at <= now]
        if late:
            await self._store.write(lambda tx: steps.expire(tx, session.id, [turn.id for turn in late]))
        return bool(late)

    async def _expire_asked(self, asked: list[Interaction]) -> bool:
        now = utc_now()
        late = [each.id for each in asked if each.expires_at is not None and each.expires_at <= now]
        expired = await self._store.write(lambda tx: steps.expire_asked(tx, late)) if late else []
        for interaction in expired:
            await self._hub.tell_answer(interaction)
        return bool(late)

    async def _remove(self, session_id: str, view: steps.View) -> float | None:
        """The session is deleted: end its sandbox, remove its files, then its rows; those below it go before it."""
        if not view.deleting:
            return None
        if view.sandbox is not None:
            await self._end(view.sandbox, gracefully=False)
        if left := await self._store.read(lambda tx: list(tx.trees.left(session_id))):
            # They may work in its folder.
            for below in left:
                self._hub.poke(below)
            return _BELOW_GONE_SECONDS
        await self._keeper.forget(session_id)
        await self._run_blocking(self._folders.remove, session_id)
        reached("delete.files_gone")
        await self._store.write(lambda tx: _removed(tx, session_id))
        self._keeper.doomed()
        self._launches.pop(session_id, None)
        return None


# --------------------------------------------------------------------------------------------------- the transactions


def _gone(tx: abc.Transaction, sandbox: Sandbox) -> None:
    """Its files are still to be kept: who has worked there since the last turn ended may have changed them."""
    session = tx.sessions.get(sandbox.session_id)
    tx.sandboxes.update(sandbox.id, status=SandboxStatus.GONE, ended_at=utc_now())
    transitions.withdraw_detached(tx, sandbox.session_id)
    if session is not None and session.snapshot_due is None and session.reserved is None:
        tx.sessions.update(session.id, snapshot_due=RELEASE)


def _removed(tx: abc.Transaction, session_id: str) -> None:
    forget_files(tx, session_id)
    tx.sessions.remove(session_id)


def _by_gateway(spec: SessionSpec, environment: EnvironmentSpec) -> SessionSpec:
    """The same options, with the servers that the gateway answers for where an agent finds them."""
    theirs = {name: {"type": "http", "url": f"{GATEWAY_URL}/mcp/{name}"} for name in environment.behind_gateway}
    return spec.model_copy(update={"mcp_servers": {**(spec.mcp_servers or {}), **theirs}}) if theirs else spec


def _name_turn(turn: Turn | None) -> None:
    """Have the lines of this step's log name the turn it is about."""
    if turn is None:
        structlog.contextvars.unbind_contextvars("turn_id")
        return
    structlog.contextvars.bind_contextvars(turn_id=turn.id)


def _trace(turn: Turn | None) -> dict[str, str]:
    """The W3C context of a turn, as whoever works for it is told; empty where nobody traces."""
    stored = turn.options.get("trace", {}) if turn is not None else {}
    return {name: stored[name] for name in ("traceparent", "tracestate") if name in stored}


def excess_failure(excess: abc.Excess) -> Failure:
    """What the user is told of a sandbox that was ended because it took too much."""
    error = _EXCESS[excess]()
    return Failure(code=error.code, message=error.message)


def _unused(view: steps.View) -> bool:
    return view.live is None and not view.queued


def _sooner(pause: float | None, waiting: Sequence[Turn | Interaction]) -> float | None:
    """The pause, or the time until the first of these expires where that is less."""
    due = [each.expires_at for each in waiting] + [each.remind_at for each in waiting if isinstance(each, Interaction)]
    left = [(at - utc_now()).total_seconds() for at in due if at is not None]
    return min([max(0.0, seconds) for seconds in left] + ([] if pause is None else [pause]), default=None)


def _within(seconds: float, pause: float | None) -> float | None:
    return pause if pause is not None and pause < seconds else None
