"""What callers may do with sessions and turns. Every call checks that the caller owns what it names."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import structlog
from pydantic_core import to_json

from carrel import abc
from carrel.errors import (
    BoundToSession,
    CarrelError,
    Draining,
    EnvironmentForbids,
    Forbidden,
    NothingToInterrupt,
    QueueFull,
    SessionBusy,
    SessionFailed,
    SessionNotFound,
    SessionStopped,
    SnapshotMissing,
    StoreOutcomeUnknown,
    TurnNotCancellable,
    TurnNotFinished,
    TurnNotFound,
    ValidationFailed,
)
from carrel.killpoints import reached
from carrel.model import (
    Budget,
    NetworkPolicy,
    PermissionMode,
    Principal,
    SandboxStatus,
    Session,
    SessionStatus,
    Snapshot,
    StopReason,
    Turn,
    TurnStatus,
    Workspace,
    new_id,
    utc_now,
)
from carrel.protocol.environments import DEFAULT_ENVIRONMENT, Environment
from carrel.protocol.events import SessionCreated, SessionUpdated, StoredEvent, TurnQueued
from carrel.protocol.results import TurnResult, result_of
from carrel.protocol.spec import LIVE_FIELDS, CreateSession, CreateTurn, SessionSpec, UpdateSession
from carrel.sessions import transitions
from carrel.sessions.admission import Admission, SessionLimits
from carrel.sessions.environments import (
    check_running,
    environment_of,
    environments_budget,
    open_environment,
    spend_environment,
)
from carrel.sessions.hub import Hub
from carrel.sessions.inheritance import check_within
from carrel.sessions.keeper import FORK, RELEASE, Keeper
from carrel.sessions.narrowing import check_options
from carrel.sessions.owner import Owner
from carrel.sessions.pool import Pool
from carrel.sessions.scheduler import Scheduler
from carrel.sessions.snapshots import check_not_rewound, is_rewound
from carrel.sessions.steps import mark_deleted
from carrel.sessions.streams import Streams
from carrel.sessions.trees import TreeLimits, stop_with_children
from carrel.sessions.workspaces import check_quota, open_workspace
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.folders import Folders

T = TypeVar("T")

log = structlog.get_logger(__name__)

_PAGE = 500
_OF_ENVIRONMENT = frozenset({"environment", "environment_version"})
_SETTLE_SECONDS = 10.0
_GO_ON = "You were paused in the middle of your work. Go on where you left off."


@dataclass(frozen=True)
class Mark:
    """An Idempotency-Key: the object a request makes is noted beside it in the transaction that makes it."""

    principal: str
    key: str


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Bounds of what callers may do."""

    max_queued_turns: int = 100
    max_waiting_turns: int = 1000
    max_sessions: int | None = None
    max_sessions_per_user: int | None = None
    allow_bypass: bool = True
    metered: bool = True
    """False: agents ask the model's provider themselves, and no budget can hold."""
    defaults: SessionSpec = field(default_factory=SessionSpec)
    """The options of sessions whose creators do not name them."""
    default_ttl_seconds: int | None = None
    trees: TreeLimits = field(default_factory=TreeLimits)
    trace: Callable[[], dict[str, str]] = dict
    """The context that is stored with a turn where it is accepted; empty where nobody traces."""


