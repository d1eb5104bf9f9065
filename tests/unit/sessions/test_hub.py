"""The gateway's end of every link."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from pydantic_core import from_json, to_json

from carrel import abc
from carrel.buses import MemoryBus
from carrel.model import Sandbox, SandboxStatus, Session, SessionStatus, StopReason, TurnStatus, utc_now
from carrel.protocol.events import ErrorReported, MessageAssistant, NewEvent, StoredEvent
from carrel.protocol.link import (
    AgentFailed,
    AgentReady,
    AgentSession,
    DeltaFrame,
    EventFrame,
    Hello,
    OpenBlock,
    OpenBlocks,
    TranscriptFrame,
    TurnBegun,
    TurnEnded,
    WantTranscript,
)
from carrel.sessions.hub import Hub, token_hash
from carrel.sessions.live import Live
from carrel.store import SqliteStore
from carrel.testing.conformance.store import NOW, add_session, new_sandbox, new_turn
from carrel.testing.fakes import pipe
from carrel.testing.faulty import CommitFailed, StoreThatFailsCommits


class World:
    """A hub, one session with one sandbox, and the runner's end of its link."""

    def __init__(self, store: abc.Store, bus: MemoryBus, live: Live) -> None:
        self.store = store
        self.bus = bus
        self.live = live
        self.poked: list[str] = []
        self.hub = Hub(store, live, self.poked.append)
        self.session: Session
        self.sandbox: Sandbox
        self.stack: AsyncExitStack

    async def prepare(self, **changes: Any) -> None:
        self.session = await add_session(self.store, status=SessionStatus.STARTING, generation=1, agent_session_id=None)
        values = {"link_token_hash": token_hash("link")} | changes
        self.sandbox = new_sandbox(self.session, 1, SandboxStatus.LAUNCHING).model_copy(update=values)
        await self.store.write(lambda tx: tx.sandboxes.add(self.sandbox))

    def hello(self, **changes: Any) -> Hello:
        values = {"sandbox_id": self.sandbox.id, "token": "link", "generation": 1, "last_acked": 0, "bound": False}
        return Hello(**values | changes)

    async def dial(self, hello: Any = None) -> "Runner":
        ours, theirs = pipe()
        task = asyncio.create_task(self.hub.serve(theirs), name="link under test")
        runner = Runner(ours, task)
        self.stack.push_async_callback(runner.close)
        await runner.send(self.hello() if hello is None else hello)
        return runner

    async def log(self) -> list[StoredEvent]:
        return await self.store.read(lambda tx: tx.events.page(self.session.id, after=0, limit=1000))

    async def now(self) -> Session:
        session = await self.store.read(lambda tx: tx.sessions.get(self.session.id))
        assert session is not None
        return session


class Runner:
    def __init__(self, connection: Any, task: "asyncio.Task[None]") -> None:
        self._connection = connection
        self.task = task

    async def send(self, *frames: Any) -> None:
        """All in one message."""
        await self._connection.send(b"\n".join(f if isinstance(f, bytes) else to_json(f) for f in frames))

    async def told(self) -> dict[str, Any] | None:
        message = await asyncio.wait_for(self._connection.receive(), 10)
        return None if message is None else from_json(message)

    async def acked(self, n: int) -> None:
        while (frame := await self.told()) != {"kind": "ack", "n": n}:
            assert frame is not None, "the connection is over"

    async def close(self) -> None:
        self._connection.cut()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        bus = MemoryBus()
        live = Live(bus)
        store = SqliteStore(None, on_commit=live.stored)
        await store.start(stack)
        world = World(store, bus, live)
        world.stack = stack
        await world.prepare()
        yield world


def event(n: int, text: str = "x") -> EventFrame:
    data = MessageAssistant(message_id=f"m{n}", block=0, text=text)
    return EventFrame(n=n, event=NewEvent.of(data, at=NOW, turn_id="t"))


def delta(text: str, offset: int = 0, message: str = "m") -> DeltaFrame:
    return DeltaFrame(delta="text", turn_id="t", message_id=message, offset=offset, text=text)


def texts(log: list[StoredEvent]) -> list[str]:
    return [e.data["text"] for e in log if e.type == "message.assistant"]


# ------------------------------------------------------------------------------------------------------------ welcome


