"""Following a session: nothing missed, nothing twice, deltas in their place."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from carrel import abc
from carrel.buses import MemoryBus
from carrel.model import Session, TurnOrigin, TurnStatus
from carrel.protocol import events
from carrel.protocol.events import Delta, EventData, NewEvent, StoredEvent
from carrel.protocol.link import DeltaFrame, OpenBlock
from carrel.sessions.live import Live
from carrel.sessions.streams import Streams
from carrel.store import SqliteStore
from carrel.testing.conformance.store import NOW, add_session
from carrel.testing.faulty import BusThatDoublesAndReorders, BusThatLosesFrames


class World:
    """A store, a bus, and one session that talks."""

    def __init__(self, store: abc.Store, bus: abc.EventBus, live: Live, session: Session) -> None:
        self.store = store
        self.bus = bus
        self.live = live
        self.session = session

    async def event(self, *data: EventData, turn_id: str | None = "t") -> None:
        new = [NewEvent.of(item, at=NOW, turn_id=turn_id) for item in data]
        await self.store.write(lambda tx: tx.events.append(self.session.id, new))

    async def started(self) -> None:
        await self.event(events.TurnStarted(origin=TurnOrigin.PROMPT))

    async def said(self, text: str, message: str = "m") -> None:
        await self.event(events.MessageAssistant(message_id=message, block=0, text=text))

    async def over(self, turn_id: str = "t") -> None:
        await self.event(events.TurnCompleted(status=TurnStatus.SUCCEEDED), turn_id=turn_id)

    def delta(self, offset: int, text: str, message: str = "m", kind: str = "text") -> None:
        frame = DeltaFrame(delta=kind, turn_id="t", message_id=message, offset=offset, text=text)
        self.live.deltas(self.session.id, [frame])

    def follow(
        self,
        *,
        deltas: bool = True,
        after: int = 0,
        buffer: int = 10**6,
        turn: str | None = "t",
        heartbeat: float = 5.0,
    ) -> "Viewer":
        streams = Streams(self.store, self.bus, self.live, buffer_bytes=buffer)
        return Viewer(
            streams.follow(self.session.id, after=after, deltas=deltas, until_turn=turn, heartbeat_seconds=heartbeat)
        )

    async def watched(self) -> None:
        """Until every viewer has taken all there is, and waits for more."""
        assert isinstance(self.bus, MemoryBus)
        async with asyncio.timeout(10):
            while not (queues := self.bus._queues.get(self.session.id)) or not all(
                queue._waiter is not None and not queue._frames for queue in queues
            ):
                await asyncio.sleep(0.001)


class Viewer:
    """Reads a stream a batch at a time, or to its end."""

    def __init__(self, batches: AsyncIterator[list[abc.Frame]]) -> None:
        self._batches = batches
        self.frames: list[abc.Frame] = []

    async def read(self, count: int) -> None:
        """Until so many frames were seen."""
        async with asyncio.timeout(15):
            while len(self.frames) < count:
                self.frames += await anext(self._batches)

    async def rest(self) -> None:
        async with asyncio.timeout(15):
            async for batch in self._batches:
                self.frames += batch

    async def close(self) -> None:
        await self._batches.aclose()  # type: ignore[attr-defined]

    @property
    def story(self) -> list[str]:
        return [
            f"{frame.seq} {frame.type}"
            if isinstance(frame, StoredEvent)
            else f"{frame.kind} {frame.offset} {frame.text}"
            for frame in self.frames
        ]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        bus = MemoryBus()
        live = Live(bus)
        store = SqliteStore(None, on_commit=live.stored)
        await store.start(stack)
        yield World(store, bus, live, await add_session(store))


async def test_a_viewer_sees_events_and_deltas_in_their_places(world: World) -> None:
    viewer = world.follow()
    reading = asyncio.ensure_future(viewer.rest())
    await world.watched()
    await world.started()
    world.delta(0, "he")
    world.delta(2, "llo")
    await world.said("hello")
    world.delta(0, "again", message="n")
    await world.said("again", message="n")
    await world.over()
    await reading
    assert viewer.story == [
        "1 turn.started", "text 0 he", "text 2 llo", "2 message.assistant", "text 0 again", "3 message.assistant",
        "4 turn.completed",
    ]  # fmt: skip


async def test_who_joins_late_gets_the_text_so_far_first_and_once(world: World) -> None:
    await world.started()
    world.delta(0, "one ")
    world.delta(4, "two ")
    viewer = world.follow()
    await viewer.read(2)
    world.delta(8, "three")
    await world.said("one two three")
    await world.over()
    await viewer.rest()
    assert viewer.story == [
        "1 turn.started", "text 0 one two ", "text 8 three", "2 message.assistant", "3 turn.completed",
    ]  # fmt: skip


async def test_a_block_that_was_closed_while_somebody_joined_is_not_said_again(world: World) -> None:
    """Between subscribing and reading the store the block is finished: its pieces wait, and its event is read first."""
    await world.started()
    entered, go_on = asyncio.Event(), asyncio.Event()

    class Held(abc.Store):
        """Reads only when it may."""

        async def start(self, exit_stack: AsyncExitStack) -> None: ...

        async def read(self, work):  # type: ignore[no-untyped-def]
            entered.set()
            await go_on.wait()
            return await world.store.read(work)

        async def write(self, work):  # type: ignore[no-untyped-def]
            return await world.store.write(work)

    viewer = World(Held(), world.bus, world.live, world.session).follow()
    reading = asyncio.ensure_future(viewer.rest())
    await entered.wait()
    world.delta(0, "finished")
    await world.said("finished")
    world.delta(0, "open", message="n")
    go_on.set()
    await world.over()
    await reading
    assert viewer.story[:2] == ["1 turn.started", "2 message.assistant"]
    assert "text 0 finished" not in viewer.story
    assert viewer.story[-1] == "3 turn.completed"


async def test_a_turn_that_was_cancelled_in_the_queue_disturbs_no_message(world: World) -> None:
    await world.started()
    viewer = world.follow()
    reading = asyncio.ensure_future(viewer.rest())
    await world.watched()
    world.delta(0, "one ")
    await world.over(turn_id="queued")
    world.delta(4, "two")
    await world.watched()
    late = world.follow()
    await late.read(2)
    assert late.story == ["1 turn.started", "text 0 one two"]
    await late.close()
    await world.said("one two")
    await world.over()
    await reading
    assert [line for line in viewer.story if line.startswith("text")] == ["text 0 one ", "text 4 two"]


async def test_a_message_that_is_made_anew_is_announced(world: World) -> None:
    await world.started()
    viewer = world.follow()
    reading = asyncio.ensure_future(viewer.rest())
    await world.watched()
    world.delta(0, "wrong")
    world.delta(0, "", kind="reset")
    world.delta(0, "right")
    await world.said("right")
    await world.over()
    await reading
    assert viewer.story[1:4] == ["text 0 wrong", "reset 0 ", "text 0 right"]


async def test_a_runner_that_is_back_fills_the_gap(world: World) -> None:
    """Nobody is told twice, and the rest comes at once."""
    await world.started()
    viewer = world.follow()
    await viewer.read(1)
    world.delta(0, "abc")
    await viewer.read(2)
    world.live.replace(
        world.session.id, [OpenBlock(turn_id="t", kind="text", message_id="m", block=0, text="abcdefgh")]
    )
    await viewer.read(3)
    world.delta(8, "i")
    await world.said("abcdefghi")
    await world.over()
    await viewer.rest()
    assert viewer.story[1:4] == ["text 0 abc", "text 3 defgh", "text 8 i"]


async def test_without_deltas_there_are_none(world: World) -> None:
    await world.started()
    world.delta(0, "x")
    viewer = world.follow(deltas=False)
    await viewer.read(1)
    world.delta(1, "y")
    await world.said("xy")
    await world.over()
    await viewer.rest()
    assert viewer.story == ["1 turn.started", "2 message.assistant", "3 turn.completed"]


async def test_a_viewer_of_one_turn_sees_that_turn(world: World) -> None:
    await world.event(events.TurnQueued(number=1, ahead=0), turn_id="u")
    await world.started()
    world.delta(0, "x")
    await world.event(events.TurnQueued(number=2, ahead=1), turn_id="v")
    await world.over("u")
    await world.over()
    await world.event(events.TurnQueued(number=3, ahead=1), turn_id="w")
    viewer = world.follow()
    await viewer.rest()
    assert viewer.story == ["2 turn.started", "5 turn.completed"]


async def test_a_stream_ends_with_its_session(world: World) -> None:
    await world.started()
    viewer = world.follow(turn=None)
    await viewer.read(1)

    def delete(tx: abc.Transaction) -> None:
        tx.events.append(world.session.id, [NewEvent.of(events.SessionDeleted(), at=NOW)])
        tx.sessions.mark_deleting(world.session.id)

    await world.store.write(delete)
    await viewer.rest()
    assert viewer.story == ["1 turn.started", "2 session.deleted"]
    await world.store.write(lambda tx: tx.sessions.remove(world.session.id))
    late = world.follow(turn=None)
    await late.rest()
    assert late.story == []


async def test_silence_is_told(world: World) -> None:
    viewer = world.follow(turn=None, heartbeat=0.02)
    assert await anext(viewer._batches) == []
    await world.started()
    await viewer.read(1)
    assert await anext(viewer._batches) == []
    await viewer.close()


async def test_who_comes_back_gets_every_later_event_once(world: World) -> None:
    await world.started()
    for i in range(20):
        await world.said(str(i))
    for after in (0, 7, 20, 21):
        viewer = world.follow(after=after, turn=None, deltas=False)
        await viewer.read(21 - after)
        assert [frame.seq for frame in viewer.frames] == list(range(after + 1, 22))  # type: ignore[union-attr]
        await viewer.close()


async def test_a_viewer_that_does_not_read_is_bounded_holds_nobody_up_and_misses_nothing(world: World) -> None:
    await world.started()
    slow = world.follow(buffer=20_000)
    await slow.read(1)
    held = 0
    text = "x" * 1_000
    for i in range(300):
        for offset in range(0, 1_000, 250):
            world.delta(offset, text[:250], message=f"m{i}")
        await world.said(text, message=f"m{i}")
        (queue,) = world.bus._queues[world.session.id]  # type: ignore[attr-defined]
        held = max(held, sum(len(frame.sse()) for frame in queue._frames))
    quick = world.follow(after=300)
    await quick.read(1)
    await world.over()
    await quick.rest()
    assert held <= 20_000
    await slow.rest()
    seen = [frame.seq for frame in slow.frames if isinstance(frame, StoredEvent)]
    assert seen == list(range(1, 303))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "fault", [None, BusThatLosesFrames, BusThatDoublesAndReorders], ids=["none", "loses", "doubles"]
)
async def test_whatever_the_bus_does_a_viewers_text_is_right(fault: type | None, seed: int) -> None:
    """Every event once and in order; between them, the pieces of each block begin at 0 and leave no gap, and none
    comes after the event that closed its block."""
    die = random.Random(seed)
    bus: abc.EventBus = MemoryBus()
    if fault is not None:
        bus = fault(bus, seed=seed)
    live = Live(bus)
    async with AsyncExitStack() as stack:
        store = SqliteStore(None, on_commit=live.stored)
        await store.start(stack)
        world = World(store, bus, live, await add_session(store))
        await world.started()
        viewers = [world.follow(buffer=die.choice([800, 10**6]), heartbeat=0.02) for _ in range(3)]
        reading = [asyncio.ensure_future(viewer.rest()) for viewer in viewers[:2]]
        for i in range(25):
            text, offset = "".join(die.choices("abcdefgh𝄞", k=30)), 0
            while offset < len(text):
                step = die.randrange(1, 9)
                world.delta(offset, text[offset : offset + step], message=f"m{i}")
                offset += step
                if die.random() < 0.3:
                    await asyncio.sleep(0)
                if i == 12 and len(reading) == 2:
                    reading.append(asyncio.ensure_future(viewers[2].rest()))
            await world.said(text, message=f"m{i}")
        await world.over()
        await asyncio.gather(*reading[:3], return_exceptions=False)
        for viewer in viewers:
            check(viewer)


def check(viewer: Viewer) -> None:
    seqs = [frame.seq for frame in viewer.frames if isinstance(frame, StoredEvent)]
    assert seqs == list(range(1, 28))
    closed: set[str] = set()
    pieces: dict[str, str] = {}
    for frame in viewer.frames:
        if isinstance(frame, Delta):
            assert frame.message_id not in closed, "a piece after the whole"
            assert frame.offset == len(pieces.get(frame.message_id, "")), "no gap, nothing twice"
            pieces[frame.message_id] = pieces.get(frame.message_id, "") + frame.text
        elif frame.type == "message.assistant":
            data = frame.data
            closed.add(data["message_id"])
            assert data["text"].startswith(pieces.get(data["message_id"], ""))
