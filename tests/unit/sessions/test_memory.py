"""Room for sandboxes: counted ahead, waited for in order, refused in the end."""

import asyncio

import pytest

from carrel.errors import OutOfMemory
from carrel.sessions.memory import EXPECTED_BYTES, Memory


async def test_without_a_limit_there_is_always_room() -> None:
    memory = Memory()
    memory.report(2**50, [])
    assert memory.room()
    assert memory.admit("a")
    await memory.wait_for_room("b")


def test_what_was_admitted_is_counted_before_it_is_measured() -> None:
    memory = Memory(2 * EXPECTED_BYTES)
    assert [memory.admit(name) for name in "abc"] == [True, True, False]
    assert memory.room("a"), "once admitted, a session stays so"
    memory.report(EXPECTED_BYTES // 2, ["a"])
    assert memory.room("c")
    memory.report(2 * EXPECTED_BYTES, ["a", "b"])
    assert not memory.room()
    memory.report(0, [])
    assert memory.room()


def test_what_is_not_started_after_all_is_not_counted() -> None:
    memory = Memory(EXPECTED_BYTES)
    assert memory.admit("a")
    assert not memory.room("b")
    memory.release("a")
    memory.release("unknown")
    assert memory.room("b")


async def test_who_came_first_is_first() -> None:
    memory = Memory(EXPECTED_BYTES)
    memory.report(EXPECTED_BYTES, [])
    done: list[str] = []

    async def wait(name: str) -> None:
        await memory.wait_for_room(name)
        done.append(name)

    waiting = [asyncio.create_task(wait(name)) for name in "abc"]
    await asyncio.sleep(0)
    memory.report(0, [])
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert done == ["a"], "there was room for one"
    memory.report(0, ["a"])
    await waiting[1]
    assert done == ["a", "b"]
    waiting[2].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    memory.report(0, ["b"])
    assert memory.room("d")


async def test_a_newcomer_does_not_overtake() -> None:
    memory = Memory(EXPECTED_BYTES, wait_seconds=0.05)
    memory.report(EXPECTED_BYTES, [])
    first = asyncio.create_task(memory.wait_for_room("a"))
    await asyncio.sleep(0)
    memory._taken = 0  # there is room, and nobody has been told yet
    with pytest.raises(OutOfMemory):
        await memory.wait_for_room("b")
    with pytest.raises(OutOfMemory):
        await first


async def test_in_the_end_it_is_refused() -> None:
    memory = Memory(EXPECTED_BYTES, wait_seconds=0.01)
    memory.report(EXPECTED_BYTES, [])
    with pytest.raises(OutOfMemory) as caught:
        await memory.wait_for_room("a")
    assert caught.value.retry_after_seconds
    assert caught.value.http_status == 503
    memory.report(0, [])
    assert memory.expected_bytes == 0, "who has gone is not counted"
