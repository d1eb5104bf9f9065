"""What a turn came to, read from the events a client has seen of it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic_core import to_json

from carrel.client.types import Event
from carrel.model import Turn
from carrel.protocol.events import StoredEvent, TurnCompleted
from carrel.protocol.results import TurnResult, result_of

__all__ = ["result_of_events"]

_TELLING = frozenset({"message.assistant", "tool.called", "tool.finished"})


def result_of_events(session_id: str, events: Sequence[Event]) -> TurnResult:
    """The result of a turn from all of its events, of which the last is its `turn.completed`."""
    end = events[-1].fact
    if not isinstance(end, TurnCompleted):
        raise ValueError("the last event does not end the turn")
    turn = Turn(
        id=events[-1].turn_id or "",
        session_id=session_id,
        number=0,
        status=end.status,
        stop_reason=end.stop_reason,
        error=end.error,
        structured_output=end.structured_output,
        usage=end.usage,
        cost_usd=end.cost_usd,
        num_turns=end.num_turns,
        duration_ms=end.duration_ms,
        created_at=events[0].at,
    )
    return result_of(turn, [_stored(session_id, event) for event in events if event.type in _TELLING])


def _stored(session_id: str, event: Event) -> StoredEvent:
    data = to_json(event.data).decode()
    return StoredEvent(
        session_id=session_id, seq=event.seq, turn_id=event.turn_id, type=event.type, at=event.at, raw_data=data
    )
