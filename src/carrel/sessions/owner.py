"""Moves one session towards what its rows say is wanted: one short step at a time, each safe to repeat.

Nothing here remembers why it was called. A step reads the session's rows and whether its runner is connected, does the
one thing that is due, and says when it wants to look again. So the same code carries a session through its everyday
life, and through a restart of the gateway at any instant of it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import structlog

from carrel import abc
from carrel.errors import CarrelError, SandboxLaunchFailed, SandboxLost
from carrel.killpoints import reached
from carrel.model import (
    Failure,
    OnSandboxLost,
    PermissionMode,
    Sandbox,
    SandboxStatus,
    Session,
    SessionStatus,
    StopReason,
    Turn,
    TurnStatus,
    new_id,
    utc_now,
)
from carrel.protocol.events import SessionDeleted
from carrel.protocol.link import AgentFailed, Bind, Interrupt, Shutdown, StartTurn
from carrel.protocol.spec import SessionSpec
from carrel.sessions import transitions
from carrel.sessions.hub import Hub, Link, token_hash

log = structlog.get_logger(__name__)

_LAUNCH_ATTEMPTS = 3
_LOOK_AGAIN_SECONDS = 1.0


class Folders(Protocol):
    """Where sessions' files are; `carrel.workspaces.Folders` is one."""

    def paths(self, session_id: str) -> tuple[str, str]:
        """The workspace and the home."""

    def owner(self, number: int) -> tuple[int, int] | None:
        """The user and group that the files of this session belong to; None for our own."""

    def make(self, session_id: str, number: int) -> None:
        """Make both, if they are not there."""

    def remove(self, session_id: str) -> None:
        """Remove both, and all that is in them."""


@dataclass(frozen=True, kw_only=True)
class OwnerOptions:
    """How long things may take."""

    idle_timeout_seconds: float = 600.0
    launch_timeout_seconds: float = 60.0
    reconnect_window_seconds: float = 300.0
    reconnect_margin_seconds: float = 10.0
    shutdown_grace_seconds: float = 15.0
    default_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class _View:
    """A session's rows, as one step sees them."""

    session: Session | None
    deleting: bool
    sandbox: Sandbox | None
    live: Turn | None
    queued: list[Turn]


