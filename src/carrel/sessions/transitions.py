"""The steps a session and its turns can take, each within one transaction.

Every change of a status goes through here, is checked against the tables in `model`, and leaves its event in the log.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from carrel import abc
from carrel.model import (
    Failure,
    Interaction,
    InteractionStatus,
    Session,
    SessionStatus,
    SnapshotReason,
    StopReason,
    Turn,
    TurnOrigin,
    TurnStatus,
    session_may_become,
    turn_may_become,
    utc_now,
)
from carrel.protocol import events


class IllegalTransition(RuntimeError):
    """A bug: a status was to change in a way the tables do not allow."""


def emit(tx: abc.Transaction, session_id: str, *data: events.EventData, turn_id: str | None = None) -> None:
    """Append events that happen now."""
    now = utc_now()
    tx.events.append(session_id, [events.NewEvent.of(item, at=now, turn_id=turn_id) for item in data])


def touch(session: Session, now: datetime) -> dict[str, Any]:
    """The columns that say that the session was used just now."""
    expires = None if session.ttl_seconds is None else now + timedelta(seconds=session.ttl_seconds)
    return {"last_active_at": now, "expires_at": expires}


def set_status(
    tx: abc.Transaction,
    session: Session,
    status: SessionStatus,
    *,
    stop_reason: StopReason | None = None,
    error: Failure | None = None,
    **changes: Any,
) -> Session:
    """Change a session's status, and with it whatever columns `changes` names."""
    if session.status is status:
        return tx.sessions.update(session.id, **changes) if changes else session
    if not session_may_become(session.status, status):
        raise IllegalTransition(f"session {session.id}: {session.status} to {status}")
    changed = {"status": status, "error": error, **changes}
    if stop_reason is not None:
        changed["stop_reason"] = stop_reason
    updated = tx.sessions.update(session.id, **changed)
    if session.reserved is not None:
        return updated  # it is nobody's yet: what is told of it begins when it is taken
    emit(
        tx,
        session.id,
        events.SessionStatusChanged(status=status, previous=session.status, stop_reason=stop_reason, error=error),
    )
    return updated


def tell_of_start(tx: abc.Transaction, session: Session) -> None:
    """Tell of the steps that a session from a warm pool took while it was nobody's."""
    emit(
        tx,
        session.id,
        events.SessionStatusChanged(status=SessionStatus.STARTING, previous=SessionStatus.IDLE),
        events.SessionStatusChanged(status=SessionStatus.READY, previous=SessionStatus.STARTING),
    )


def settle(tx: abc.Transaction, session: Session, *, stop_reason: StopReason | None = None) -> Session:
    """A session whose sandbox is gone: live statuses become `idle`."""
    if session.status in (SessionStatus.IDLE, SessionStatus.STOPPED, SessionStatus.FAILED):
        return session
    return set_status(tx, session, SessionStatus.IDLE, stop_reason=stop_reason)


def start_turn(tx: abc.Transaction, session: Session, turn: Turn, sandbox_id: str) -> Turn:
    """The turn is handed to the agent: from here on it is never handed over again by a new sandbox."""
    _check(turn, TurnStatus.RUNNING)
    now = utc_now()
    seconds = turn.options.get("timeout_seconds")
    updated = tx.turns.update(
        turn.id,
        status=TurnStatus.RUNNING,
        started_at=now,
        sandbox_id=sandbox_id,
        deadline_at=None if seconds is None else now + timedelta(seconds=seconds),
    )
    set_status(tx, session, SessionStatus.RUNNING, **touch(session, now))
    emit(
        tx,
        session.id,
        events.TurnStarted(origin=TurnOrigin.PROMPT),
        events.MessageUser(content=turn.content),
        turn_id=turn.id,
    )
    return updated


def continue_turn(tx: abc.Transaction, session: Session, turn: Turn, sandbox_id: str) -> None:
    """A new sandbox takes up a turn whose first one was lost."""
    attempt = turn.options.get("attempt", 1) + 1
    tx.turns.update(turn.id, sandbox_id=sandbox_id, options=turn.options | {"attempt": attempt})
    set_status(tx, session, SessionStatus.RUNNING)
    emit(tx, session.id, events.TurnStarted(origin=turn.origin, attempt=attempt), turn_id=turn.id)


def begin_agent_turn(tx: abc.Transaction, session: Session, turn_id: str, at: datetime, sandbox_id: str) -> None:
    """The agent has begun a run by itself."""
    number = tx.turns.next_number(session.id)
    tx.turns.add(
        Turn(
            id=turn_id,
            session_id=session.id,
            number=number,
            origin=TurnOrigin.AGENT,
            status=TurnStatus.RUNNING,
            sandbox_id=sandbox_id,
            created_at=at,
            started_at=at,
        )
    )
    set_status(tx, session, SessionStatus.RUNNING, turn_count=session.turn_count + 1, **touch(session, at))
    emit(tx, session.id, events.TurnStarted(origin=TurnOrigin.AGENT), turn_id=turn_id)


