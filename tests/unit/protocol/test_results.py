"""What a turn came to, read from its events."""

from datetime import UTC, datetime

from carrel.model import StopReason, Turn, TurnStatus, Usage
from carrel.protocol import events
from carrel.protocol.events import EventData, StoredEvent
from carrel.protocol.results import ToolCall, result_of

AT = datetime(2026, 1, 1, tzinfo=UTC)


def log(*data: EventData) -> list[StoredEvent]:
    return [
        StoredEvent(
            session_id="s", seq=i, turn_id="t", type=item.type, at=AT, raw_data=item.model_dump_json()
        )
        for i, item in enumerate(data, start=1)
    ]  # fmt: skip


def turn(**changes: object) -> Turn:
    values = {"id": "t", "session_id": "s", "number": 1, "status": TurnStatus.SUCCEEDED, "created_at": AT}
    return Turn.model_validate(values | changes)


def test_the_text_is_that_of_the_main_thread_in_order() -> None:
    said = log(
        events.MessageAssistant(message_id="m", block=0, text="one "),
        events.MessageAssistant(message_id="n", block=0, text="(a sub-agent)", parent_tool_use_id="toolu"),
        events.Thinking(message_id="m", block=1, text="hidden"),
        events.MessageUser(content=[{"type": "text", "text": "the prompt"}]),
        events.MessageAssistant(message_id="m", block=2, text="two"),
    )
    assert result_of(turn(), said).text == "one two"


def test_calls_are_paired_with_their_results_and_keep_their_order() -> None:
    said = log(
        events.ToolCalled(id="a", tool="Bash", input={"command": "x"}),
        events.ToolCalled(id="b", tool="Read", input={}),
        events.ToolFinished(id="b", tool="Read", result="late", is_error=True),
        events.ToolFinished(id="unknown", result="of nobody's"),
        events.ToolFinished(id="a", tool="Bash", result=[{"type": "text", "text": "out"}]),
        events.ToolCalled(id="c", tool="Bash", input={}),
    )
    assert result_of(turn(), said).tool_calls == [
        ToolCall(id="a", tool="Bash", input={"command": "x"}, result=[{"type": "text", "text": "out"}], is_error=False),
        ToolCall(id="b", tool="Read", input={}, result="late", is_error=True),
        ToolCall(id="c", tool="Bash", input={}, result=None, is_error=None),
    ]


def test_the_rest_is_the_turns_own() -> None:
    ended = turn(
        status=TurnStatus.FAILED, stop_reason=StopReason.TIMEOUT, usage=Usage(input_tokens=3), cost_usd=0.5,
        duration_ms=7, num_turns=2, structured_output={"a": 1},
    )  # fmt: skip
    result = result_of(ended, [])
    assert (result.text, result.tool_calls) == ("", [])
    for name in ("id", "session_id", "status", "stop_reason", "usage", "cost_usd", "duration_ms", "num_turns"):
        assert getattr(result, name) == getattr(ended, name)
    assert result.structured_output == {"a": 1}
