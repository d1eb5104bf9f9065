"""The decoder gives the same messages however the bytes are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.client.sse import Decoder, Message

# Every plane of Unicode, and what Python takes for the end of a line but this format does not.
TEXTS = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])) | st.sampled_from(
    ["\u2028", "\u0085 \x0b\x0c\x1c", "{]}\"'\\", "é漢😀\U0010ffff", ""]
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[Message]]:
    sent, expected = b"", []
    for number, text in enumerate(draw(st.lists(TEXTS, max_size=5))):
        end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
        if draw(st.booleans()):
            sent += b": still here" + end + end
        sent += b"id: %d" % number + end + b"event: kind" + end + b"data: " + text.encode() + end + end
        expected.append(Message("kind", text.encode(), str(number)))
    return sent, expected


@given(streams(), st.data())
def test_messages_do_not_depend_on_where_the_bytes_are_cut(
    stream: tuple[bytes, list[Message]], data: st.DataObject
) -> None:
    sent, expected = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=12)))
    decoder = Decoder()
    found: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        found += decoder.feed(sent[start:end])
    assert found == expected


def test_every_single_byte_may_come_alone() -> None:
    sent = "id: 7\ndata: é漢😀\n\n".encode()
    decoder = Decoder()
    found = [message for byte in sent for message in decoder.feed(bytes([byte]))]
    assert found == [Message("message", "é漢😀".encode(), "7")]


def test_a_message_that_is_not_whole_is_not_given() -> None:
    decoder = Decoder()
    assert decoder.feed(b"id: 1\ndata: whole\n\nid: 2\ndata: half\n") == [Message("message", b"whole", "1")]


@pytest.mark.parametrize("heartbeat", [b": still here\n\n", b"\n\n\n", b"event: nothing\n\n"])
def test_what_has_no_data_is_no_message(heartbeat: bytes) -> None:
    decoder = Decoder()
    assert decoder.feed(heartbeat) == []
    assert decoder.feed(b"data: x\n\n") == [Message("message", b"x", None)]


def test_lines_of_data_are_joined() -> None:
    assert Decoder().feed(b"data: a\ndata:b\ndata:\n\n") == [Message("message", b"a\nb\n", None)]


def test_a_large_message_in_small_pieces_takes_no_quadratic_time() -> None:
    decoder = Decoder()
    text = b"x" * 5_000_000
    sent = b"data: " + text + b"\n\n"
    found = [m for at in range(0, len(sent), 1024) for m in decoder.feed(sent[at : at + 1024])]
    assert [m.data for m in found] == [text]
