"""One worker at a time per session: duplicates merge, failures back off, timers wake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import structlog

from carrel.errors import StoreUnavailable

log = structlog.get_logger(__name__)

_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 30.0
_STORE_AWAY_SECONDS = 0.5


class _Key:
    __slots__ = ("again", "failures", "task", "timer", "waiting")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.again = False
        self.timer: asyncio.TimerHandle | None = None
        self.failures = 0
        self.waiting: list[asyncio.Future[None]] = []


class Scheduler:
    """Calls `step(key)` whenever a key is poked, never twice at once for one key.

    A step answers after how many seconds it wants to be called again, or None. It must be safe to repeat: what it does
    follows from what is stored, not from why it was called.
    """

    def __init__(self, step: Callable[[str], Awaitable[float | None]]) -> None:
        self._step = step
        self._keys: dict[str, _Key] = {}
        self._closed = False

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to work; closing is registered with `exit_stack`."""
        exit_stack.push_async_callback(self._close)

    def poke(self, name: str) -> None:
        """Have the key's step called soon."""
        if self._closed:
            return
        key = self._keys.setdefault(name, _Key())
        if key.timer is not None:
            key.timer.cancel()
            key.timer = None
        if key.task is not None:
            key.again = True
            return
        key.task = asyncio.create_task(self._work(name, key), name=f"session {name}")

    async def settle(self, name: str) -> None:
        """Poke the key and wait until a step that began after this call has ended."""
        if self._closed:
            return
        key = self._keys.setdefault(name, _Key())
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if key.task is not None:
            key.again = True
        key.waiting.append(done)
        self.poke(name)
        await done

    async def _work(self, name: str, key: _Key) -> None:
        # Whoever has poked it, a request perhaps, has lent its context to this task: these lines are the session's.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(session_id=name)
        pause: float | None = None
        try:
            while True:
                key.again = False
                waiting, key.waiting = key.waiting, []
                pause = await self._once(name, key)
                for done in waiting:
                    if not done.done():
                        done.set_result(None)
                if not key.again:
                    return
        finally:
            key.task = None
            self._rest(name, key, pause)

    async def _once(self, name: str, key: _Key) -> float | None:
        try:
            pause = await self._step(name)
        except StoreUnavailable as error:
            # Not the session's fault, and over at once when the store is back.
            log.warning("session.store_away", session=name, detail=error.operator_detail)
            return _STORE_AWAY_SECONDS
        except Exception:
            key.failures += 1
            log.exception("session.step_failed", session=name, failures=key.failures)
            return float(min(_FIRST_BACKOFF_SECONDS * 2**key.failures, _LONGEST_BACKOFF_SECONDS))
        key.failures = 0
        return pause

    def _rest(self, name: str, key: _Key, pause: float | None) -> None:
        if self._closed:
            return
        if pause is None:
            if self._keys.get(name) is key and not key.waiting:
                del self._keys[name]
            return
        key.timer = asyncio.get_running_loop().call_later(max(pause, 0.001), self.poke, name)

    async def _close(self) -> None:
        self._closed = True
        tasks = []
        for key in self._keys.values():
            if key.timer is not None:
                key.timer.cancel()
            if key.task is not None:
                key.task.cancel()
                tasks.append(key.task)
            for done in key.waiting:
                done.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keys.clear()
