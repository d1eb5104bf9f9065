"""Snapshots, for callers: taken, listed, put back; and a session's way back to the end of an earlier turn."""

from __future__ import annotations

from carrel import abc
from carrel.errors import (
    FilesShared,
    SessionNotFound,
    SnapshotMissing,
    SnapshotNotFound,
    TurnAtWork,
    TurnNotFinished,
    TurnNotFound,
    TurnRewound,
)
from carrel.killpoints import reached
from carrel.model import (
    Principal,
    Restoring,
    SandboxStatus,
    Session,
    SessionStatus,
    Snapshot,
    SnapshotReason,
    Turn,
    WorkspaceMode,
)
from carrel.sessions import transitions
from carrel.sessions.keeper import Keeper
from carrel.sessions.scheduler import Scheduler

__all__ = ["Snapshots", "check_not_rewound", "is_rewound"]

_SETTLE_SECONDS = 10.0
_PUT_BACK_SECONDS = 60.0


class Snapshots:
    """What is kept of sessions' files."""

    def __init__(self, store: abc.Store, keeper: Keeper, scheduler: Scheduler) -> None:
        """Make it over the parts that do the work."""
        self._store = store
        self._keeper = keeper
        self._scheduler = scheduler

    async def page(
        self, principal: Principal, session_id: str, *, cursor: str | None, limit: int
    ) -> abc.Page[Snapshot]:
        """A session's snapshots, newest first. Raises InvalidCursor."""

        def work(tx: abc.Transaction) -> abc.Page[Snapshot]:
            _session(tx, principal, session_id)
            return tx.snapshots.page(session_id, cursor=cursor, limit=limit)

        return await self._store.read(work)

    async def get(self, principal: Principal, session_id: str, snapshot_id: str) -> tuple[Session, Snapshot]:
        """A session and one of its snapshots. Raises SnapshotNotFound."""
        return await self._store.read(lambda tx: _snapshot(tx, principal, session_id, snapshot_id))

    async def take(self, principal: Principal, session_id: str) -> Snapshot:
        """Take one now, be a turn at work or not. Raises Unavailable, and FilesShared for a user's directory."""
        session = await self._store.read(lambda tx: _session(tx, principal, session_id))
        if session.workspace.type == "user":
            raise FilesShared("A user's own directory is not kept in snapshots.")
        await self._keeper.ensure(session)
        return await self._keeper.take(session, SnapshotReason.ASKED.value)

    async def restore(self, principal: Principal, session_id: str, snapshot_id: str) -> Session:
        """Put the files back to a snapshot; the conversation stays.

        Raises:
            TurnAtWork: a turn of the session waits or is at work.
            FilesShared: others work in the same folder.
            Unavailable: the object store is away; nothing has changed.
        """
        session, snapshot = await self.get(principal, session_id, snapshot_id)
        return await self._go_back(principal, session, snapshot, None)

    async def rewind(
        self, principal: Principal, session_id: str, *, turn_id: str | None, seq: int | None, files: bool
    ) -> Session:
        """Go back to the end of a turn: the conversation, and the files as they were then.

        Args:
            principal: who asks.
            session_id: the session.
            turn_id: the turn.
            seq: in its place: the last turn that had ended by the event of this number.
            files: whether the files go back too.

        Raises:
            TurnNotFinished: the turn has not ended.
            TurnRewound: the session has gone back behind it already.
            SnapshotMissing: its files were not kept.
            TurnAtWork, FilesShared, Unavailable: as `restore`.
        """
        await self._keeper.settled(session_id, _SETTLE_SECONDS)

        def work(tx: abc.Transaction) -> tuple[Session, Turn, Snapshot | None]:
            session = _session(tx, principal, session_id)
            turn = _turn(tx, session, turn_id, seq)
            return session, turn, tx.snapshots.of_turn(turn.id) if files else None

        session, turn, snapshot = await self._store.read(work)
        if files and session.workspace.type != "user" and snapshot is None:
            raise SnapshotMissing
        if files and session.workspace.type == "user":
            raise FilesShared
        return await self._go_back(principal, session, snapshot, turn)

    async def _go_back(
        self, principal: Principal, session: Session, snapshot: Snapshot | None, turn: Turn | None
    ) -> Session:
        def work(tx: abc.Transaction) -> None:
            now = _session(tx, principal, session.id)
            _check_at_rest(tx, now, shared=snapshot is not None)
            sandbox = tx.sandboxes.current(now.id)
            if sandbox is not None:
                tx.sandboxes.update(sandbox.id, status=SandboxStatus.ENDING)
            if now.status is SessionStatus.READY:
                transitions.set_status(tx, now, SessionStatus.IDLE)
            wanted = Restoring(
                snapshot_id=snapshot.id if snapshot is not None else None,
                turn_id=turn.id if turn is not None else None,
                upto_turn=tx.turns.next_number(now.id) - 1,
            )
            tx.sessions.update(now.id, restoring=wanted)

        async with self._keeper.changing(session):
            # Nothing has changed before all of it lies ready.
            await self._store.read(lambda tx: _check_at_rest(tx, session, shared=snapshot is not None))
            if snapshot is not None:
                await self._keeper.stage(session, snapshot)
            await self._store.write(work)
        reached("restore.marked")
        await self._scheduler.settle(session.id)
        for _ in range(3):  # its sandbox is ended by one step, what is wanted done by the next
            now = await self._store.read(lambda tx: _session(tx, principal, session.id))
            if now.restoring is None:
                break
            await self._scheduler.settle(session.id)
        return now


