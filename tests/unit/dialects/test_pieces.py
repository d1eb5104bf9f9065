"""A turn as a client sees it that can only append."""

from typing import Any

import pytest

from carrel.api.dialects.pieces import End, Pieces, Text, Thinking, ToolUse
from carrel.model import utc_now
from carrel.protocol.events import Delta, EventData, MessageAssistant, NewEvent, StoredEvent, ToolCalled, TurnCompleted
from carrel.protocol.events import Thinking as ThinkingEvent


def delta(text: str, message: str = "m", block: int = 0, kind: str = "text", parent: str | None = None) -> Delta:
    return Delta(
        session_id="s", turn_id="t", kind=kind, message_id=message, block=block, text=text, parent_tool_use_id=parent
    )


def event(data: EventData) -> StoredEvent:
    new = NewEvent.of(data, at=utc_now(), turn_id="t")
    raw = data.model_dump_json()
    return StoredEvent(session_id="s", seq=1, turn_id="t", type=new.type, at=new.at, raw_data=raw)


def said(text: str, message: str = "m", block: int = 0, parent: str | None = None) -> StoredEvent:
    return event(MessageAssistant(message_id=message, block=block, text=text, parent_tool_use_id=parent))


RESET = delta("", kind="reset")


def shown(*frames: Any) -> str:
    """What a client has at the end that appends every text."""
    pieces = Pieces()
    return "".join(piece.text for frame in frames for piece in pieces.of([frame]) if isinstance(piece, Text))


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([delta("a"), delta("b"), said("ab")], "ab"),
        ([said("ab")], "ab"),
        ([delta("a"), said("abc")], "abc"),
        ([delta("a"), said("a"), delta("b", block=1), said("b", block=1)], "ab"),
        # The next block's delta before the first one's event.
        ([delta("a"), delta("b", block=1), said("a"), said("b", block=1)], "ab"),
        # A block that is never finished (an empty one) shifts the count of those that are.
        ([delta("a", block=1), said("a", block=0)], "a"),
        ([delta("a", message="m1"), said("a", message="m1"), delta("a", message="m2"), said("a", message="m2")], "aa"),
        ([delta("sub", parent="p"), said("sub", parent="p"), delta("a"), said("a")], "a"),
    ],
)
def test_text_comes_once(frames: list[Any], expected: str) -> None:
    assert shown(*frames) == expected


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        # It begins as the broken one did: the client has that part already.
        (
            [delta("one tw"), RESET, delta("one ", "n"), delta("two three", "n"), said("one two three", "n")],
            "one two three",
        ),
        ([delta("one tw"), RESET, said("one two", "n")], "one two"),
        ([delta("one"), RESET, said("one", "n")], "one"),
        # It goes another way: it follows whole.
        ([delta("one tw"), RESET, delta("one", "n"), delta(" more", "n"), said("one more", "n")], "one tw\n\none more"),
        # Broken twice, the second time before the client had anything new.
        (
            [delta("one tw"), RESET, delta("one", "n"), delta("", "n", kind="reset"), delta("one two", "o")],
            "one two",
        ),
        # Nothing of the broken message had been shown.
        ([RESET, delta("one", "n"), said("one", "n")], "one"),
        # What was said before the broken message stays as it is.
        ([delta("zero"), said("zero"), delta("on", "n"), delta("", "n", kind="reset"), said("one", "o")], "zeroone"),
        # The finished block is not what its deltas said.
        ([delta("abc"), said("abd")], "abc\n\nabd"),
    ],
)
def test_a_message_that_is_made_anew(frames: list[Any], expected: str) -> None:
    assert shown(*frames) == expected


def test_every_kind_of_piece_in_order() -> None:
    call = ToolCalled(id="c", tool="Bash", input={"command": "ls"}, message_id="m", block=1)
    sub = ToolCalled(id="d", tool="Read", input={}, parent_tool_use_id="c")
    end = TurnCompleted(status="succeeded")  # type: ignore[arg-type]
    frames = [
        delta("hm", kind="thinking"),
        event(ThinkingEvent(message_id="m", block=0, text="hmm")),
        delta('{"comm', kind="tool_input"),
        delta("a", block=2),
        delta("b", block=2),
        said("ab", block=2),
        event(call),
        event(sub),
        event(end),
    ]
    assert Pieces().of(frames) == [
        Thinking("hmm"),
        Text("ab"),
        ToolUse("c", "Bash", {"command": "ls"}),
        ToolUse("d", "Read", {}),
        End(event(end).data),
    ]