class SessionService:
    """Sessions and turns, for callers."""

    def __init__(
        self,
        store: abc.Store,
        streams: Streams,
        owner: Owner,
        scheduler: Scheduler,
        hub: Hub,
        folders: Folders,
        admission: Admission,
        keeper: Keeper,
        *,
        run_blocking: Callable[..., Any],
        options: ServiceOptions,
        pool: Pool,
    ) -> None:
        """Make the service over the parts that do the work."""
        self._pool = pool
        self._admission = admission
        self.keeper = keeper
        self._store = store
        self.streams = streams
        self._owner = owner
        self._scheduler = scheduler
        self._hub = hub
        self.folders = folders
        self.run_blocking = run_blocking
        self._options = options

    # ------------------------------------------------------------------------------------------------------- sessions

    async def create(
        self,
        principal: Principal,
        body: CreateSession,
        mark: Mark | None = None,
        *,
        max_sessions: int | None = None,
        max_sessions_per_user: int | None = None,
    ) -> Session:
        """Make a session, or take one from a warm pool. No process is started for it and no model asked.

        Args:
            principal: who asks; the session is their user's.
            body: the options.
            mark: the Idempotency-Key of the request.
            max_sessions: the limit of sessions in all, where the settings name none.
            max_sessions_per_user: the same of sessions of one user.

        Raises:
            Forbidden: the options are not allowed here.
            BoundToSession: the caller is bound to another session.
            EnvironmentNotFound: there is no such environment that the caller may use.
            EnvironmentStopped: it takes no prompts.
            EnvironmentForbids: it does not let a session have these options.
            SessionLimitReached: there are as many sessions as are allowed.
            WorkspaceMissing: the user's directory is not there, and none is made.
            CloneFailed: this server does not clone from the workspace's repository.
        """
        if principal.session_id is not None:
            raise BoundToSession
        self.check_mode(_with_defaults(body.spec(), self._options.defaults).permission_mode)
        self.check_budget(body.budget)
        if body.ttl_seconds is None:
            body = body.model_copy(update={"ttl_seconds": self._options.default_ttl_seconds})
        options = self._options
        limits = SessionLimits(
            max_sessions if options.max_sessions is None else options.max_sessions,
            max_sessions_per_user if options.max_sessions_per_user is None else options.max_sessions_per_user,
        )

        shown = await self._pool.shows(principal.user)

        def work(tx: abc.Transaction) -> tuple[Session, bool]:
            environment = open_environment(tx, principal, body.environment)
            check_running(tx, environment.name)
            self.check_options(environment, body.spec())
            self.keeper.cloner.check(environment.name, environment.spec, body.workspace or Workspace())
            limits.spend(tx, principal.user)
            spend_environment(tx, environment, principal.user)
            own = self.own_options(environment, body.spec())
            wanted = _new_session(tx, principal, own, body, environment, utc_now())
            session = self._pool.take(tx, environment, wanted, user_config=shown)
            if session is None:
                tx.sessions.add(wanted)
                transitions.emit(tx, wanted.id, SessionCreated(title=wanted.title))
            made = wanted if session is None else session
            _note(tx, mark, made.id)
            return _session(tx, principal, made.id), session is not None

        session, warm = await self._store.write(work)
        if warm:
            await self._pool.taken(session)
        if session.workspace.type != "user":
            return session
        try:
            await self.run_blocking(self.folders.check, session)
        except BaseException:
            await self.delete(principal, session.id)
            raise
        return session

    async def get(self, principal: Principal, session_id: str) -> Session:
        """The session. Raises SessionNotFound, also for one of somebody else's."""
        return await self._store.read(lambda tx: _session(tx, principal, session_id))

    async def page(
        self,
        principal: Principal,
        *,
        status: SessionStatus | None,
        cursor: str | None,
        limit: int,
        text: str | None = None,
        environment: str | None = None,
    ) -> abc.Page[Session]:
        """The caller's sessions (an admin's: everybody's), newest first. Raises InvalidCursor.

        Args:
            principal: who asks.
            status: only those with this status.
            cursor: where the last page ended.
            limit: how many at most.
            text: only those with this in their title, or in what was said.
            environment: only those that are in it.
        """
        which = abc.SessionFilter(
            owner=None if principal.is_admin else principal.user,
            session_id=principal.session_id,
            status=status,
            text=text,
            environment=environment,
        )
        return await self._store.read(lambda tx: tx.sessions.page(which, cursor=cursor, limit=limit))

    async def update(self, principal: Principal, session_id: str, body: UpdateSession) -> Session:
        """Change what is given. Some options reach the running agent, the others its next start."""
        given = body.model_fields_set
        options = given & set(SessionSpec.model_fields)
        self.check_mode(body.permission_mode)
        self.check_budget(body.budget)

        def work(tx: abc.Transaction) -> Session:
            session = _session(tx, principal, session_id)
            changes: dict[str, Any] = {}
            if "title" in given:
                changes["title"] = body.title
            if "metadata" in given:
                changes["metadata"] = body.metadata or {}
            environment = self._moved(tx, principal, session, body)
            moved = (environment.name, environment.version) != (session.environment, session.environment_version)
            if moved:
                changes |= {"environment": environment.name, "environment_version": environment.version}
            if "budget" in given or moved:
                budget = body.budget if "budget" in given else session.budget
                changes["budget"] = environments_budget(environment, budget, given="budget" in given)
            if options or moved:
                wanted = self._changed_options(session, body, environment)
                self.check_options(environment, wanted)
                self._check_within_parent(tx, session, wanted, environment)
                changes["spec"] = wanted.model_dump(mode="json", exclude_none=True)
            if not changes:
                return session
            updated = tx.sessions.update(session_id, **changes)
            at_next = sorted((options | given & _OF_ENVIRONMENT) - LIVE_FIELDS)
            transitions.emit(tx, session_id, SessionUpdated(changed=sorted(given), at_next_launch=at_next))
            return tx.sessions.update(session_id, title=updated.title)

        session = await self._store.write(work)
        if given & _OF_ENVIRONMENT:
            self._scheduler.poke(session_id)  # a sandbox of another version takes no more turns
        if options & LIVE_FIELDS:
            await self._owner.apply_live_options(session.id)
        return session

    def _check_within_parent(
        self, tx: abc.Transaction, session: Session, wanted: SessionSpec, environment: Environment
    ) -> None:
        above = tx.trees.above(session) if session.lineage else ()
        if not above:
            return
        parent = above[0]
        changed = session.model_copy(update={"spec": wanted.model_dump(mode="json", exclude_none=True)})
        check_within(self._owner.rights(parent, environment_of(tx, parent)), self._owner.rights(changed, environment))

    def _moved(self, tx: abc.Transaction, principal: Principal, session: Session, body: UpdateSession) -> Environment:
        """The environment that the session is to be in: its own version, where the body says nothing of it."""
        given = body.model_fields_set & _OF_ENVIRONMENT
        if not given:
            return environment_of(tx, session)
        name = (body.environment or DEFAULT_ENVIRONMENT) if "environment" in given else session.environment
        environment = open_environment(tx, principal, name, body.environment_version)
        if environment.name != session.environment:
            spend_environment(tx, environment, session.owner)
        return environment

    def _changed_options(self, session: Session, body: UpdateSession, environment: Environment) -> SessionSpec:
        """The session's own options, as the body changes them."""
        defaults = self._options.defaults.model_dump(mode="json", exclude_none=True)
        options = body.model_fields_set & set(SessionSpec.model_fields)
        moved = session.environment_version == 0 != environment.version
        spec = {
            name: value
            for name, value in session.spec.items()
            # Out of `default` as the settings say, it leaves behind what the settings had said.
            if name not in options and not (moved and defaults.get(name) == value)
        }
        spec |= body.model_dump(mode="json", include=options, exclude_none=True)
        own = SessionSpec.model_validate(spec)
        if environment.version > 0:
            return own
        back = None if session.environment_version > 0 else options
        return _with_defaults(own, SessionSpec.model_validate(self._options.defaults.model_dump(include=back)))

    def own_options(self, environment: Environment, given: SessionSpec) -> SessionSpec:
        """What a new session's row says: in `default` as the settings say, it keeps their defaults as they are now."""
        return given if environment.version > 0 else _with_defaults(given, self._options.defaults)

    async def delete(self, principal: Principal, session_id: str) -> None:
        """Delete the session for good, with its files. Its processes are gone when this returns."""
        await self._keep_last(await self.get(principal, session_id))

        def work(tx: abc.Transaction) -> list[Session]:
            _session(tx, principal, session_id)
            return mark_deleted(tx, session_id)

        below = await self._store.write(work)
        reached("delete.marked")
        for depth in sorted({each.depth for each in below}, reverse=True):
            await asyncio.gather(*(self._scheduler.settle(each.id) for each in below if each.depth == depth))
        await self._scheduler.settle(session_id)

    async def _keep_last(self, session: Session) -> None:
        """What the session leaves in a workspace that stays is kept before its sandbox goes, if that can be done now."""
        if session.workspace_id is None or session.generation == 0 or not self.keeper.keeps:
            return
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                await self.keeper.take(session, session.snapshot_due or RELEASE)
        except (CarrelError, TimeoutError) as error:
            # The files themselves stay; the next session in the workspace has them kept.
            log.warning("snapshot.not_taken", session=session.id, why=repr(error))

    async def stop(self, principal: Principal, session_id: str) -> Session:
        """Stop by hand: the running turn is interrupted, queued ones are cancelled, the process ends.

        So are the sessions below it that are not to outlast it.
        """

        def work(tx: abc.Transaction) -> list[str]:
            return stop_with_children(tx, _session(tx, principal, session_id), lambda each: _stop(tx, each))

        stopped = await self._store.write(work)
        await asyncio.gather(*(self._scheduler.settle(each) for each in stopped))
        return await self.get(principal, session_id)

    async def pause(self, principal: Principal, session_id: str) -> Session:
        """Stop a session so that `resume` has it go on: its turn is interrupted, and what waits goes on waiting."""

        def work(tx: abc.Transaction) -> None:
            session = _session(tx, principal, session_id)
            if session.status is SessionStatus.STOPPED:
                return
            live = tx.turns.live(session_id)
            _stop(tx, session, cancel=False)
            if live is not None:
                tx.sessions.update(session_id, paused_turn=live.id)

        await self._store.write(work)
        await self._scheduler.settle(session_id)
        return await self.get(principal, session_id)

    async def redirect(
        self, principal: Principal, session_id: str, body: CreateTurn, mark: Mark | None = None
    ) -> tuple[Turn, int]:
        """Give a session another instruction now: the turn at work is interrupted, and this prompt queued, in one step.

        Answers as `create_turn` does, and raises what that raises.
        """
        if self._owner.draining:
            raise Draining
        self.check_budget(body.budget)
        trace = self._options.trace()

        def work(tx: abc.Transaction) -> tuple[Turn, int]:
            session = _session(tx, principal, session_id)
            live = tx.turns.live(session_id)
            if live is not None:
                reason = live.interrupt_reason or StopReason.INTERRUPTED
                tx.turns.update(live.id, interrupt_reason=reason)
            return self.queue(tx, session, body, mark, trace)

        answer = await self._store.write(work)
        self._scheduler.poke(session_id)
        return answer

    async def resume(self, principal: Principal, session_id: str) -> Session:
        """Take a stopped or failed session up again; one that is neither stays as it is.

        One that was paused in the middle of a turn is told to go on.

        Raises:
            ChildLimitReached: it is a child, and there are as many at work already as are allowed.
        """

        def work(tx: abc.Transaction) -> None:
            session = _session(tx, principal, session_id)
            if session.status not in (SessionStatus.STOPPED, SessionStatus.FAILED):
                return
            parent = tx.sessions.get(session.parent_id) if session.parent_id is not None else None
            if parent is not None:
                tx.users.lock(session.owner)
                self._options.trees.spend(tx, parent)
            paused = session.paused_turn is not None
            changes = {**transitions.touch(session, utc_now()), "paused_turn": None}
            session = transitions.set_status(tx, session, SessionStatus.IDLE, **changes)
            if paused:
                self.queue(tx, tx.sessions.get(session_id) or session, CreateTurn(prompt=_GO_ON), None, {})

        await self._store.write(work)
        self._scheduler.poke(session_id)
        return await self.get(principal, session_id)

    async def interrupt(self, principal: Principal, session_id: str, turn_id: str | None = None) -> Turn:
        """Ask for the end of the turn at work (or, while none is, of the first that waits).

        Raises:
            NothingToInterrupt: there is no such turn.
        """

        def work(tx: abc.Transaction) -> Turn:
            session = _session(tx, principal, session_id)
            live = tx.turns.live(session_id)
            if live is not None and turn_id in (None, live.id):
                return tx.turns.update(live.id, interrupt_reason=live.interrupt_reason or StopReason.INTERRUPTED)
            for turn in tx.turns.queued(session_id) if turn_id is not None or live is None else ():
                if turn_id in (None, turn.id):
                    return transitions.complete_turn(tx, session, turn, TurnStatus.CANCELLED, stop_reason=None)
            raise NothingToInterrupt

        turn = await self._store.write(work)
        self._scheduler.poke(session_id)
        return turn

    async def fork(
        self, principal: Principal, session_id: str, turn_id: str | None, mark: Mark | None = None
    ) -> Session:
        """A new session that goes on from the end of a turn (the last ended one), with a copy of the files as of then.

        Raises:
            TurnNotFinished: the turn has not ended.
            TurnRewound: the session has gone back behind it.
            SnapshotMissing: later turns have worked since, and the files as they were then were not kept.
        """

        def prepare(tx: abc.Transaction) -> tuple[Session, Turn | None, bool, Snapshot | None]:
            session = _session(tx, principal, session_id)
            point = _fork_point(tx, session, turn_id)
            past = point is not None and session.workspace.is_own and _worked_since(tx, session, point)
            return session, point, past, tx.snapshots.of_turn(point.id) if past and point is not None else None

        await self.keeper.settled(session_id, _SETTLE_SECONDS)
        source, turn, past, snapshot = await self._store.read(prepare)
        if past and snapshot is None and self.keeper.keeps:
            raise SnapshotMissing
        number = await self._store.write(lambda tx: tx.sessions.next_number())
        new = new_id()
        # What outlives a session belongs to a user of its own; a folder of the session's own to nobody else.
        uid_number = None if source.workspace.is_own else source.uid_number
        place = {"id": new, "number": number, "uid_number": uid_number, "files_of": None}
        target = source.model_copy(update=place)
        if snapshot is not None:
            await self.keeper.copy(snapshot, target)
            await self.run_blocking(self.folders.make, target)
        else:
            await self.keeper.ensure(source)
            await self.run_blocking(self.folders.copy, source, target)
        limits = SessionLimits(self._options.max_sessions, self._options.max_sessions_per_user)

        def work(tx: abc.Transaction) -> Session:
            limits.spend(tx, source.owner)
            now = utc_now()
            current = _session(tx, principal, session_id)
            spend_environment(tx, environment_of(tx, current), current.owner)
            # A fork that has had no turn of its own yet has the conversation it was forked with.
            known = turn is not None or current.turn_count == 0
            agent_session_id = str(uuid.uuid4()) if current.agent_session_id and known else None
            session = Session(
                id=new,
                number=number,
                owner=current.owner,
                uid_number=uid_number,
                status=SessionStatus.IDLE,
                title=current.title,
                spec=current.spec,
                workspace=current.workspace,
                workspace_id=current.workspace_id,
                metadata=current.metadata,
                forked_from=session_id,
                agent_session_id=agent_session_id,
                environment=current.environment,
                environment_version=current.environment_version,
                cost_usd=0.0,
                budget=current.budget,
                ttl_seconds=current.ttl_seconds,
                snapshot_due=FORK if current.workspace.is_own else None,
                created_at=now,
                last_active_at=now,
            )
            tx.sessions.add(session.model_copy(update=transitions.touch(session, now)))
            if agent_session_id is not None and current.agent_session_id is not None:
                tx.transcripts.copy(
                    session_id,
                    new,
                    up_to_turn=turn.id if turn is not None else None,
                    replace=(current.agent_session_id, agent_session_id),
                )
            transitions.emit(
                tx,
                new,
                SessionCreated(
                    title=session.title, forked_from=session_id, forked_at_turn=turn.id if turn is not None else None
                ),
            )
            _note(tx, mark, new)
            return _session(tx, principal, new)

        try:
            forked = await self._store.write(work)
            self.keeper.wake(new)
            return forked
        except StoreOutcomeUnknown:
            raise  # it may have been made, and then has these files
        except BaseException:
            await self.run_blocking(self.folders.remove, new)
            raise

    async def export(self, principal: Principal, session_id: str) -> AsyncIterator[bytes]:
        """Everything of the session as lines of JSON: the session, its turns, its events, its transcript."""
        session = await self.get(principal, session_id)
        return self._export(session)

    async def _export(self, session: Session) -> AsyncIterator[bytes]:
        yield to_json({"kind": "session", "session": session}) + b"\n"
        cursor: str | None = None
        while True:
            turns = await self._store.read(
                lambda tx, c=cursor: tx.turns.page(session.id, cursor=c, limit=_PAGE)  # type: ignore[misc]
            )
            for turn in turns.items:
                yield to_json({"kind": "turn", "turn": turn}) + b"\n"
            cursor = turns.next_cursor
            if cursor is None:
                break
        async for events in self._pages(session.id):
            for event in events:
                yield b'{"kind":"event","event":' + event.json() + b"}\n"
        for subpath in await self._store.read(lambda tx: list(tx.transcripts.subpaths(session.id))):
            after = 0
            while lines := await self._store.read(
                lambda tx, s=subpath, a=after: tx.transcripts.page(session.id, s, after=a, limit=_PAGE)  # type: ignore[misc]
            ):
                after = lines[-1][0]
                for _, line in lines:
                    yield to_json({"kind": "transcript", "subpath": subpath, "line": line}) + b"\n"

    # ---------------------------------------------------------------------------------------------------------- turns

    async def create_turn(
        self,
        principal: Principal,
        session_id: str,
        body: CreateTurn,
        mark: Mark | None = None,
        *,
        alone: bool = False,
    ) -> tuple[Turn, int]:
        """Queue a prompt. Answers the turn, and the `seq` of the event before its first one.

        Args:
            principal: who prompts.
            session_id: the session.
            body: the prompt.
            mark: noted beside it.
            alone: whether it is refused, and not queued, while another turn waits or runs.

        Raises:
            SessionBusy: `alone`, and it would not be.
            SessionStopped: the session is stopped.
            SessionFailed: the session could not be started.
            QueueFull: too many turns wait already.
            Draining: the server is shutting down.
            OutOfMemory: the session has no sandbox, and there is no memory for one.
        """
        if self._owner.draining:
            raise Draining
        self.check_budget(body.budget)
        await self._wait_for_memory(principal, session_id)

        link = await self._owner.idle_agent(session_id)
        trace = self._options.trace()

        def work(tx: abc.Transaction) -> tuple[Turn, int, Turn | None]:
            session = _session(tx, principal, session_id)
            if alone and (tx.turns.live(session_id) is not None or tx.turns.queued(session_id)):
                raise SessionBusy
            turn, before = self.queue(tx, session, body, mark, trace)
            if link is None:
                return turn, before, None
            return turn, before, self._owner.start_if_free(tx, turn.id, link.sandbox_id)

        turn, before, started = await self._store.write(work)
        structlog.contextvars.bind_contextvars(session_id=session_id, turn_id=turn.id)
        reached("turn.stored")
        if link is not None and started is not None:
            await self._owner.hand_over(started, link)
        self._scheduler.poke(session_id)
        return turn, before

    async def _wait_for_memory(self, principal: Principal, session_id: str) -> None:
        """A session that has no sandbox waits for room for one, or is turned away."""
        if self._owner.memory.room(session_id):
            return

        def needs_one(tx: abc.Transaction) -> bool:
            session = _session(tx, principal, session_id)
            unavailable = session.status in (SessionStatus.STOPPED, SessionStatus.FAILED)
            return not unavailable and tx.sandboxes.current(session_id) is None

        if await self._store.read(needs_one):
            await self._owner.memory.wait_for_room(session_id)

    def queue(
        self,
        tx: abc.Transaction,
        session: Session,
        body: CreateTurn,
        mark: Mark | None,
        trace: dict[str, str],
        *,
        turn_id: str | None = None,
    ) -> tuple[Turn, int]:
        """Queue a prompt in the caller's transaction, which also made sure that the caller may."""
        if session.status is SessionStatus.STOPPED:
            raise SessionStopped
        if session.status is SessionStatus.FAILED:
            raise SessionFailed
        check_running(tx, session.environment)
        waiting = tx.turns.queued(session.id)
        if len(waiting) >= self._options.max_queued_turns:
            raise QueueFull(self._options.max_queued_turns)
        check_quota(tx, session)
        if tx.counts.queued_turns() >= self._options.max_waiting_turns:
            raise QueueFull(self._options.max_waiting_turns, of_session=False)
        now = utc_now()
        seconds = body.queue_timeout_seconds
        turn = Turn(
            id=turn_id or new_id(),
            session_id=session.id,
            number=tx.turns.next_number(session.id),
            status=TurnStatus.QUEUED,
            content=body.blocks(),
            options=body.options().model_dump(mode="json", exclude_none=True) | ({"trace": trace} if trace else {}),
            cost_usd=None,
            created_at=now,
            expires_at=None if seconds is None else now + timedelta(seconds=seconds),
        )
        tx.turns.add(turn)
        ahead = len(waiting) + (1 if tx.turns.live(session.id) is not None else 0)
        place = self._admission.place(tx, turn.id, ahead)
        transitions.emit(tx, session.id, TurnQueued(number=turn.number, ahead=ahead, place=place), turn_id=turn.id)
        tx.sessions.update(session.id, turn_count=session.turn_count + 1, **transitions.touch(session, now))
        _note(tx, mark, turn.id)
        return turn, session.last_seq

    async def turn(self, principal: Principal, session_id: str, turn_id: str) -> Turn:
        """The turn. Raises TurnNotFound."""
        return await self._store.read(lambda tx: _turn(tx, principal, session_id, turn_id))

    async def turns(self, principal: Principal, session_id: str, *, cursor: str | None, limit: int) -> abc.Page[Turn]:
        """The session's turns, newest first. Raises InvalidCursor."""

        def work(tx: abc.Transaction) -> abc.Page[Turn]:
            _session(tx, principal, session_id)
            return tx.turns.page(session_id, cursor=cursor, limit=limit)

        return await self._store.read(work)

    async def network(
        self, principal: Principal, session_id: str, *, cursor: str | None, limit: int
    ) -> tuple[NetworkPolicy, abc.Page[abc.NetworkRequest]]:
        """What the session's sandboxes may reach beside the gateway, and what they asked for. Raises InvalidCursor."""

        def work(tx: abc.Transaction) -> tuple[NetworkPolicy, abc.Page[abc.NetworkRequest]]:
            session = _session(tx, principal, session_id)
            sandbox = tx.sandboxes.current(session_id)
            policy = sandbox.network if sandbox is not None else None
            template = environment_of(tx, session).spec.sandbox
            return policy or self._owner.network(session, template), tx.network.page(
                session_id, cursor=cursor, limit=limit
            )

        return await self._store.read(work)

    async def cancel_turn(self, principal: Principal, session_id: str, turn_id: str) -> Turn:
        """Take a queued turn back. Raises TurnNotCancellable once it runs or has ended."""

        def work(tx: abc.Transaction) -> Turn:
            turn = _turn(tx, principal, session_id, turn_id)
            if turn.status is not TurnStatus.QUEUED:
                raise TurnNotCancellable
            session = _session(tx, principal, session_id)
            return transitions.complete_turn(tx, session, turn, TurnStatus.CANCELLED, stop_reason=None)

        return await self._store.write(work)

    async def wait_for_turn(self, principal: Principal, session_id: str, turn_id: str, *, after: int) -> TurnResult:
        """Wait until the turn has ended, and answer its result. `after`: a `seq` before its first event."""
        async for _ in self.streams.follow(session_id, after=after, until_turn=turn_id):
            pass
        return await self.result(principal, session_id, turn_id)

    async def result(self, principal: Principal, session_id: str, turn_id: str) -> TurnResult:
        """What a turn has come to."""
        turn = await self.turn(principal, session_id, turn_id)
        events = [event async for page in self._pages(session_id, turn_id) for event in page]
        return result_of(turn, events)

    async def events(self, principal: Principal, session_id: str, *, after: int, limit: int) -> list[StoredEvent]:
        """Stored events with a higher `seq` than `after`."""

        def work(tx: abc.Transaction) -> list[StoredEvent]:
            _session(tx, principal, session_id)
            return tx.events.page(session_id, after=after, limit=limit)

        return await self._store.read(work)

    async def _pages(self, session_id: str, turn_id: str | None = None) -> AsyncIterator[list[StoredEvent]]:
        after = 0
        while page := await self._store.read(
            lambda tx, a=after: tx.events.page(session_id, after=a, limit=_PAGE, turn_id=turn_id)  # type: ignore[misc]
        ):
            after = page[-1].seq
            yield page

    async def files(self, session: Session) -> WorkspaceFiles:
        """The files of a session's workspace, which are put back first if they are lost. Raises Unavailable."""
        await self.keeper.ensure(session)
        files: WorkspaceFiles = await self.run_blocking(self.folders.files, session)
        return files

    def poke(self, session_id: str) -> None:
        """Have the session looked at soon."""
        self._scheduler.poke(session_id)

    async def settle(self, session_id: str) -> None:
        """Have the session looked at, and wait for that."""
        await self._scheduler.settle(session_id)

    @property
    def options(self) -> ServiceOptions:
        """The bounds of what callers may do."""
        return self._options

    def check_budget(self, budget: Budget | None) -> None:
        """Make sure that a budget can hold here. Raises ValidationFailed."""
        if budget is not None and not budget.unlimited and not self._options.metered:
            raise ValidationFailed("budget: none can hold here, since agents ask the model's provider themselves")

    def check_options(self, environment: Environment, own: SessionSpec) -> None:
        """Make sure that a session of the environment may have these options. Raises EnvironmentForbids."""
        check_options(environment.name, environment.spec, own)
        most = self._owner.network_given(environment.spec.sandbox)
        if own.network is not None and not own.network.within(most):
            raise EnvironmentForbids(f"network: a session may narrow what it is given, and this is more than {most}.")

    def check_mode(self, mode: PermissionMode | None) -> None:
        """Make sure that agents may have this mode here. Raises Forbidden."""
        if mode is PermissionMode.BYPASS and not self._options.allow_bypass:
            raise Forbidden(
                "bypassPermissions is refused where sandboxes are not isolated. Use another permission_mode, or have "
                "the operator choose an isolation, or set allow_bypass_without_isolation."
            )


