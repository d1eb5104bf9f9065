"""When keys were last used, beside the requests."""

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

from carrel.auth.bookkeeping import Bookkeeping
from carrel.model import utc_now


async def until_used(world: Any, key_id: str) -> Any:
    async with asyncio.timeout(10):
        while (key := await world.store.read(lambda tx: tx.keys.get(key_id))).last_used_at is None:
            await asyncio.sleep(0.005)
    return key


async def test_the_last_use_is_noted(world: Any, authenticator: Any) -> None:
    key_id, secret = await world.key()
    await authenticator.authenticate(secret)
    assert utc_now() - (await until_used(world, key_id)).last_used_at < timedelta(minutes=1)


async def test_a_key_that_is_used_a_thousand_times_is_written_once_a_minute(world: Any) -> None:
    key_id, _ = await world.key()
    old = await world.store.read(lambda tx: tx.keys.get(key_id))
    writes = 0
    write = world.store.write

    async def counted(work: Any) -> Any:
        nonlocal writes
        writes += 1
        return await write(work)

    world.store.write = counted
    async with AsyncExitStack() as stack:
        books = Bookkeeping(world.store)
        await books.start(stack)
        for _ in range(1000):
            books.used(old)  # as it was before any use: what a replica that is behind would read
        used = await until_used(world, key_id)
        books.used(used)
        books.used(used.model_copy(update={"last_used_at": utc_now() - timedelta(hours=1)}))
    assert writes == 1
    world.store.write = write


async def test_what_is_unwritten_is_written_at_the_end(world: Any) -> None:
    key_id, _ = await world.key()
    key = await world.store.read(lambda tx: tx.keys.get(key_id))
    async with AsyncExitStack() as stack:
        books = Bookkeeping(world.store)
        await books.start(stack)
        books.used(key)
        books.used(key.model_copy(update={"id": "gone", "last_used_at": None}))
    assert (await world.store.read(lambda tx: tx.keys.get(key_id))).last_used_at is not None
