"""Work that blocks, step by step in threads, so that the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from typing import TypeVar

__all__ = ["in_thread", "stepwise"]

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` answers, from a thread. Cancelled, it waits for the thread: nobody else must touch its files yet."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # seen, and of no interest any more
        raise


async def stepwise(steps: Generator[T, None, None]) -> AsyncIterator[T]:
    """What a blocking generator gives, each step in a thread; it is closed in any case."""
    over = object()
    try:
        while (item := await in_thread(lambda: next(steps, over))) is not over:
            yield item  # type: ignore[misc]
    finally:
        await in_thread(steps.close)