# --------------------------------------------------------------------------------------------------- the transactions


def _session(tx: abc.Transaction, principal: Principal, session_id: str) -> Session:
    session = tx.sessions.get(session_id)
    if session is None or not principal.may_see(session):
        raise SessionNotFound
    return session


def _stop(tx: abc.Transaction, session: Session, *, cancel: bool = True) -> None:
    """End what the session does, and its process; without `cancel`, what waits goes on waiting."""
    found = tx.sessions.get(session.id)
    if found is None or found.status is SessionStatus.STOPPED:
        return
    session = found
    live = tx.turns.live(session.id)
    if live is not None:
        transitions.complete_turn(tx, session, live, TurnStatus.INTERRUPTED, stop_reason=StopReason.INTERRUPTED)
    for turn in tx.turns.queued(session.id) if cancel else ():
        transitions.complete_turn(tx, session, turn, TurnStatus.CANCELLED, stop_reason=None)
    transitions.withdraw_all(tx, session.id)
    sandbox = tx.sandboxes.current(session.id)
    if sandbox is not None:
        tx.sandboxes.update(sandbox.id, status=SandboxStatus.ENDING)
    reason = StopReason.INTERRUPTED if live is not None else session.stop_reason
    transitions.set_status(tx, session, SessionStatus.STOPPED, stop_reason=reason)