def complete_turn(
    tx: abc.Transaction,
    session: Session,
    turn: Turn,
    status: TurnStatus,
    *,
    stop_reason: StopReason | None,
    error: Failure | None = None,
    structured_output: Any = None,
    num_turns: int = 0,
    ended_at: datetime | None = None,
) -> Turn:
    """End a turn, whatever the reason. Its session's own status is changed by the caller."""
    _check(turn, status)
    now = ended_at or utc_now()
    usage, cost, _ = tx.usage.of_turn(turn.id)
    duration = None if turn.started_at is None else max(0, round((now - turn.started_at).total_seconds() * 1000))
    ended = tx.turns.update(
        turn.id,
        status=status,
        stop_reason=stop_reason,
        error=error,
        structured_output=structured_output,
        usage=usage,
        cost_usd=cost,
        num_turns=num_turns,
        duration_ms=duration,
        ended_at=now,
    )
    _withdraw(tx, turn)
    if turn.started_at is not None:
        tx.sessions.update(session.id, snapshot_due=turn.id)
    emit(
        tx,
        session.id,
        events.TurnCompleted(
            status=status,
            stop_reason=stop_reason,
            error=error,
            structured_output=structured_output,
            usage=usage,
            cost_usd=cost,
            num_turns=num_turns,
            duration_ms=duration,
        ),
        turn_id=turn.id,
    )
    _tell_others(tx, session, ended)
    return ended


def _tell_others(tx: abc.Transaction, session: Session, ended: Turn) -> None:
    """The end of a child's turn stands in its parent's log too, and the files it has worked on are to be kept."""
    if session.parent_id is None:
        return
    if session.files_of is not None:
        owner = tx.sessions.get(session.files_of)
        if owner is not None and owner.snapshot_due is None and ended.started_at is not None:
            tx.sessions.update(owner.id, snapshot_due=SnapshotReason.RELEASE.value)
    if tx.sessions.get(session.parent_id) is None:
        return
    told = events.ChildEnded(
        child_session_id=session.id,
        turn_id=ended.id,
        status=ended.status,
        stop_reason=ended.stop_reason,
        error=ended.error,
        cost_usd=ended.cost_usd,
    )
    emit(tx, session.parent_id, told)


def fail_turn(tx: abc.Transaction, session: Session, turn: Turn, error: Failure, stop_reason: StopReason) -> Turn:
    """End a turn as failed."""
    return complete_turn(tx, session, turn, TurnStatus.FAILED, stop_reason=stop_reason, error=error)


def ask(tx: abc.Transaction, session: Session, interaction: Interaction) -> None:
    """A person is asked: the turn, and with it the session, waits for the answer."""
    turn = tx.turns.get(interaction.turn_id) if interaction.turn_id is not None else None
    if turn is None or turn.status.ended or not tx.interactions.add(interaction):
        return
    emit(
        tx,
        session.id,
        events.InteractionRequested(
            interaction_id=interaction.id,
            kind=interaction.kind,
            tool=interaction.tool,
            input=interaction.input,
            title=interaction.reason,
            expires_at=interaction.expires_at,
        ),
        turn_id=turn.id,
    )
    if turn.status is TurnStatus.RUNNING:
        tx.turns.update(turn.id, status=TurnStatus.WAITING)
    set_status(tx, session, SessionStatus.WAITING, stop_reason=StopReason.REQUIRES_ACTION)


def resolve(
    tx: abc.Transaction,
    interaction_id: str,
    status: InteractionStatus,
    *,
    answer: dict[str, Any] | None = None,
    answered_by: str | None = None,
) -> Interaction | None:
    """What waited for a person no longer does; with the last one of a turn, the turn is at work again.

    Answers None where it was not pending any more.
    """
    now = utc_now()
    changes = {"status": status, "answer": answer, "answered_by": answered_by, "resolved_at": now}
    resolved = tx.interactions.resolve(interaction_id, **changes)
    if resolved is None:
        return None
    emit(
        tx,
        resolved.session_id,
        events.InteractionResolved(interaction_id=resolved.id, status=status, answer=answer, answered_by=answered_by),
        turn_id=resolved.turn_id,
    )
    session = tx.sessions.get(resolved.session_id)
    turn = tx.turns.get(resolved.turn_id) if resolved.turn_id is not None else None
    if session is None or turn is None or turn.status is not TurnStatus.WAITING or tx.interactions.pending(session.id):
        return resolved
    tx.turns.update(turn.id, status=TurnStatus.RUNNING)
    set_status(tx, session, SessionStatus.RUNNING, **touch(session, now))
    return resolved


def _withdraw(tx: abc.Transaction, turn: Turn) -> None:
    """Nobody needs an answer for a turn that has ended."""
    for pending in tx.interactions.pending(turn.session_id):
        if pending.turn_id == turn.id:
            resolve(tx, pending.id, InteractionStatus.WITHDRAWN)


def _check(turn: Turn, status: TurnStatus) -> None:
    if not turn_may_become(turn.status, status):
        raise IllegalTransition(f"turn {turn.id}: {turn.status} to {status}")
