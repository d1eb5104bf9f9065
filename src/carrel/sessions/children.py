"""Sessions that sessions begin, for callers: begun, listed, drawn as a tree, waited for.

A child is stored together with its first prompt and the event in its parent's log, in the transaction that counts the
limits: so it has that prompt once, whatever dies meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from carrel import abc
from carrel.budgets import Allowances, BudgetKind, accounts_of
from carrel.errors import (
    Draining,
    Forbidden,
    NoPatch,
    SessionFailed,
    SessionNotFound,
    SessionStopped,
    StoreOutcomeUnknown,
    WiderThanParent,
)
from carrel.model import (
    Birth,
    ChildFiles,
    Principal,
    Session,
    SessionStatus,
    Turn,
    Usage,
    Workspace,
    new_id,
    utc_now,
)
from carrel.protocol.environments import Environment
from carrel.protocol.events import ChildCreated, SessionCreated
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import CreateChild, CreateTurn, SessionSpec
from carrel.sessions import transitions
from carrel.sessions.admission import SessionLimits
from carrel.sessions.environments import (
    check_running,
    environment_of,
    environments_budget,
    open_environment,
    spend_environment,
)
from carrel.sessions.inheritance import check_within, inherited
from carrel.sessions.keeper import FORK, Keeper
from carrel.sessions.owner import Owner
from carrel.sessions.scheduler import Scheduler
from carrel.sessions.service import Mark, SessionService
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.folders import Folders
from carrel.workspaces.patches import apply_patch, make_patch

__all__ = ["Children", "Node", "Outcome"]

_LOOK_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Node:
    """A session in its tree."""

    session: Session
    usage: Usage
    """What it and all that are or were below it have used."""
    cost_usd: float | None
    """What that cost; None where any part of it is not known."""
    children: list[Node]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How far a session has come with what it was last asked."""

    session: Session
    turn: TurnResult | None
    """Its newest turn; None: it has had none."""
    complete: bool
    """Whether nothing of it waits or is at work."""


