"""Which block each piece of a message belongs to."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.protocol.events import DeltaKind
from carrel.runner.blocks import Blocks, whole, whole_text


def start(message_id: str) -> dict[str, Any]:
    return {"type": "message_start", "message": {"id": message_id}}


def piece(text: str, index: int = 0, kind: str = "text") -> dict[str, Any]:
    key = {"text": "text", "thinking": "thinking", "input_json": "partial_json"}[kind]
    return {"type": "content_block_delta", "index": index, "delta": {"type": f"{kind}_delta", key: text}}


def test_offsets_count_characters_within_a_block() -> None:
    blocks = Blocks()
    assert blocks.piece(start("m"), None, "t") is None
    frames = [blocks.piece(piece(text), None, "t") for text in ("a𝄞", "é", "")]
    assert [(f.offset, f.text) for f in frames if f] == [(0, "a𝄞"), (2, "é")]
    assert frames[2] is None, "nothing said is no delta"
    other = blocks.piece(piece("x", index=1, kind="input_json"), None, "t")
    assert other is not None
    assert (other.delta, other.block, other.offset, other.message_id) == (DeltaKind.TOOL_INPUT, 1, 0, "m")


def test_threads_do_not_mix() -> None:
    blocks = Blocks()
    blocks.piece(start("m"), None, "t")
    blocks.piece(start("n"), "toolu", "t")
    main, sub = blocks.piece(piece("a"), None, "t"), blocks.piece(piece("b"), "toolu", "t")
    assert main is not None
    assert sub is not None
    assert (main.message_id, main.parent_tool_use_id) == ("m", None)
    assert (sub.message_id, sub.parent_tool_use_id, sub.offset) == ("n", "toolu", 0)


def test_what_is_no_piece_gives_no_delta() -> None:
    blocks = Blocks()
    assert blocks.piece(piece("early"), None, "t") is None, "before any message"
    blocks.piece(start("m"), None, "t")
    assert blocks.piece({"type": "ping"}, None, "t") is None
    unknown = {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "x"}}
    assert blocks.piece(unknown, None, "t") is None


def test_finished_blocks_are_counted_and_no_longer_open() -> None:
    blocks = Blocks()
    blocks.piece(start("m"), None, "t")
    for index, text in enumerate(("one", "two")):
        blocks.piece(piece(text, index=index), None, "t")
    assert [(b.block, b.text) for b in blocks.open_blocks("t")] == [(0, "one"), (1, "two")]
    assert blocks.finish("m", None) == 0
    assert [(b.block, b.text) for b in blocks.open_blocks("t")] == [(1, "two")]
    assert blocks.finish("m", None) == 1
    assert blocks.open_blocks("t") == []
    assert blocks.finish("another", None) == 0, "a message whose beginning was not seen counts from 0"


def test_a_reset_takes_back_what_is_open_and_only_that() -> None:
    blocks = Blocks()
    blocks.piece(start("m"), None, "t")
    assert blocks.reset("t") == []
    blocks.piece(piece("half"), None, "t")
    (frame,) = blocks.reset("t")
    assert (frame.delta, frame.message_id, frame.turn_id) == (DeltaKind.RESET, "m", "t")
    assert blocks.open_blocks("t") == []
    assert blocks.reset("t") == []


def test_the_text_so_far_is_all_pieces() -> None:
    blocks = Blocks()
    blocks.piece(start("m"), "toolu", "t")
    for _ in range(3):
        blocks.piece(piece("ab", kind="thinking"), "toolu", "t")
        (block,) = blocks.open_blocks("t")
    assert (block.text, block.kind, block.parent_tool_use_id) == ("ababab", "thinking", "toolu")
    blocks.clear()
    assert blocks.open_blocks("t") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", "plain"), ("é𝄞", "é𝄞"), ("a\ud834b", "a�b"), ("\udd1e", "�"), ("\ud834\udd1e", "𝄞"), ("", "")],
)
def test_halves_of_characters_are_replaced(text: str, expected: str) -> None:
    assert whole_text(text) == expected


TEXT = st.text(alphabet=st.characters(), max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.recursive(TEXT | st.integers(), lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3)))
def test_any_value_can_be_written_after_it_was_made_whole(value: Any) -> None:
    json.dumps(whole(value), ensure_ascii=False).encode()