def _turn(tx: abc.Transaction, principal: Principal, session_id: str, turn_id: str) -> Turn:
    _session(tx, principal, session_id)
    turn = tx.turns.get(turn_id)
    if turn is None or turn.session_id != session_id:
        raise TurnNotFound
    return turn


def _new_session(
    tx: abc.Transaction,
    principal: Principal,
    spec: SessionSpec,
    body: CreateSession,
    environment: Environment,
    now: datetime,
) -> Session:
    workspace = body.workspace or Workspace()
    named = open_workspace(tx, principal.user, workspace.name, now) if workspace.name is not None else None
    session = Session(
        id=new_id(),
        number=tx.sessions.next_number(),
        owner=principal.user,
        uid_number=named.number if named else number_of_user(tx, principal.user) if workspace.type == "user" else None,
        status=SessionStatus.IDLE,
        title=body.title,
        spec=spec.model_dump(mode="json", exclude_none=True),
        workspace=workspace,
        workspace_id=named.id if named is not None else None,
        metadata=body.metadata or {},
        environment=environment.name,
        environment_version=environment.version,
        cost_usd=0.0,
        budget=environments_budget(environment, body.budget),
        ttl_seconds=body.ttl_seconds,
        created_at=now,
        last_active_at=now,
    )
    return session.model_copy(update=transitions.touch(session, now))


