"""The steps a session and its turns can take, each within one transaction.

Every change of a status goes through here, is checked against the tables in `model`, and leaves its event in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from carrel import abc
from carrel.model import (
    Failure,
    Interaction,
    InteractionStatus,
    SandboxStatus,
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
    """A new sandbox takes up a turn whose first one was lost, or has ended while it waited for a person."""
    attempt = turn.options.get("attempt", 1) + 1
    waited = open_call(tx, turn) is not None
    for asked in tx.interactions.pending(session.id):
        # The new agent asks again, by the same row where it is the same call.
        tx.interactions.update(asked.id, parked=True)
    if turn.status is TurnStatus.WAITING:
        turn = tx.turns.update(turn.id, status=TurnStatus.RUNNING)
    tx.turns.update(turn.id, sandbox_id=sandbox_id, options=turn.options | {"attempt": attempt})
    set_status(tx, session, SessionStatus.RUNNING)
    if not waited:
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
    _withdraw(tx, ended)
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
    """A person is asked: the turn, and with it the session, waits for the answer.

    An agent in the background may ask when no turn is at work: then nothing waits but that agent.
    """
    turn = tx.turns.get(interaction.turn_id) if interaction.turn_id is not None else None
    if turn is None or turn.status.ended:
        turn, interaction = None, interaction.model_copy(update={"turn_id": None})
    if not tx.interactions.add(interaction):
        _ask_again(tx, session, turn, interaction)
        return
    emit(
        tx,
        session.id,
        events.InteractionRequested(
            interaction_id=interaction.id,
            kind=interaction.kind,
            tool=interaction.tool,
            input=interaction.input,
            title=interaction.title,
            reason=interaction.reason,
            expires_at=interaction.expires_at,
        ),
        turn_id=interaction.turn_id,
    )
    _wait(tx, session, turn)


def _ask_again(tx: abc.Transaction, session: Session, turn: Turn | None, interaction: Interaction) -> None:
    """The same call has come once more, from another agent or after it was put aside: it waits by the same row."""
    now: dict[str, Any] = {"parked": False}
    now |= {name: getattr(interaction, name) for name in ("lone", "tool_use_id", "turn_id")}
    asked = tx.interactions.get(interaction.id)
    if asked is None or asked.status is not InteractionStatus.PENDING or asked.session_id != session.id:
        return
    tx.interactions.update(asked.id, **now)
    _wait(tx, session, turn)


def _wait(tx: abc.Transaction, session: Session, turn: Turn | None) -> None:
    if turn is None:
        return
    if turn.status is TurnStatus.RUNNING:
        tx.turns.update(turn.id, status=TurnStatus.WAITING)
    set_status(tx, session, SessionStatus.WAITING, stop_reason=StopReason.REQUIRES_ACTION)


def park(tx: abc.Transaction, session: Session, interaction_id: str) -> None:
    """The call was denied for now; what is asked stays, and its answer is for the next such call."""
    asked = tx.interactions.get(interaction_id)
    if asked is None or asked.session_id != session.id:
        return
    tx.interactions.update(asked.id, parked=True)
    if asked.status is InteractionStatus.PENDING:
        _go_on(tx, session.id, asked.turn_id)


def remind(tx: abc.Transaction, interaction: Interaction) -> None:
    """People are told again of what still waits. It stays as it is: silence is no answer."""
    if interaction.remind_seconds is None:
        return
    again = utc_now() + timedelta(seconds=interaction.remind_seconds)
    tx.interactions.update(interaction.id, remind_at=again)
    emit(
        tx,
        interaction.session_id,
        events.InteractionReminded(interaction_id=interaction.id, remind_at=again),
        turn_id=interaction.turn_id,
    )


def open_call(tx: abc.Transaction, turn: Turn) -> Interaction | None:
    """The turn's one call that has been asked about and has not happened: without a process it can wait, and go on."""
    return None if turn.status.ended else call_of(turn, tx.interactions.untaken(turn.session_id))


def call_of(turn: Turn, untaken: Sequence[Interaction]) -> Interaction | None:
    """The same, among those of its session that no agent has acted on."""
    return next((each for each in untaken if each.lone and not each.parked and each.turn_id == turn.id), None)


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
    _go_on(tx, resolved.session_id, resolved.turn_id)
    return resolved


def _go_on(tx: abc.Transaction, session_id: str, turn_id: str | None) -> None:
    """The turn is at work again, if it waits for nobody any more."""
    session = tx.sessions.get(session_id)
    turn = tx.turns.get(turn_id) if turn_id is not None else None
    if session is None or turn is None or turn.status is not TurnStatus.WAITING:
        return
    if any(not each.parked for each in tx.interactions.pending(session.id)):
        return
    tx.turns.update(turn.id, status=TurnStatus.RUNNING)
    sandbox = tx.sandboxes.current(session.id)
    if sandbox is None or sandbox.status is SandboxStatus.ENDING:
        # Its process has ended meanwhile: the session's next step starts another, and says so.
        tx.sessions.update(session.id, **touch(session, utc_now()))
        return
    set_status(tx, session, SessionStatus.RUNNING, **touch(session, utc_now()))


def _withdraw(tx: abc.Transaction, turn: Turn) -> None:
    """Nobody needs an answer for a turn that has ended, and one that it had got is not for another.

    Where it has ended well, whatever still waits is an agent's in the background, which lives on.
    """
    for asked in tx.interactions.untaken(turn.session_id):
        if asked.turn_id != turn.id or asked.parked:
            continue
        if asked.status is not InteractionStatus.PENDING:
            tx.interactions.update(asked.id, taken_at=utc_now())
        elif turn.status is TurnStatus.SUCCEEDED:
            tx.interactions.update(asked.id, turn_id=None)
        else:
            resolve(tx, asked.id, InteractionStatus.WITHDRAWN)


def withdraw_detached(tx: abc.Transaction, session_id: str) -> None:
    """The sandbox is gone, and with it every agent in the background."""
    for asked in tx.interactions.pending(session_id):
        if asked.turn_id is None and not asked.parked:
            resolve(tx, asked.id, InteractionStatus.WITHDRAWN)


def withdraw_all(tx: abc.Transaction, session_id: str) -> None:
    """Nobody needs an answer for a session that is stopped."""
    for asked in tx.interactions.untaken(session_id):
        if asked.status is InteractionStatus.PENDING:
            resolve(tx, asked.id, InteractionStatus.WITHDRAWN)
        else:
            tx.interactions.update(asked.id, taken_at=utc_now())


def _check(turn: Turn, status: TurnStatus) -> None:
    if not turn_may_become(turn.status, status):
        raise IllegalTransition(f"turn {turn.id}: {turn.status} to {status}")
