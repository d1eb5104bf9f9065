"""The bus within one process loses nothing that fits, and keeps the order."""

from carrel.buses import MemoryBus
from carrel.testing.conformance.bus import stored_event, text_delta


async def test_frames_arrive_in_order_and_once() -> None:
    bus = MemoryBus()
    frames = [stored_event("a", 1), text_delta("a", 0, "x"), text_delta("a", 1, "y"), stored_event("a", 2)]
    async with bus.subscribe("a", max_bytes=10_000) as one, bus.subscribe("a", max_bytes=10_000) as two:
        bus.publish("a", frames[:3])
        bus.publish("a", frames[3:])
        assert await one.get(1) == frames
        assert await one.get(0) == []
        assert await two.get(1) == frames


async def test_room_is_given_back_when_frames_are_taken() -> None:
    bus = MemoryBus()
    size = len(stored_event("a", 99, "x" * 100).sse())
    async with bus.subscribe("a", max_bytes=size) as subscription:
        for seq in range(1, 10):
            bus.publish("a", [stored_event("a", seq, "x" * 100)])
            assert [frame.seq for frame in await subscription.get(1) or []] == [seq]  # type: ignore[union-attr]
        for seq in (10, 11):
            bus.publish("a", [stored_event("a", seq, "x" * 100)])
        assert await subscription.get(1) is None
        bus.publish("a", [stored_event("a", 12, "x" * 100)])
        assert [frame.seq for frame in await subscription.get(1) or []] == [12]  # type: ignore[union-attr]


async def test_nothing_is_kept_of_those_who_have_left() -> None:
    bus = MemoryBus()
    for _ in range(3):
        async with bus.subscribe("a", max_bytes=10), bus.subscribe("b", max_bytes=10):
            assert set(bus._queues) == {"a", "b"}
    assert bus._queues == {}