async def test_who_is_welcome_hears_what_is_stored_already(world: World) -> None:
    await world.store.write(lambda tx: tx.sandboxes.advance(world.sandbox.id, 7))
    runner = await world.dial()
    assert await runner.told() == {"kind": "ack", "n": 7}
    assert world.poked == [world.session.id]
    link = world.hub.link(world.sandbox.id)
    assert link is not None
    assert (link.bound, link.ready, link.last_turn) == (False, False, None)
    await runner.close()
    assert world.hub.link(world.sandbox.id) is None
    assert world.poked == [world.session.id] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": "wrong"}, "unknown sandbox or wrong token"),
        ({"token": ""}, "unknown sandbox or wrong token"),
        ({"sandbox_id": "another"}, "unknown sandbox or wrong token"),
        ({"version": 99}, "protocol 99 is not spoken here"),
    ],
)
async def test_who_is_not_welcome_is_told_why(world: World, changes: dict[str, Any], reason: str) -> None:
    runner = await world.dial(world.hello(**changes))
    assert await runner.told() == {"kind": "refused", "reason": reason}
    assert await runner.told() is None
    assert len(world.hub) == 0


@pytest.mark.parametrize("steps_of_the_loop", range(1, 8))
async def test_a_gateway_that_ends_just_as_a_runner_says_hello_ends(world: World, steps_of_the_loop: int) -> None:
    runner = await world.dial()
    for _ in range(steps_of_the_loop):
        await asyncio.sleep(0)
    runner.task.cancel()
    await asyncio.wait({runner.task}, timeout=10)
    assert runner.task.cancelled()


async def test_an_old_generation_is_refused_and_the_newer_one_is_not(world: World) -> None:
    await world.store.write(lambda tx: tx.sessions.update(world.session.id, generation=2))
    newer = new_sandbox(world.session, 2, SandboxStatus.LAUNCHING, link_token_hash=token_hash("newer"))
    await world.store.write(lambda tx: tx.sandboxes.add(newer))
    # What it says of its own generation counts for nothing; its row does.
    old = await world.dial(world.hello(generation=9))
    assert await old.told() == {"kind": "refused", "reason": "a newer generation has the session"}
    runner = await world.dial(world.hello(sandbox_id=newer.id, token="newer", generation=2))
    assert await runner.told() == {"kind": "ack", "n": 0}


async def test_a_runner_of_a_gone_sandbox_or_session_is_refused(world: World) -> None:
    await world.store.write(lambda tx: tx.sandboxes.update(world.sandbox.id, status=SandboxStatus.GONE))
    runner = await world.dial()
    assert await runner.told() == {"kind": "refused", "reason": "the session no longer has this sandbox"}
    await world.store.write(lambda tx: tx.sandboxes.update(world.sandbox.id, status=SandboxStatus.LIVE))
    await world.store.write(lambda tx: tx.sessions.mark_deleting(world.session.id))
    runner = await world.dial()
    assert await runner.told() == {"kind": "refused", "reason": "the session no longer has this sandbox"}


@pytest.mark.parametrize("first", [b"", b"{}", b"not json", to_json(WantTranscript()), to_json(event(1)), b"\xff" * 99])
async def test_whoever_does_not_say_hello_is_shown_the_door(world: World, first: bytes) -> None:
    runner = await world.dial(first)
    assert await runner.told() is None
    await asyncio.wait_for(runner.task, 5)
    assert (len(world.hub), await world.log()) == (0, [])


async def test_a_runner_that_dials_again_takes_its_own_place(world: World) -> None:
    first = await world.dial()
    await first.told()
    second = await world.dial(world.hello(bound=True, last_turn="t"))
    await second.told()
    assert await first.told() is None
    await asyncio.wait_for(first.task, 5)
    link = world.hub.link(world.sandbox.id)
    assert link is not None, "the end of the first does not take the second away"
    assert (link.bound, link.last_turn) == (True, "t")


# ------------------------------------------------------------------------------------------------------------- frames


async def test_frames_are_stored_in_order_and_acknowledged_after_that(world: World) -> None:
    runner = await world.dial()
    for n in range(1, 6):
        await runner.send(event(n, str(n)))
        await runner.acked(n)
        assert texts(await world.log()) == [str(i) for i in range(1, n + 1)]
    await runner.send(*(event(n, str(n)) for n in range(6, 700)))
    await runner.acked(699)
    assert [e.seq for e in await world.log()] == list(range(1, 700))


async def test_frames_that_come_twice_are_stored_once(world: World) -> None:
    runner = await world.dial()
    await runner.send(event(1, "a"), event(1, "a"), event(2, "b"), event(1, "a"))
    await runner.acked(2)
    await runner.send(event(2, "b"), event(3, "c"))
    await runner.acked(3)
    again = await world.dial(world.hello(last_acked=0))
    await again.send(*(event(n, t) for n, t in enumerate("abcd", start=1)))
    await again.acked(4)
    assert texts(await world.log()) == ["a", "b", "c", "d"]
    await again.send(event(2, "b"))
    await again.acked(2)
    await again.send(event(5, "e"))
    await again.acked(5)
    assert texts(await world.log()) == ["a", "b", "c", "d", "e"]


