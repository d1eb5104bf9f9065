"""Sessions that were begun in another service: brought in whole, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from carrel import abc
from carrel.model import Budget, Session, SessionStatus, Workspace
from carrel.protocol.events import SessionCreated
from carrel.protocol.spec import SessionSpec
from carrel.sessions import transitions
from carrel.sessions.service import number_of_user

__all__ = ["ImportedSession", "add_imported"]


@dataclass(frozen=True, kw_only=True)
class ImportedSession:
    """A session as another service had it."""

    id: str
    owner: str
    spec: SessionSpec
    workspace: Workspace
    metadata: dict[str, Any]
    budget: Budget | None
    turn_count: int
    created_at: datetime
    last_active_at: datetime
    ttl_seconds: int | None
    transcripts: Sequence[tuple[str, Sequence[str]]]
    """Each with its subpath (empty for the main one) and its lines, as an agent in `/workspace` would have written
    them under the session's id."""


def add_imported(tx: abc.Transaction, given: ImportedSession, now: datetime) -> bool:
    """Store the session and its transcripts, and its owner where nobody knows it yet. Its time to live begins now.

    Answers False, and changes nothing, where a session with this id is there or is being deleted.
    """
    if tx.sessions.get(given.id) is not None or tx.sessions.deleting(given.id):
        return False
    tx.users.ensure(given.owner, now)
    of_user = number_of_user(tx, given.owner) if given.workspace.type == "user" else None
    lives = None if given.ttl_seconds is None else now + timedelta(seconds=given.ttl_seconds)
    session = Session(
        id=given.id,
        number=tx.sessions.next_number(),
        owner=given.owner,
        uid_number=of_user,
        status=SessionStatus.IDLE,
        spec=given.spec.model_dump(mode="json", exclude_none=True),
        workspace=given.workspace,
        metadata=given.metadata,
        budget=given.budget,
        agent_session_id=given.id if any(not subpath for subpath, _ in given.transcripts) else None,
        turn_count=given.turn_count,
        cost_usd=0.0,
        ttl_seconds=given.ttl_seconds,
        created_at=given.created_at,
        last_active_at=given.last_active_at,
        expires_at=lives,
    )
    tx.sessions.add(session)
    transitions.emit(tx, session.id, SessionCreated(title=None))
    for subpath, lines in given.transcripts:
        tx.transcripts.append(session.id, subpath=subpath, turn_id=None, lines=lines)
    return True
