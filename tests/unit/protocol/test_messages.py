"""Messages are whole, in order, and the same whichever page they come on."""

from datetime import UTC, datetime
from typing import Any

from carrel.protocol import events
from carrel.protocol.events import EventData, StoredEvent
from carrel.protocol.messages import Conversation, Message, says

AT = datetime(2026, 11, 21, tzinfo=UTC)


def told(*facts: EventData) -> list[StoredEvent]:
    return [
        StoredEvent(session_id="s", seq=seq, turn_id="t", type=fact.type, at=AT, raw_data=fact.model_dump_json())
        for seq, fact in enumerate(facts, 1)
    ]


def read(*facts: EventData, thinking: bool = False) -> list[Message]:
    conversation = Conversation(thinking=thinking)
    for event in told(*facts):
        conversation.take(event)
    return conversation.ready() + conversation.rest()


def short(messages: list[Message]) -> list[Any]:
    kinds = {"text": "text", "thinking": "thinking", "tool_use": "id", "tool_result": "tool_use_id"}
    return [(m.seq, m.role, [b[kinds[b["type"]]] for b in m.content], m.complete) for m in messages]


def said(message: str, block: int, text: str, parent: str | None = None) -> EventData:
    return events.MessageAssistant(message_id=message, block=block, text=text, model="m", parent_tool_use_id=parent)


def called(message: str, block: int, id: str, parent: str | None = None) -> EventData:
    return events.ToolCalled(id=id, tool="Bash", input={}, message_id=message, block=block, parent_tool_use_id=parent)


def finished(id: str, parent: str | None = None) -> EventData:
    return events.ToolFinished(id=id, result="ok", parent_tool_use_id=parent)


def asked(text: str, parent: str | None = None) -> EventData:
    return events.MessageUser(content=[{"type": "text", "text": text}], parent_tool_use_id=parent)


OVER = events.TurnCompleted(status="succeeded")  # type: ignore[arg-type]


def test_blocks_of_one_answer_are_joined_and_results_follow_them() -> None:
    found = read(
        asked("go"),
        said("m1", 0, "first"),
        called("m1", 1, "a"),
        finished("a"),
        called("m1", 2, "b"),
        finished("b"),
        said("m2", 0, "last"),
        OVER,
    )
    assert short(found) == [
        (1, "user", ["go"], True),
        (2, "assistant", ["first", "a", "b"], True),
        (4, "user", ["a", "b"], True),
        (7, "assistant", ["last"], True),
    ]
    assert [m.id for m in found] == ["m1", "m1", "m4", "m2"]
    assert found[1].model == "m"
    assert found[2].content[0] == {"type": "tool_result", "tool_use_id": "a", "content": "ok", "is_error": False}


def test_sub_agents_speak_in_threads_of_their_own() -> None:
    found = read(
        called("m1", 0, "agent"),
        asked("do it", "agent"),
        said("n1", 0, "doing", "agent"),
        called("n1", 1, "x", "agent"),
        finished("x", "agent"),
        said("n2", 0, "did", "agent"),
        finished("agent"),
        said("m2", 0, "done"),
        OVER,
    )
    assert [(m.parent_tool_use_id, m.role) for m in found] == [
        (None, "assistant"),
        ("agent", "user"),
        ("agent", "assistant"),
        ("agent", "user"),
        ("agent", "assistant"),
        (None, "user"),
        (None, "assistant"),
    ]


def test_thinking_is_left_out_unless_it_is_wanted() -> None:
    facts = (
        events.Thinking(message_id="m1", block=0, text="hm"),
        said("m1", 1, "so"),
        events.Thinking(message_id="m2", block=0, text="only"),
        OVER,
    )
    assert short(read(*facts)) == [(1, "assistant", ["so"], True)]
    assert short(read(*facts, thinking=True)) == [
        (1, "assistant", ["hm", "so"], True),
        (3, "assistant", ["only"], True),
    ]


def test_what_may_still_grow_is_not_complete() -> None:
    found = read(asked("go"), said("m1", 0, "a"), finished("x"))
    assert [m.complete for m in found] == [True, False, False]
    conversation = Conversation()
    for event in told(asked("go"), said("m1", 0, "a")):
        conversation.take(event)
    assert short(conversation.ready()) == [(1, "user", ["go"], True)]
    assert short(conversation.rest()) == [(2, "assistant", ["a"], False)]


def test_blocks_without_a_place_come_in_the_order_of_the_log() -> None:
    call = events.ToolCalled(id="a", tool="x", input={}, message_id="m1")
    assert short(read(call, said("m1", 0, "b"), OVER)) == [(1, "assistant", ["a", "b"], True)]
    anonymous = [events.ToolCalled(id=i, tool="x", input={}) for i in "ab"]
    assert len(read(*anonymous)) == 2


def test_what_was_said_is_found_in_any_case_of_letters() -> None:
    (message,) = read(said("m1", 0, "Straße ÉCLAIR 😀 50%"))
    assert all(says(message, text) for text in ("strasse", "éclair", "😀", "0%"))
    assert not says(message, "m1")