def is_rewound(session: Session, turn: Turn) -> bool:
    """Whether the session has gone back behind the turn, which is no part of its conversation any more."""
    return any(part.after_turn < turn.number <= part.upto_turn for part in session.rewound)


def check_not_rewound(session: Session, turn: Turn) -> None:
    """Go on only if the turn is part of the session's conversation. Raises TurnRewound."""
    if is_rewound(session, turn):
        raise TurnRewound


def _check_at_rest(tx: abc.Transaction, session: Session, *, shared: bool) -> None:
    if session.restoring is not None or tx.turns.live(session.id) is not None or tx.turns.queued(session.id):
        raise TurnAtWork
    if session.status is SessionStatus.STARTING:
        raise TurnAtWork
    if shared and (session.files_of is not None or _with_children(tx, session)):
        raise FilesShared
    if not shared or session.workspace_id is None:
        return
    workspace = tx.workspaces.get(session.workspace_id)
    if workspace is None or workspace.mode is WorkspaceMode.SHARE:
        raise FilesShared
    if any(each.session_id != session.id for each in tx.sandboxes.in_workspace(workspace.id)):
        raise FilesShared("Another session is in this workspace now; let it come to rest first.")


def _with_children(tx: abc.Transaction, session: Session) -> bool:
    """Whether sessions below it work in its folder."""
    at_rest = (SessionStatus.STOPPED, SessionStatus.FAILED)
    return any(each.files_of == session.id and each.status not in at_rest for each in tx.trees.below(session.id))


def _session(tx: abc.Transaction, principal: Principal, session_id: str) -> Session:
    session = tx.sessions.get(session_id)
    if session is None or not principal.may_see(session):
        raise SessionNotFound
    return session


def _snapshot(tx: abc.Transaction, principal: Principal, session_id: str, snapshot_id: str) -> tuple[Session, Snapshot]:
    session = _session(tx, principal, session_id)
    snapshot = tx.snapshots.get(snapshot_id)
    if snapshot is None or snapshot.session_id != session_id:
        raise SnapshotNotFound
    return session, snapshot


def _turn(tx: abc.Transaction, session: Session, turn_id: str | None, seq: int | None) -> Turn:
    if turn_id is not None:
        turn = tx.turns.get(turn_id)
        if turn is None or turn.session_id != session.id:
            raise TurnNotFound
        if not turn.status.ended or turn.started_at is None:
            raise TurnNotFinished
        check_not_rewound(session, turn)
        return turn
    upto = seq
    while (found := tx.events.completed(session.id, upto=upto)) is not None:
        turn = tx.turns.get(found[0])
        if turn is not None and turn.started_at is not None:
            check_not_rewound(session, turn)
            return turn
        upto = found[1] - 1  # one that never began
    raise TurnNotFound
