"""One worker at a time per key."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from carrel.sessions.scheduler import Scheduler

Step = Callable[[str], Awaitable[float | None]]


@pytest.fixture
async def start() -> AsyncIterator[Callable[[Step], Awaitable[Scheduler]]]:
    async with AsyncExitStack() as stack:

        async def make(step: Step) -> Scheduler:
            scheduler = Scheduler(step)
            await scheduler.start(stack)
            return scheduler

        yield make


Start = Callable[[Step], Awaitable[Scheduler]]


async def test_a_key_is_never_worked_on_twice_at_once(start: Start) -> None:
    working: set[str] = set()
    steps = 0

    async def step(key: str) -> None:
        nonlocal steps
        assert key not in working
        working.add(key)
        steps += 1
        await asyncio.sleep(0.001)
        working.remove(key)

    scheduler = await start(step)
    for _ in range(20):
        for key in "abc":
            scheduler.poke(key)
        await asyncio.sleep(0)
    await asyncio.gather(*(scheduler.settle(key) for key in "abc"))
    assert 3 <= steps < 60, "pokes merge"


async def test_different_keys_are_worked_on_at_once(start: Start) -> None:
    barrier = asyncio.Barrier(3)

    async def step(key: str) -> None:
        await barrier.wait()

    scheduler = await start(step)
    async with asyncio.timeout(5):
        await asyncio.gather(*(scheduler.settle(key) for key in "abc"))


async def test_a_poke_during_a_step_brings_another_one(start: Start) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    steps = 0

    async def step(key: str) -> None:
        nonlocal steps
        steps += 1
        begun.set()
        await go_on.wait()

    scheduler = await start(step)
    scheduler.poke("a")
    await begun.wait()
    for _ in range(5):
        scheduler.poke("a")
    settled = asyncio.ensure_future(scheduler.settle("a"))
    await asyncio.sleep(0)
    assert not settled.done(), "a step that has begun before does not count"
    go_on.set()
    await asyncio.wait_for(settled, 5)
    assert steps == 2


async def test_a_step_is_called_again_when_it_said(start: Start) -> None:
    times: list[float] = []
    done = asyncio.Event()

    async def step(key: str) -> float | None:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 3:
            done.set()
            return None
        return 0.03

    scheduler = await start(step)
    scheduler.poke("a")
    await asyncio.wait_for(done.wait(), 5)
    assert all(later - earlier >= 0.025 for earlier, later in itertools.pairwise(times))


async def test_a_poke_does_not_wait_for_the_timer(start: Start) -> None:
    steps = asyncio.Queue[str]()

    async def step(key: str) -> float:
        steps.put_nowait(key)
        return 3_600

    scheduler = await start(step)
    for _ in range(3):
        scheduler.poke("a")
        assert await asyncio.wait_for(steps.get(), 5) == "a"


async def test_a_step_that_fails_is_tried_again_ever_more_slowly(start: Start) -> None:
    times: list[float] = []
    well = asyncio.Event()

    async def step(key: str) -> None:
        times.append(asyncio.get_running_loop().time())
        if len(times) < 3:
            raise LookupError("on purpose")
        well.set()

    scheduler = await start(step)
    scheduler.poke("a")
    await asyncio.wait_for(well.wait(), 10)
    assert times[1] - times[0] >= 0.2
    assert times[2] - times[1] >= 0.4


async def test_one_keys_failure_is_no_others(start: Start) -> None:
    async def step(key: str) -> None:
        if key == "bad":
            raise LookupError("on purpose")

    scheduler = await start(step)
    scheduler.poke("bad")
    await asyncio.wait_for(scheduler.settle("good"), 5)


async def test_nothing_is_kept_of_keys_at_rest(start: Start) -> None:
    async def step(key: str) -> None:
        return None

    scheduler = await start(step)
    for i in range(100):
        await scheduler.settle(str(i))
    await asyncio.sleep(0)
    assert scheduler._keys == {}


async def test_closing_ends_steps_and_timers_and_those_who_wait() -> None:
    async def step(key: str) -> float:
        if key == "long":
            await asyncio.Event().wait()
        return 3_600

    async with AsyncExitStack() as stack:
        scheduler = Scheduler(step)
        await scheduler.start(stack)
        await scheduler.settle("timer")
        scheduler.poke("long")
        waiting = asyncio.ensure_future(scheduler.settle("long"))
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    scheduler.poke("late")
    await scheduler.settle("late")
    assert scheduler._keys == {}
