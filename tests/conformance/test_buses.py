"""Every bus keeps its contract, the suite catches those that do not, and a lossy bus costs no viewer an event."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from carrel import abc
from carrel.buses import MemoryBus
from carrel.model import TurnStatus
from carrel.protocol.events import NewEvent, StoredEvent, TurnCompleted
from carrel.sessions.live import Live
from carrel.sessions.streams import Streams
from carrel.store import SqliteStore
from carrel.testing.conformance import bus as suite
from carrel.testing.conformance import failures
from carrel.testing.conformance.store import NOW, add_session, new_event
from carrel.testing.faulty import (
    BusThatDoublesAndReorders,
    BusThatForgetsItsBound,
    BusThatLosesFrames,
    BusThatMixesSessions,
)

Make = Callable[[], abc.EventBus]

BUSES: dict[str, Make] = {
    "memory": MemoryBus,
    "loses": lambda: BusThatLosesFrames(MemoryBus()),
    "doubles-and-reorders": lambda: BusThatDoublesAndReorders(MemoryBus()),
}


def opener(make: Make) -> suite.OpenBus:
    @asynccontextmanager
    async def open_bus() -> AsyncIterator[abc.EventBus]:
        async with AsyncExitStack() as stack:
            bus = make()
            await bus.start(stack)
            yield bus

    return open_bus


@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
@pytest.mark.parametrize("make", BUSES.values(), ids=BUSES)
async def test_bus(make: Make, check: Callable[[suite.OpenBus], Awaitable[None]]) -> None:
    await check(opener(make))


@pytest.mark.parametrize(
    ("make", "caught_by"),
    [
        (lambda: BusThatMixesSessions(MemoryBus()), "sessions_are_kept_apart"),
        (lambda: BusThatForgetsItsBound(MemoryBus()), "a_slow_subscription_is_bounded"),
    ],
    ids=["mixes-sessions", "forgets-its-bound"],
)
async def test_a_faulty_bus_is_caught(make: Make, caught_by: str) -> None:
    assert list(await failures(suite.CHECKS, opener(make))) != []
    assert caught_by in await failures({caught_by: suite.CHECKS[caught_by]}, opener(make))


FAULTS: dict[str, Callable[[int], abc.EventBus]] = {
    "none": lambda seed: MemoryBus(),
    "loses-half": lambda seed: BusThatLosesFrames(MemoryBus(), seed=seed),
    "loses-nearly-all": lambda seed: BusThatLosesFrames(MemoryBus(), share=0.98, seed=seed),
    "loses-all": lambda seed: BusThatLosesFrames(MemoryBus(), share=1.1, seed=seed),
    "doubles-and-reorders": lambda seed: BusThatDoublesAndReorders(MemoryBus(), seed=seed),
    "both": lambda seed: BusThatDoublesAndReorders(BusThatLosesFrames(MemoryBus(), seed=seed), seed=seed),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", FAULTS.values(), ids=FAULTS)
async def test_streams_deliver_every_event_once_over_a_faulty_bus(
    make: Callable[[int], abc.EventBus], seed: int
) -> None:
    bus = make(seed)
    live = Live(bus)
    store = SqliteStore(None, on_commit=live.stored)
    streams = Streams(store, bus, live, buffer_bytes=3_000)
    async with AsyncExitStack() as stack:
        await bus.start(stack)
        await store.start(stack)
        session = await add_session(store)

        async def view(after: int) -> list[int]:
            seen: list[int] = []
            async for batch in streams.follow(session.id, after=after, until_turn="t", heartbeat_seconds=0.02):
                seen += [frame.seq for frame in batch if isinstance(frame, StoredEvent)]
            return seen

        async def write() -> None:
            for i in range(120):
                await store.write(lambda tx, i=i: tx.events.append(session.id, [new_event("x" * (i % 40), "t")]))  # type: ignore[misc]
            over = NewEvent.of(TurnCompleted(status=TurnStatus.SUCCEEDED), at=NOW, turn_id="t")
            await store.write(lambda tx: tx.events.append(session.id, [over]))

        async with asyncio.timeout(20):
            early, other, _ = await asyncio.gather(view(0), view(50), write())
            late = await view(0)
        assert early == late == list(range(1, 122))
        assert other == list(range(51, 122))