async def test_nothing_is_acknowledged_that_is_not_stored(world: World) -> None:
    store = StoreThatFailsCommits(world.store, every=1)
    failing = World(store, world.bus, world.live)
    failing.session, failing.sandbox, failing.stack = world.session, world.sandbox, world.stack
    runner = await failing.dial()
    assert await runner.told() == {"kind": "ack", "n": 0}
    await runner.send(event(1))
    with pytest.raises(CommitFailed):
        await asyncio.wait_for(runner.task, 5)
    store.failing = False
    runner = await failing.dial()
    assert await runner.told() == {"kind": "ack", "n": 0}
    await runner.send(event(1))
    await runner.acked(1)
    assert len(await world.log()) == 1


async def test_deltas_keep_their_place_between_events(world: World) -> None:
    runner = await world.dial()
    async with world.bus.subscribe(world.session.id, max_bytes=10**6) as viewer:
        frames = [delta("a"), delta("b", 1), event(1, "ab"), delta("c", 0, "n"), event(2, "c"), delta("d", 0, "o")]
        await runner.send(*frames)
        await runner.acked(2)
        seen: list[abc.Frame] = []
        async with asyncio.timeout(5):
            while len(seen) < 6:
                seen += await viewer.get(1) or []
    assert [f.data["text"] if isinstance(f, StoredEvent) else f.text for f in seen] == ["a", "b", "ab", "c", "c", "d"]


async def test_open_blocks_are_what_is_being_said(world: World) -> None:
    runner = await world.dial()
    await runner.send(OpenBlocks(blocks=[OpenBlock(kind="text", message_id="m", block=0, text="so far")]), event(1))
    await runner.acked(1)
    assert [piece.text for piece in world.live.so_far(world.session.id)] == ["so far"]


async def test_a_frame_nobody_knows_ends_the_connection_and_keeps_what_came_before(world: World) -> None:
    runner = await world.dial()
    await runner.send(event(1))
    await runner.acked(1)
    await runner.send(b'{"kind":"unheard_of"}')
    assert await runner.told() is None
    await asyncio.wait_for(runner.task, 5)
    assert len(await world.log()) == 1


async def test_an_event_of_an_unknown_type_is_left_out(world: World) -> None:
    runner = await world.dial()
    odd = EventFrame(n=1, event=NewEvent(type="unheard.of", at=NOW, data={}))
    await runner.send(odd, event(2, "known"))
    await runner.acked(2)
    assert [e.type for e in await world.log()] == ["message.assistant"]


async def test_a_sandbox_that_was_told_to_end_has_nothing_more_to_say(world: World) -> None:
    runner = await world.dial()
    await world.store.write(lambda tx: tx.sandboxes.update(world.sandbox.id, status=SandboxStatus.ENDING))
    line = TranscriptFrame(n=2, agent_session_id="a", lines=['{"uuid":"u"}'])
    await runner.send(event(1), line, TurnBegun(n=3, turn_id="t9", at=NOW))
    await runner.acked(3)
    assert await world.log() == []
    lines = await world.store.read(lambda tx: tx.transcripts.page(world.session.id, "", after=0, limit=9))
    assert len(lines) == 1, "its conversation is kept all the same"


async def test_a_generation_that_was_overtaken_writes_nothing(world: World) -> None:
    runner = await world.dial()
    await runner.told()
    await world.store.write(lambda tx: tx.sessions.update(world.session.id, generation=2))
    await runner.send(event(1), AgentSession(n=2, agent_session_id="stolen"), AgentReady(n=3))
    await runner.acked(3)
    assert await world.log() == []
    assert (await world.now()).agent_session_id is None


async def test_a_ready_agent_makes_its_session_ready(world: World) -> None:
    runner = await world.dial()
    await runner.send(AgentSession(n=1, agent_session_id="a-9"), AgentReady(n=2))
    await runner.acked(2)
    session = await world.now()
    assert (session.status, session.agent_session_id) == (SessionStatus.READY, "a-9")
    link = world.hub.link(world.sandbox.id)
    assert link is not None
    assert link.ready
    assert world.poked[-1] == world.session.id


async def test_an_agent_that_takes_a_turn_up_says_so_before_anything_of_it(world: World) -> None:
    turn = new_turn(world.session, 1, TurnStatus.RUNNING, sandbox_id="an earlier one")
    await world.store.write(lambda tx: tx.turns.add(turn))
    runner = await world.dial()
    ended = TurnEnded(n=3, turn_id=turn.id, at=NOW, status=TurnStatus.SUCCEEDED, stop_reason=StopReason.END_TURN)
    await runner.send(AgentReady(n=1, resumed_turn=turn.id), event(2), ended)
    await runner.acked(3)
    assert [(e.type, e.data.get("attempt")) for e in await world.log()] == [
        ("session.status_changed", None), ("session.status_changed", None), ("turn.started", 2),
        ("message.assistant", None), ("turn.completed", None), ("session.status_changed", None),
    ]  # fmt: skip
    now = await world.store.read(lambda tx: tx.turns.get(turn.id))
    assert now is not None
    assert (now.status, now.sandbox_id) == (TurnStatus.SUCCEEDED, world.sandbox.id)