class Owner:
    """Takes the steps of every session of this gateway."""

    def __init__(
        self,
        store: abc.Store,
        runtime: abc.Runtime,
        folders: Folders,
        hub: Hub,
        *,
        check_model: Callable[[], object],
        run_blocking: Callable[..., Any],
        options: OwnerOptions,
    ) -> None:
        """Make the owner.

        Args:
            store: the rows.
            runtime: where sandboxes are made.
            folders: where files are.
            hub: who is connected.
            check_model: raises a CarrelError while no turn could reach the model.
            run_blocking: runs a function that waits for the disk in another thread.
            options: time limits.
        """
        self._store = store
        self._runtime = runtime
        self._folders = folders
        self._hub = hub
        self._check_model = check_model
        self._run_blocking = run_blocking
        self._options = options
        self._launches: dict[str, int] = {}
        self._missed_since: dict[str, datetime] = {}
        self.draining = False

    async def step(self, session_id: str) -> float | None:
        """Do what is due for this session. Answers in how many seconds to look again, or None."""
        view = await self._store.read(lambda tx: _view(tx, session_id))
        if view.session is None:
            await self._remove(session_id, view)
            return None
        session = view.session
        # First of all, so that whoever has asked for its end and waits for one step finds it ended.
        if view.sandbox is not None and view.sandbox.status is SandboxStatus.ENDING:
            await self._end(view.sandbox, gracefully=True)
            return 0.0
        if await self._expire(session, view.queued):
            return 0.0
        if session.expires_at is not None and session.expires_at <= utc_now() and _unused(view):
            await self._store.write(lambda tx: mark_deleted(tx, session_id))
            return 0.0
        return _sooner(await self._advance(session, view), view.queued)

    async def _advance(self, session: Session, view: _View) -> float | None:
        if session.status in (SessionStatus.STOPPED, SessionStatus.FAILED):
            return None
        if view.sandbox is None:
            return await self._without_sandbox(session, view)
        return await self._with_sandbox(session, view, view.sandbox)

    # -------------------------------------------------------------------------------------------------- no sandbox

    async def _without_sandbox(self, session: Session, view: _View) -> float | None:
        if view.live is not None and not _goes_on(view.live):
            await self._lose(session.id, None)
            return 0.0
        if view.live is None and not view.queued:
            if session.status is not SessionStatus.IDLE:
                await self._store.write(lambda tx: _settle(tx, session.id))
            self._launches.pop(session.id, None)
            return None
        if self.draining:
            return None
        try:
            self._check_model()
        except CarrelError as error:
            await self._fail_all(session.id, error, stop_reason=StopReason.ERROR)
            return 0.0
        return await self._launch(session)

    async def _launch(self, session: Session) -> float | None:
        attempt = self._launches[session.id] = self._launches.get(session.id, 0) + 1
        if attempt > _LAUNCH_ATTEMPTS:
            await self._start_failed(session.id, SandboxLaunchFailed(operator_detail="lost before it was connected"))
            return 0.0
        await self._run_blocking(self._folders.make, session.id, session.number)
        workspace, home = self._folders.paths(session.id)
        spec = abc.LaunchSpec(
            sandbox_id=new_id(),
            session_id=session.id,
            session_number=session.number,
            generation=session.generation + 1,
            link_token=secrets.token_urlsafe(32),
            agent_token="cak-" + secrets.token_urlsafe(32),
            workspace=workspace,
            home=home,
            owner=self._folders.owner(session.number),
        )
        if not await self._store.write(lambda tx: _launching(tx, spec, self._runtime.name)):
            return 0.0
        reached("sandbox.stored")
        try:
            async for state in self._runtime.launch(spec):
                await self._store.write(lambda tx, s=state: tx.sandboxes.update(spec.sandbox_id, state=s))  # type: ignore[misc]
            reached("sandbox.forked")
        except SandboxLaunchFailed as error:
            log.error("sandbox.launch_failed", session=session.id, detail=error.operator_detail)
            await self._store.write(lambda tx: tx.sandboxes.update(spec.sandbox_id, status=SandboxStatus.ENDING))
            await self._start_failed(session.id, error)
            return 0.0
        return self._options.launch_timeout_seconds

    # ------------------------------------------------------------------------------------------------ with a sandbox

    async def _with_sandbox(self, session: Session, view: _View, sandbox: Sandbox) -> float | None:
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
        self._launches.pop(session.id, None)
        if view.live is not None:
            return await self._tend(session, view.live, sandbox, link)
        if view.queued and not self.draining:
            if not await self._lives(link):
                await self._lose(session.id, sandbox)
            else:
                await self._start(view.queued[0], link)
            return 0.0
        return await self._rest(session, sandbox, link)

    async def _unconnected(self, session: Session, sandbox: Sandbox) -> float | None:
        """No link: the runner is still starting, is on its way back, or is gone."""
        alive = (await self._runtime.probe({sandbox.id: sandbox.state}))[sandbox.id]
        if not alive and (sandbox.status is SandboxStatus.LIVE or "pid" in sandbox.state):
            await self._lose(session.id, sandbox)
            return 0.0
        if not alive and not sandbox.state:
            # Its row was stored, and the gateway ended before anything was started.
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
        if "folder" not in sandbox.state:
            return ""
        return "\n".join([line async for line in self._runtime.logs(sandbox.state)][-20:])

    async def _bind(self, session: Session, view: _View, sandbox: Sandbox, link: Link) -> None:
        spec = SessionSpec.model_validate(session.spec)
        if spec.model is None and self._options.default_model is not None:
            spec = spec.model_copy(update={"model": self._options.default_model})
        mode = spec.permission_mode or (PermissionMode.BYPASS if self._runtime.isolated else PermissionMode.DEFAULT)
        link.bound = True
        await link.tell(
            Bind(
                id=new_id(),
                session_id=session.id,
                spec=spec,
                permission_mode=mode,
                agent_session_id=session.agent_session_id,
                reconcile=sandbox.generation > 1,
                resume_turn=view.live.id if view.live is not None else None,
            )
        )
        reached("bind.sent")

    async def idle_agent(self, session_id: str) -> Link | None:
        """The session's agent, if a turn could go to it at once."""
        link = None if self.draining else self._hub.ready_link(session_id)
        return link if link is not None and await self._lives(link) else None

    async def _lives(self, link: Link) -> bool:
        """Whether the runner is there: a prompt sent to one that has just died is not sent again."""
        return (await self._runtime.probe({link.sandbox_id: link.state}))[link.sandbox_id]

    async def _start(self, turn: Turn, link: Link) -> None:
        started = await self._store.write(lambda tx: start_if_free(tx, turn.id, link.sandbox_id))
        reached("turn.started")
        if started is not None:
            await self.hand_over(started, link)

    async def hand_over(self, turn: Turn, link: Link) -> None:
        """Send the agent a turn that has been started. What does not arrive is sent again by a later step."""
        link.last_turn = turn.id
        await link.tell(
            StartTurn(
                id=new_id(),
                turn_id=turn.id,
                content=turn.content,
                max_turns=turn.options.get("max_turns"),
                model=turn.options.get("model"),
            )
        )

    async def _tend(self, session: Session, turn: Turn, sandbox: Sandbox, link: Link) -> float | None:
        """A turn is at work: hand it over if it has not arrived, interrupt it if it should end."""
        if turn.sandbox_id != sandbox.id:
            await self._store.write(lambda tx: _continue(tx, session.id, turn.id, sandbox))
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

    async def _rest(self, session: Session, sandbox: Sandbox, link: Link) -> float | None:
        """Nothing to do: free the process once it has been idle for long enough."""
        if link.background_tasks > 0 or session.status is not SessionStatus.READY:
            return self._options.idle_timeout_seconds
        left = self._options.idle_timeout_seconds - (utc_now() - session.last_active_at).total_seconds()
        if left > 0:
            return left
        await self._store.write(lambda tx: _evict(tx, session.id, sandbox.id))
        reached("evict.marked")
        return 0.0

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
            log.warning("sandbox.lost", session=session_id, sandbox=sandbox.id)
            await self._end(sandbox, gracefully=False)
        await self._store.write(lambda tx: _lost(tx, session_id, failure))

    async def _end(self, sandbox: Sandbox, *, gracefully: bool) -> None:
        link = self._hub.link(sandbox.id)
        if gracefully and link is not None:
            await link.tell(Shutdown(id=new_id()))
            await self._gone_within(sandbox, self._options.shutdown_grace_seconds)
        if sandbox.state:
            await self._runtime.terminate(sandbox.state)
        self._missed_since.pop(sandbox.id, None)
        await self._store.write(
            lambda tx: tx.sandboxes.update(sandbox.id, status=SandboxStatus.GONE, ended_at=utc_now())
        )

    async def _gone_within(self, sandbox: Sandbox, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while (await self._runtime.probe({sandbox.id: sandbox.state}))[sandbox.id]:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("sandbox.slow_to_end", sandbox=sandbox.id)

    async def _start_failed(self, session_id: str, error: CarrelError, failure: Failure | None = None) -> None:
        self._launches.pop(session_id, None)
        told = failure or Failure(code=error.code, message=error.message)
        await self._store.write(lambda tx: _could_not_start(tx, session_id, told))

    async def _fail_all(self, session_id: str, error: CarrelError, *, stop_reason: StopReason) -> None:
        failure = Failure(code=error.code, message=error.message)
        await self._store.write(lambda tx: _fail_waiting(tx, session_id, failure, stop_reason))

    async def _expire(self, session: Session, queued: list[Turn]) -> bool:
        now = utc_now()
        late = [turn for turn in queued if turn.expires_at is not None and turn.expires_at <= now]
        if late:
            await self._store.write(lambda tx: _expire(tx, session.id, [turn.id for turn in late]))
        return bool(late)

    async def _remove(self, session_id: str, view: _View) -> None:
        """The session is deleted: end its sandbox, remove its files, then its rows."""
        if not view.deleting:
            return
        if view.sandbox is not None:
            await self._end(view.sandbox, gracefully=False)
        await self._run_blocking(self._folders.remove, session_id)
        reached("delete.files_gone")
        await self._store.write(lambda tx: tx.sessions.remove(session_id))
        self._launches.pop(session_id, None)


# --------------------------------------------------------------------------------------------------- the transactions


def _view(tx: abc.Transaction, session_id: str) -> _View:
    session = tx.sessions.get(session_id)
    return _View(
        session=session,
        deleting=session is None and tx.sessions.deleting(session_id),
        sandbox=tx.sandboxes.current(session_id),
        live=tx.turns.live(session_id),
        queued=list(tx.turns.queued(session_id)),
    )


def start_if_free(tx: abc.Transaction, turn_id: str, sandbox_id: str) -> Turn | None:
    """Start the turn in this sandbox, if it is the session's next one and the sandbox is free for it."""
    turn = tx.turns.get(turn_id)
    session = tx.sessions.get(turn.session_id) if turn is not None else None
    if turn is None or session is None or session.status is not SessionStatus.READY:
        return None
    waiting, sandbox = tx.turns.queued(session.id), tx.sandboxes.current(session.id)
    if not waiting or waiting[0].id != turn.id:
        return None
    if sandbox is None or sandbox.id != sandbox_id or sandbox.status is not SandboxStatus.LIVE:
        return None
    return transitions.start_turn(tx, session, turn, sandbox_id)


def _unused(view: _View) -> bool:
    return view.live is None and not view.queued


def _sooner(pause: float | None, queued: list[Turn]) -> float | None:
    """The pause, or the time until the first queued turn expires where that is less."""
    left = [(turn.expires_at - utc_now()).total_seconds() for turn in queued if turn.expires_at is not None]
    return min([max(0.0, seconds) for seconds in left] + ([] if pause is None else [pause]), default=None)


def _goes_on(turn: Turn) -> bool:
    return turn.options.get("on_sandbox_lost") == OnSandboxLost.CONTINUE and turn.interrupt_reason is None


def mark_deleted(tx: abc.Transaction, session_id: str) -> None:
    """The session is gone for everyone from here on; the owner removes what is left of it."""
    transitions.emit(tx, session_id, SessionDeleted())
    tx.sessions.mark_deleting(session_id)


def _launching(tx: abc.Transaction, spec: abc.LaunchSpec, runtime: str) -> bool:
    session = tx.sessions.get(spec.session_id)
    if session is None or session.generation + 1 != spec.generation:
        return False
    if session.status in (SessionStatus.STOPPED, SessionStatus.FAILED):
        return False
    tx.sandboxes.add(
        Sandbox(
            id=spec.sandbox_id,
            session_id=spec.session_id,
            generation=spec.generation,
            status=SandboxStatus.LAUNCHING,
            runtime=runtime,
            link_token_hash=token_hash(spec.link_token),
            agent_token_hash=token_hash(spec.agent_token),
            created_at=utc_now(),
        )
    )
    if session.status is not SessionStatus.STARTING:
        # The gateway may have died between the end of a lost sandbox and saying so.
        session = transitions.settle(tx, session)
    transitions.set_status(tx, session, SessionStatus.STARTING, generation=spec.generation)
    return True


def _continue(tx: abc.Transaction, session_id: str, turn_id: str, sandbox: Sandbox) -> None:
    session, turn = tx.sessions.get(session_id), tx.turns.get(turn_id)
    if session is not None and turn is not None and not turn.status.ended:
        transitions.continue_turn(tx, session, turn, sandbox.id)


def _evict(tx: abc.Transaction, session_id: str, sandbox_id: str) -> None:
    session = tx.sessions.get(session_id)
    if session is None or session.status is not SessionStatus.READY or tx.turns.queued(session_id):
        return
    tx.sandboxes.update(sandbox_id, status=SandboxStatus.ENDING)
    transitions.set_status(tx, session, SessionStatus.IDLE)


def _lost(tx: abc.Transaction, session_id: str, failure: Failure | None = None) -> None:
    session = tx.sessions.get(session_id)
    if session is None:
        return
    live = tx.turns.live(session_id)
    if live is not None and not _goes_on(live):
        lost = SandboxLost()
        told = failure or Failure(code=lost.code, message=lost.message)
        reason = StopReason.SANDBOX_LOST if told.code == lost.code else StopReason.ERROR
        transitions.fail_turn(tx, session, live, told, reason)
    if session.status is SessionStatus.STARTING and tx.turns.queued(session_id):
        # Nothing was begun, so nothing was lost: the next step starts another.
        return
    transitions.settle(tx, session, stop_reason=StopReason.SANDBOX_LOST if live is not None else None)


def _settle(tx: abc.Transaction, session_id: str) -> None:
    session = tx.sessions.get(session_id)
    if session is not None:
        transitions.settle(tx, session)


def _could_not_start(tx: abc.Transaction, session_id: str, failure: Failure) -> None:
    _fail_waiting(tx, session_id, failure, StopReason.ERROR)
    session = tx.sessions.get(session_id)
    if session is not None and session.status is SessionStatus.STARTING:
        transitions.set_status(tx, session, SessionStatus.FAILED, stop_reason=StopReason.ERROR, error=failure)
    elif session is not None:
        transitions.settle(tx, session, stop_reason=StopReason.ERROR)


def _fail_waiting(tx: abc.Transaction, session_id: str, failure: Failure, stop_reason: StopReason) -> None:
    session = tx.sessions.get(session_id)
    if session is None:
        return
    live = tx.turns.live(session_id)
    for turn in [*([live] if live else []), *tx.turns.queued(session_id)]:
        transitions.fail_turn(tx, session, turn, failure, stop_reason)
    tx.sessions.update(session_id, stop_reason=stop_reason)


def _expire(tx: abc.Transaction, session_id: str, turn_ids: list[str]) -> None:
    session = tx.sessions.get(session_id)
    for turn_id in turn_ids:
        turn = tx.turns.get(turn_id)
        if session is not None and turn is not None and turn.status is TurnStatus.QUEUED:
            transitions.complete_turn(tx, session, turn, TurnStatus.EXPIRED, stop_reason=None)
