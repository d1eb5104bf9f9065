"""What is being said right now."""

from typing import Any

from carrel.buses import MemoryBus
from carrel.protocol.events import Delta, StoredEvent
from carrel.protocol.link import DeltaFrame, OpenBlock
from carrel.sessions.live import Live


def event(seq: int, type: str, turn_id: str | None = "t", data: str = "{}") -> StoredEvent:
    from carrel.testing.conformance.store import NOW

    return StoredEvent(session_id="s", seq=seq, turn_id=turn_id, type=type, at=NOW, raw_data=data)


def said(seq: int, message: str = "m", block: int = 0) -> StoredEvent:
    return event(seq, "message.assistant", data='{"message_id":"%s","block":%d,"text":""}' % (message, block))  # noqa: UP031


def piece(offset: int, text: str, **more: Any) -> DeltaFrame:
    return DeltaFrame(**{"delta": "text", "turn_id": "t", "message_id": "m", "offset": offset, "text": text} | more)


def texts(deltas: list[Delta]) -> list[tuple[str, int, str]]:
    return [(delta.message_id, delta.offset, delta.text) for delta in deltas]


def test_pieces_add_up_to_the_text_so_far() -> None:
    live = Live(MemoryBus())
    live.deltas("s", [piece(0, "a𝄞"), piece(2, "bc"), piece(0, "x", block=1), piece(0, "y", parent_tool_use_id="p")])
    assert texts(live.so_far("s")) == [("m", 0, "a𝄞bc"), ("m", 0, "x"), ("m", 0, "y")]
    since = live.since("s", (None, "m", 0), 1)
    assert since is not None
    assert texts([since]) == [("m", 1, "𝄞bc")]
    assert live.since("s", (None, "m", 0), 4) is None
    assert live.since("s", (None, "n", 0), 0) is None
    assert live.so_far("another") == []


def test_a_piece_that_came_twice_or_leaves_a_gap_does_not_count() -> None:
    live = Live(MemoryBus())
    live.deltas("s", [piece(0, "ab"), piece(0, "ab"), piece(5, "f"), piece(2, "c")])
    assert texts(live.so_far("s")) == [("m", 0, "abc")]


def test_a_block_that_is_in_the_log_is_no_longer_open() -> None:
    live = Live(MemoryBus())
    live.stored([event(1, "turn.started")])
    live.deltas("s", [piece(0, "one"), piece(0, "two", block=1)])
    live.stored([said(2)])
    assert texts(live.so_far("s")) == [("m", 0, "two")]


def test_a_reset_takes_back_its_message_alone() -> None:
    live = Live(MemoryBus())
    live.deltas("s", [piece(0, "x"), piece(0, "y", message_id="n"), piece(0, "", delta="reset")])
    assert texts(live.so_far("s")) == [("n", 0, "y")]


def test_the_end_of_a_turn_closes_its_blocks_and_no_others() -> None:
    live = Live(MemoryBus())
    live.stored([event(1, "turn.started")])
    live.deltas("s", [piece(0, "x")])
    live.stored([event(2, "turn.completed", turn_id="a queued one that was cancelled")])
    assert texts(live.so_far("s")) == [("m", 0, "x")]
    live.stored([event(3, "turn.completed")])
    assert live.so_far("s") == []
    assert live._talks == {}, "nothing is kept of a session at rest"


def test_a_deleted_session_is_forgotten() -> None:
    live = Live(MemoryBus())
    live.deltas("s", [piece(0, "x")])
    live.stored([event(9, "session.deleted", turn_id=None)])
    assert live._talks == {}


def test_sessions_that_say_nothing_cost_nothing() -> None:
    live = Live(MemoryBus())
    live.stored([event(1, "session.created", turn_id=None), event(2, "turn.queued")])
    assert live._talks == {}


async def test_frames_are_published_in_the_order_they_came_with_their_place() -> None:
    bus = MemoryBus()
    live = Live(bus)
    async with bus.subscribe("s", max_bytes=10_000) as subscription:
        live.deltas("s", [piece(0, "?")])
        live.stored([event(4, "turn.started")])
        live.deltas("s", [piece(0, "x", message_id="n")])
        live.stored([event(5, "turn.queued", turn_id="u"), said(6, "n")])
        live.deltas("s", [piece(0, "y", message_id="o")])
        frames = await subscription.get(1)
        assert frames is not None
        told = [
            frame.seq if isinstance(frame, StoredEvent) else (frame.kind, frame.text, frame.after) for frame in frames
        ]
        assert told == [
            ("text", "?", None), ("reset", "", None), 4, ("text", "x", 4), 5, 6, ("text", "y", 6),
        ]  # fmt: skip


async def test_events_of_several_sessions_go_to_their_own_viewers() -> None:
    bus = MemoryBus()
    live = Live(bus)
    other = StoredEvent(session_id="o", seq=1, turn_id=None, type="error", at=said(1).at, raw_data="{}")
    async with bus.subscribe("s", max_bytes=10_000) as mine, bus.subscribe("o", max_bytes=10_000) as theirs:
        live.stored([event(1, "error"), other, event(2, "error")])
        assert [frame.seq for frame in await mine.get(1) or []] == [1, 2]  # type: ignore[union-attr]
        assert await theirs.get(1) == [other]


async def test_a_runner_that_is_back_says_what_it_has() -> None:
    bus = MemoryBus()
    live = Live(bus)
    live.deltas("s", [piece(0, "ab"), piece(0, "stale", message_id="n")])
    async with bus.subscribe("s", max_bytes=10_000) as subscription:
        live.replace("s", [OpenBlock(turn_id="t", kind="text", message_id="m", block=0, text="abcd")])
        frames = await subscription.get(1)
    assert texts(live.so_far("s")) == [("m", 0, "abcd")] == texts(frames)  # type: ignore[arg-type]


def test_a_runner_that_talks_on_after_the_deletion_of_its_session_is_not_remembered() -> None:
    live = Live(MemoryBus())
    live.stored([event(1, "turn.started"), event(2, "session.deleted", turn_id=None)])
    live.deltas("s", [piece(0, "still here")])
    live.replace("s", [OpenBlock(kind="text", turn_id="t", message_id="m", block=0, text="still here")])
    assert live.so_far("s") == []
    assert live._talks == {}
