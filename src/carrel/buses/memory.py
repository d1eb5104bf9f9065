"""The bus within one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from carrel import abc


class _Queue(abc.Subscription):
    def __init__(self, max_bytes: int) -> None:
        self._frames: list[abc.Frame] = []
        self._room = self._max_bytes = max_bytes
        self._lost = False
        self._waiter: asyncio.Future[None] | None = None

    def push(self, frames: Sequence[abc.Frame], size: int) -> None:
        if not self._lost:
            self._room -= size
            if self._room < 0:
                self._frames.clear()
                self._lost = True
            else:
                self._frames.extend(frames)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, timeout_seconds: float) -> list[abc.Frame] | None:
        """Wait for frames and take all there are; see the contract."""
        if not self._frames and not self._lost:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        frames, self._frames = self._frames, []
        self._room = self._max_bytes
        if self._lost:
            self._lost = False
            return None
        return frames


class MemoryBus(abc.EventBus):
    """Hands frames to the subscriptions of this process."""

    def __init__(self) -> None:
        self._queues: dict[str, set[_Queue]] = {}

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Make ready: there is nothing to do."""

    def publish(self, session_id: str, frames: Sequence[abc.Frame]) -> None:
        """Hand frames to every subscription of the session."""
        queues = self._queues.get(session_id)
        if not queues:
            return
        size = sum(len(frame.sse()) for frame in frames)
        for queue in queues:
            queue.push(frames, size)

    @asynccontextmanager
    async def subscribe(self, session_id: str, *, max_bytes: int) -> AsyncIterator[abc.Subscription]:
        """Hear of every frame of the session from now on; at most `max_bytes` wait to be taken."""
        queue = _Queue(max_bytes)
        queues = self._queues.setdefault(session_id, set())
        queues.add(queue)
        try:
            yield queue
        finally:
            queues.discard(queue)
            if not queues and self._queues.get(session_id) is queues:
                del self._queues[session_id]