def _with_defaults(given: SessionSpec, defaults: SessionSpec) -> SessionSpec:
    """The options as given, and the defaults of those that are not."""
    spec = defaults.model_dump(exclude_none=True) | given.model_dump(exclude_none=True)
    if given.append_system_prompt is not None and given.system_prompt is None:
        spec.pop("system_prompt", None)  # what is added to Claude Code's own prompt wants that one
    return SessionSpec.model_validate(spec)


def number_of_user(tx: abc.Transaction, user_id: str) -> int:
    """Sessions and users are numbered from one counter, so that no two have the same files."""
    user = tx.users.get(user_id)
    if user is None or user.number is None:
        return tx.users.update(user_id, number=tx.sessions.next_number()).number or 0
    return user.number


def _fork_point(tx: abc.Transaction, session: Session, turn_id: str | None) -> Turn | None:
    if turn_id is not None:
        turn = tx.turns.get(turn_id)
        if turn is None or turn.session_id != session.id:
            raise TurnNotFound
        if not turn.status.ended:
            raise TurnNotFinished
        check_not_rewound(session, turn)
        return turn
    return next((turn for turn in _started(tx, session) if turn.status.ended), None)


def _worked_since(tx: abc.Transaction, session: Session, turn: Turn) -> bool:
    """Whether a later turn that is part of the conversation has begun."""
    return any(later.number > turn.number for later in _started(tx, session))


def _started(tx: abc.Transaction, session: Session) -> Iterator[Turn]:
    """The newest turns that have begun and are part of the conversation."""
    for turn in tx.turns.page(session.id, cursor=None, limit=1000).items:
        if turn.started_at is not None and not is_rewound(session, turn):
            yield turn


def _note(tx: abc.Transaction, mark: Mark | None, object_id: str) -> None:
    if mark is not None:
        tx.idempotency.update(mark.principal, mark.key, object_id=object_id)
