"""What is kept of the files of sessions, in rows: the transactions of the keeper, and where its objects lie."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from carrel import abc
from carrel.errors import CarrelError, SessionNotFound, TurnAtWork
from carrel.model import Session, Snapshot, SnapshotReason, new_id, utc_now
from carrel.protocol import events
from carrel.sessions import transitions
from carrel.sessions.workspaces import objects_of_workspace
from carrel.workspaces.pruning import KeepRules, over_total, superfluous

__all__ = [
    "Saved",
    "Vault",
    "begin_filling",
    "check_at_rest",
    "forget_files",
    "kept_of",
    "newest_of",
    "no_longer_due",
    "objects_of_files",
    "objects_of_session",
    "prune",
    "remove_snapshots",
    "snapshot_of",
    "tell",
]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was kept."""

    size_bytes: int
    """What the files take."""
    stored_bytes: int
    """What the object takes."""
    files: int


class Vault(Protocol):
    """Keeps the files of folders as objects. Raises errors of kind Unavailable while the object store is away."""

    async def save(self, session: Session, key: str, *, since: str | None) -> Saved | None:
        """Keep the session's workspace under a key. None where nothing has changed since the object `since`."""

    async def restore(self, session: Session, key: str, target: Path) -> None:
        """Put what was kept into a folder that is not there yet, and give it to the session's owner."""

    async def delete(self, prefix: str) -> None:
        """Delete every object whose key begins so."""


def begin_filling(tx: abc.Transaction, session_id: str, due: str) -> None:
    """Files are about to be brought in, and are to be kept afterwards. Raises TurnAtWork, and SessionNotFound."""
    session = tx.sessions.get(session_id)
    if session is None:
        raise SessionNotFound
    check_at_rest(tx, session)
    if session.snapshot_due is None:
        tx.sessions.update(session_id, snapshot_due=due)


def check_at_rest(tx: abc.Transaction, session: Session) -> None:
    """Make sure that no turn waits or is at work in the session's files. Raises TurnAtWork."""
    if session.restoring is not None or tx.turns.live(session.id) is not None or tx.turns.queued(session.id):
        raise TurnAtWork
    shared = session.workspace_id
    others = [each.session_id for each in tx.sandboxes.in_workspace(shared)] if shared is not None else []
    if any(tx.turns.live(other) is not None for other in others):
        raise TurnAtWork("A turn of another session is at work in this workspace; wait for its end.")


def objects_of_session(session_id: str) -> str:
    """What the keys of all objects begin with that go with the session."""
    return f"sessions/{session_id}/"


def forget_files(tx: abc.Transaction, session_id: str) -> None:
    """The session goes: so do its snapshots and artifacts, but for the newest of a workspace that stays."""
    gone = []
    for snapshot in tx.snapshots.of_files(session_id=session_id):
        if snapshot.workspace_id is not None:
            newest = tx.snapshots.of_files(workspace_id=snapshot.workspace_id)[0]
            if newest.id == snapshot.id:
                continue
        gone.append(snapshot.id)
    remove_snapshots(tx, gone)
    tx.doomed.add(objects_of_session(session_id))


def prune(tx: abc.Transaction, session: Session, rules: KeepRules) -> None:
    """Forget what the rules do not keep, after the session has got another snapshot."""
    remove_snapshots(tx, superfluous(kept_of(tx, session), rules, now=utc_now()))
    if rules.max_bytes_of_user is not None:
        remove_snapshots(tx, over_total(tx.snapshots.of_files(owner=session.owner), rules.max_bytes_of_user))


def remove_snapshots(tx: abc.Transaction, snapshot_ids: Sequence[str]) -> None:
    """Forget these, and have the objects deleted that no other needs."""
    for key in tx.snapshots.remove(snapshot_ids):
        tx.doomed.add(key)


def objects_of_files(session: Session) -> str:
    if session.workspace_id is not None:
        return objects_of_workspace(session.workspace_id)
    return objects_of_session(session.id)


def kept_of(tx: abc.Transaction, session: Session) -> Sequence[Snapshot]:
    """Every snapshot of the session's files, newest first."""
    if session.workspace_id is not None:
        return tx.snapshots.of_files(workspace_id=session.workspace_id)
    return tx.snapshots.of_files(session_id=session.id)


def newest_of(tx: abc.Transaction, session: Session) -> Snapshot | None:
    return next(iter(kept_of(tx, session)), None)


def snapshot_of(
    tx: abc.Transaction,
    session: Session,
    due: str,
    key: str,
    saved: Saved | None,
    newest: Snapshot | None,
    *,
    exact: bool,
) -> Snapshot:
    if saved is None and newest is not None:
        key = newest.key
        saved = Saved(size_bytes=newest.size_bytes, stored_bytes=newest.stored_bytes, files=newest.files)
    if saved is None:
        raise CarrelError("Nothing was kept.")
    turn = due if due not in set(SnapshotReason) else None
    ended = tx.events.completed(session.id, turn_id=turn) if turn is not None else None
    return Snapshot(
        id=new_id(),
        session_id=session.id,
        workspace_id=session.workspace_id,
        number=time.time_ns() // 1000,
        reason=SnapshotReason.TURN if turn is not None else SnapshotReason(due),
        turn_id=turn,
        seq=ended[1] if ended is not None else session.last_seq,
        exact=exact,
        key=key,
        size_bytes=saved.size_bytes,
        stored_bytes=saved.stored_bytes,
        files=saved.files,
        created_at=utc_now(),
    )


def no_longer_due(tx: abc.Transaction, session_id: str, due: str) -> None:
    session = tx.sessions.get(session_id)
    if session is not None and session.snapshot_due == due:
        tx.sessions.update(session_id, snapshot_due=None)


def tell(tx: abc.Transaction, session_id: str, said: events.EventData) -> None:
    session = tx.sessions.get(session_id)
    if session is not None:
        live = tx.turns.live(session_id)
        transitions.emit(tx, session_id, said, turn_id=live.id if live is not None else None)