class Children:
    """Children, and the trees they make."""

    def __init__(
        self,
        store: abc.Store,
        service: SessionService,
        owner: Owner,
        scheduler: Scheduler,
        folders: Folders,
        keeper: Keeper,
        *,
        run_blocking: Callable[..., Any],
        allowances: Allowances,
    ) -> None:
        """Make it over the parts that do the work; `allowances` are the budgets of sessions that have none."""
        self._store = store
        self._service = service
        self._owner = owner
        self._scheduler = scheduler
        self._folders = folders
        self._keeper = keeper
        self._run_blocking = run_blocking
        self._allowances = allowances

    # ------------------------------------------------------------------------------------------------------ beginning

    async def begin(
        self, principal: Principal, session_id: str, body: CreateChild, mark: Mark | None = None
    ) -> Session:
        """Begin a child of a session, with its first prompt.

        Raises:
            TooDeep: there are as many above it as are allowed.
            ChildLimitReached: there are as many beside or below as are allowed.
            WiderThanParent: it would have more than its parent has.
            SessionStopped: the parent is stopped; likewise SessionFailed.
            EnvironmentNotFound, EnvironmentStopped, EnvironmentForbids, SessionLimitReached: as for any session.
        """
        if self._owner.draining:
            raise Draining
        self._service.check_mode(body.options.permission_mode)
        self._service.check_budget(body.budget)
        if body.workspace is not ChildFiles.CLONE:
            made = await self._store.write(lambda tx: self._begin(tx, principal, session_id, body, mark, None))
        else:
            made = await self._begin_clone(principal, session_id, body, mark)
        self._scheduler.poke(made.id)
        return made

    async def _begin_clone(
        self, principal: Principal, session_id: str, body: CreateChild, mark: Mark | None
    ) -> Session:
        """The files are copied first, so that nothing is begun without them."""

        def look(tx: abc.Transaction) -> Session:
            """Whoever would be refused below is refused before anything is copied."""
            parent = _session(tx, principal, session_id)
            self._service.options.trees.spend(tx, parent)
            return parent

        parent = await self._store.read(look)
        number = await self._store.write(lambda tx: tx.sessions.next_number())
        place = Session(
            id=new_id(),
            number=number,
            owner=parent.owner,
            status=SessionStatus.IDLE,
            spec={},
            created_at=parent.created_at,
            last_active_at=parent.created_at,
        )
        await self._keeper.ensure(parent)
        try:
            await self._run_blocking(self._folders.clone, parent, place)
            made = await self._store.write(lambda tx: self._begin(tx, principal, session_id, body, mark, place))
        except StoreOutcomeUnknown:
            raise  # it may have been made, and then has these files
        except BaseException:
            await self._run_blocking(self._folders.remove, place.id)
            raise
        self._keeper.wake(made.id)
        return made

    def _begin(
        self,
        tx: abc.Transaction,
        principal: Principal,
        session_id: str,
        body: CreateChild,
        mark: Mark | None,
        place: Session | None,
    ) -> Session:
        parent = _session(tx, principal, session_id)
        self._check_tools(tx, principal)
        if parent.status is SessionStatus.STOPPED:
            raise SessionStopped
        if parent.status is SessionStatus.FAILED:
            raise SessionFailed
        options, now = self._service.options, utc_now()
        SessionLimits(options.max_sessions, options.max_sessions_per_user).spend(tx, parent.owner)
        options.trees.spend(tx, parent)
        environment = _environment(tx, principal, parent, body.environment)
        check_running(tx, environment.name)
        spend_environment(tx, environment, parent.owner)
        self._check_budget(tx, parent, body, now)
        turn_id = new_id()
        child = self._child(tx, parent, body, environment, place, turn_id, now)
        tx.sessions.add(child)
        tx.trees.add(child)
        transitions.emit(tx, child.id, SessionCreated(title=child.title, parent_id=parent.id))
        told = ChildCreated(child_session_id=child.id, turn_id=turn_id, task_type=body.task_type)
        transitions.emit(tx, parent.id, told)
        seconds = _least(body.timeout_seconds, _seconds_left(tx.turns.live(parent.id), now))
        prompt = CreateTurn(prompt=body.prompt, timeout_seconds=seconds)
        stored = tx.sessions.get(child.id) or child
        self._service.queue(tx, stored, prompt, None, options.trace(), turn_id=turn_id)
        if mark is not None:
            tx.idempotency.update(mark.principal, mark.key, object_id=child.id)
        return tx.sessions.get(child.id) or child

    async def check_tools(self, principal: Principal) -> None:
        """Make sure that a caller which is an agent has been given tools. Raises Forbidden."""
        await self._store.read(lambda tx: self._check_tools(tx, principal))

    def _check_tools(self, tx: abc.Transaction, principal: Principal) -> None:
        # Every agent holds a token and sees the gateway's socket, whether it has been given the tools or not.
        if not principal.name.startswith("sandbox:"):
            return
        own = _session(tx, principal, principal.session_id or "")
        if not self._owner.rights(own, environment_of(tx, own)).spec.session_tools:
            raise Forbidden("This session's agent was not given these tools; its creator can, with session_tools.")

    def _child(
        self,
        tx: abc.Transaction,
        parent: Session,
        body: CreateChild,
        environment: Environment,
        place: Session | None,
        turn_id: str,
        now: datetime,
    ) -> Session:
        above = self._owner.rights(parent, environment_of(tx, parent))
        own = inherited(above, SessionSpec.model_validate(parent.spec), environment, body.options)
        inherits = body.workspace is ChildFiles.INHERIT
        in_folder = inherits and parent.workspace.is_own
        uid_number = parent.uid_number
        if in_folder:
            uid_number = parent.uid_number or parent.number
        child = Session(
            id=place.id if place is not None else new_id(),
            number=place.number if place is not None else tx.sessions.next_number(),
            owner=parent.owner,
            uid_number=uid_number if inherits else None,
            status=SessionStatus.IDLE,
            title=body.title,
            spec=own.model_dump(mode="json", exclude_none=True),
            workspace=parent.workspace if inherits and not in_folder else Workspace(),
            workspace_id=parent.workspace_id if inherits else None,
            files_of=(parent.files_of or parent.id) if in_folder else None,
            metadata=body.metadata or {},
            environment=environment.name,
            environment_version=environment.version,
            cost_usd=0.0,
            budget=environments_budget(environment, body.budget),
            parent_id=parent.id,
            root_id=parent.root_id or parent.id,
            depth=parent.depth + 1,
            lineage=(*parent.lineage, parent.id),
            birth=Birth(
                files=body.workspace,
                on_parent_end=body.on_parent_end,
                context=body.context,
                task_type=body.task_type,
                turn_id=turn_id,
            ),
            snapshot_due=FORK if place is not None else None,
            created_at=now,
            last_active_at=now,
        )
        self._service.check_options(environment, own)
        check_within(above, self._owner.rights(child, environment))
        return child

    def _check_budget(self, tx: abc.Transaction, parent: Session, body: CreateChild, now: datetime) -> None:
        """A child's budget is of its parent's: it may be of what is left of that."""
        if body.budget is None:
            return
        accounts = accounts_of(tx, self._allowances, user_id=parent.owner, session=parent, now=now)
        for account in accounts:
            if account.kind is not BudgetKind.SESSION:
                continue
            usd, tokens = account.left_usd, account.left_tokens
            if usd is not None and body.budget.max_usd is not None and body.budget.max_usd > usd:
                raise WiderThanParent("budget", f"${usd:.4f} is left")
            if tokens is not None and body.budget.max_tokens is not None and body.budget.max_tokens > tokens:
                raise WiderThanParent("budget", f"{tokens} tokens are left")

    # -------------------------------------------------------------------------------------------------------- looking

    async def begun(self, principal: Principal, session_id: str) -> list[Session]:
        """Those that the session has begun and that are not deleted, oldest first."""

        def work(tx: abc.Transaction) -> list[Session]:
            _session(tx, principal, session_id)
            return list(tx.trees.children(session_id))

        return await self._store.read(work)

    async def child(self, principal: Principal, session_id: str, child_id: str) -> Session:
        """One of those that are below the session. Raises SessionNotFound for any other."""

        def work(tx: abc.Transaction) -> Session:
            _session(tx, principal, session_id)
            child = _session(tx, principal, child_id)
            if session_id not in child.lineage:
                raise SessionNotFound
            return child

        return await self._store.read(work)

    async def tree(self, principal: Principal, session_id: str) -> Node:
        """The session with all below it, and what each has cost with what is below it."""

        def work(tx: abc.Transaction) -> Node:
            top = _session(tx, principal, session_id)
            under: dict[str, list[Session]] = defaultdict(list)
            for each in tx.trees.below(session_id):
                under[each.parent_id or ""].append(each)
            return _node(tx, top, under)

        return await self._store.read(work)

    async def outcome(self, principal: Principal, session_id: str) -> Outcome:
        """How far the session has come with what it was last asked."""

        def work(tx: abc.Transaction) -> tuple[Session, Turn | None, bool]:
            session = _session(tx, principal, session_id)
            newest = next(iter(tx.turns.page(session_id, cursor=None, limit=1).items), None)
            return session, newest, tx.turns.live(session_id) is None and not tx.turns.queued(session_id)

        session, turn, complete = await self._store.read(work)
        # A session that is stopped goes on with nothing, whatever waits in it.
        complete = complete or session.status is SessionStatus.STOPPED
        result = await self._service.result(principal, session_id, turn.id) if turn is not None else None
        return Outcome(session=session, turn=result, complete=complete)

    async def follow(self, principal: Principal, session_id: str, *, seconds: float | None) -> AsyncIterator[Outcome]:
        """Wait until the session has nothing more to do, however long: an outcome now and then, the last one at the end.

        Args:
            principal: who waits.
            session_id: for whom.
            seconds: after it the wait ends, complete or not; None: never.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        found = await self.outcome(principal, session_id)
        while not found.complete:
            yield found
            left = _LOOK_AGAIN_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return
            await self._something_ends(found.session, min(left, _LOOK_AGAIN_SECONDS))
            found = await self.outcome(principal, session_id)
        yield found

    async def _something_ends(self, session: Session, seconds: float) -> None:
        """Wait for the end of a turn, or for so long."""
        batches = self._service.streams.follow(session.id, after=session.last_seq)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), contextlib.aclosing(batches):
                async for batch in batches:
                    if any(
                        getattr(frame, "type", "") in ("turn.completed", "session.status_changed") for frame in batch
                    ):
                        return

    # ---------------------------------------------------------------------------------------------------------- files

    async def patch(self, principal: Principal, session_id: str) -> bytes:
        """What a clone has changed since it was made, as a patch in git's words.

        Raises:
            NoPatch: the session is no clone, or what its files were is lost.
            FileTooLarge: there is too much in it.
        """
        session = await self._service.get(principal, session_id)
        files, base = await self._both(session)
        found: bytes = await self._run_blocking(make_patch, base, files, self._folders.owner(session))
        return found

    async def apply(self, principal: Principal, session_id: str) -> list[str]:
        """Do to the parent's files what a clone has done to its own. Answers the paths that have changed.

        Raises:
            NoPatch: as `patch`.
            PatchConflict: it does not fit; nothing was changed.
        """
        session = await self._service.get(principal, session_id)
        patch = await self.patch(principal, session_id)
        if session.parent_id is None:
            raise NoPatch
        parent = await self._service.get(principal, session.parent_id)
        target = await self._service.files(parent)
        async with self._keeper.changing(parent):
            changed: list[str] = await self._run_blocking(apply_patch, patch, target, self._folders.owner(parent))
        return changed

    async def _both(self, session: Session) -> tuple[WorkspaceFiles, WorkspaceFiles]:
        if session.birth is None or session.birth.files is not ChildFiles.CLONE:
            raise NoPatch
        files = await self._service.files(session)
        base: WorkspaceFiles | None = await self._run_blocking(self._folders.base, session)
        if base is None:
            raise NoPatch
        return files, base


# --------------------------------------------------------------------------------------------------- the transactions


def _session(tx: abc.Transaction, principal: Principal, session_id: str) -> Session:
    session = tx.sessions.get(session_id)
    if session is None or not principal.may_see(session):
        raise SessionNotFound
    return session


def _environment(tx: abc.Transaction, principal: Principal, parent: Session, name: str | None) -> Environment:
    """The version that the child is to be in: its parent's own, where nobody names another environment."""
    if name is None or name == parent.environment:
        return environment_of(tx, parent)
    return open_environment(tx, principal, name)


def _node(tx: abc.Transaction, session: Session, under: dict[str, list[Session]]) -> Node:
    (spent,) = tx.usage.sums(abc.UsageFilter(tree_of=session.id))
    return Node(
        session=session,
        usage=spent.usage,
        cost_usd=spent.cost_usd,
        children=[_node(tx, each, under) for each in under.get(session.id, [])],
    )


def _seconds_left(turn: Turn | None, now: datetime) -> float | None:
    if turn is None or turn.deadline_at is None:
        return None
    return max(0.001, (turn.deadline_at - now).total_seconds())


def _least(one: float | None, other: float | None) -> float | None:
    return min((each for each in (one, other) if each is not None), default=None)
