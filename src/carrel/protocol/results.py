"""What a turn came to, read from its events."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import Field

from carrel.model import Failure, Frozen, StopReason, Turn, TurnOrigin, TurnStatus, Usage
from carrel.protocol.events import StoredEvent


class ToolCall(Frozen):
    """A call of a tool and its result."""

    id: str
    tool: str
    input: dict[str, Any]
    result: Any = None
    is_error: bool | None = Field(default=None, description="None while, or if, the tool gave no result.")


class TurnResult(Frozen):
    """A turn that has ended, with what it came to."""

    id: str
    session_id: str
    status: TurnStatus
    stop_reason: StopReason | None
    text: str = Field(description="Every text block of the main thread, in order, joined.")
    structured_output: Any = None
    tool_calls: list[ToolCall]
    error: Failure | None = None
    usage: Usage
    cost_usd: float | None
    duration_ms: int | None
    num_turns: int


class TurnDetail(TurnResult):
    """A turn with what it has come to so far."""

    number: int = Field(description="Counts the turns of the session from 1.")
    origin: TurnOrigin
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime | None = Field(description="When the queue gives the turn up, if ever.")
    deadline_at: datetime | None = Field(description="When a running turn is interrupted, if ever.")


def result_of(turn: Turn, events: Iterable[StoredEvent]) -> TurnResult:
    """Read a turn's result from its events."""
    texts: list[str] = []
    calls: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.type == "message.assistant":
            data = event.data
            if data.get("parent_tool_use_id") is None:
                texts.append(data["text"])
        elif event.type == "tool.called":
            data = event.data
            calls[data["id"]] = {"id": data["id"], "tool": data["tool"], "input": data["input"]}
        elif event.type == "tool.finished":
            data = event.data
            if data["id"] in calls:
                calls[data["id"]] |= {"result": data["result"], "is_error": data["is_error"]}
    return TurnResult(
        id=turn.id,
        session_id=turn.session_id,
        status=turn.status,
        stop_reason=turn.stop_reason,
        text="".join(texts),
        structured_output=turn.structured_output,
        tool_calls=[ToolCall(**call) for call in calls.values()],
        error=turn.error,
        usage=turn.usage,
        cost_usd=turn.cost_usd,
        duration_ms=turn.duration_ms,
        num_turns=turn.num_turns,
    )