async def test_a_turn_ends_once(world: World) -> None:
    turn = new_turn(world.session, 1, TurnStatus.RUNNING, started_at=utc_now())
    await world.store.write(lambda tx: tx.turns.add(turn))
    await world.store.write(lambda tx: tx.sessions.update(world.session.id, status=SessionStatus.RUNNING))
    runner = await world.dial()
    for n, status in ((1, TurnStatus.SUCCEEDED), (2, TurnStatus.FAILED)):
        await runner.send(
            TurnEnded(n=n, turn_id=turn.id, at=utc_now(), status=status, stop_reason=StopReason.END_TURN, num_turns=3)
        )
        await runner.acked(n)
    now = await world.store.read(lambda tx: tx.turns.get(turn.id))
    assert now is not None
    assert (now.status, now.num_turns) == (TurnStatus.SUCCEEDED, 3)
    assert [e.type for e in await world.log()] == ["turn.completed", "session.status_changed"]


async def test_a_turn_of_another_session_cannot_be_ended(world: World) -> None:
    other = await add_session(world.store)
    turn = new_turn(other, 1, TurnStatus.RUNNING)
    await world.store.write(lambda tx: tx.turns.add(turn))
    runner = await world.dial()
    ended = TurnEnded(n=1, turn_id=turn.id, at=NOW, status=TurnStatus.FAILED, stop_reason=StopReason.ERROR)
    await runner.send(ended, TurnBegun(n=2, turn_id=turn.id, at=NOW))
    await runner.acked(2)
    assert await world.store.read(lambda tx: tx.turns.get(turn.id)) == turn


async def test_the_failure_of_an_agent_is_kept_for_the_owner(world: World) -> None:
    runner = await world.dial()
    failure = AgentFailed(n=1, failure={"code": "c", "message": "m"}, operator_detail="d")  # type: ignore[arg-type]
    await runner.send(failure)
    await runner.acked(1)
    async with asyncio.timeout(5):
        while (found := world.hub.take_failure(world.sandbox.id)) is None:
            await asyncio.sleep(0)
    assert found == failure
    assert world.hub.take_failure(world.sandbox.id) is None, "it is taken once"


async def test_a_transcript_is_sent_whole_and_file_by_file(world: World) -> None:
    def fill(tx: abc.Transaction) -> None:
        for subpath, count in (("", 450), ("subagents/x", 3)):
            lines = [f'{{"uuid":"{subpath}{i}"}}' for i in range(count)]
            tx.transcripts.append(world.session.id, subpath=subpath, turn_id=None, lines=lines)

    await world.store.write(fill)
    runner = await world.dial()
    await runner.told()
    await runner.send(WantTranscript())
    received: dict[str, list[str]] = {}
    while not (part := await runner.told() or {})["last"]:
        received.setdefault(part["subpath"], []).extend(part["lines"])
    assert {name: len(lines) for name, lines in received.items()} == {"": 450, "subagents/x": 3}
    assert received[""] == [f'{{"uuid":"{i}"}}' for i in range(450)]


@pytest.mark.slow
async def test_a_flood_does_not_fill_the_memory(world: World) -> None:
    """While rows are being stored, reading from the connection stops at a bound."""
    held = asyncio.Event()

    class Held(abc.Store):
        async def start(self, exit_stack: AsyncExitStack) -> None: ...

        async def read(self, work):  # type: ignore[no-untyped-def]
            return await world.store.read(work)

        async def write(self, work):  # type: ignore[no-untyped-def]
            await held.wait()
            return await world.store.write(work)

    slow = World(Held(), world.bus, world.live)
    slow.session, slow.sandbox, slow.stack = world.session, world.sandbox, world.stack
    runner = await slow.dial()
    await runner.told()
    text = "x" * 1_000_000
    for n in range(1, 101):
        await runner.send(event(n, text))
    for _ in range(500):
        await asyncio.sleep(0)
    waiting = runner._connection.peer._inbox.qsize()
    held.set()
    assert waiting > 30, "what was not read yet holds the sender up"
    await runner.acked(100)
    assert [e.seq for e in await world.log()] == list(range(1, 101))


async def test_an_error_told_by_the_agent_is_an_event_like_any_other(world: World) -> None:
    runner = await world.dial()
    told = NewEvent.of(ErrorReported(code="c", message="m"), at=NOW)
    await runner.send(EventFrame(n=1, event=told))
    await runner.acked(1)
    assert [(e.type, e.turn_id) for e in await world.log()] == [("error", None)]
