"""What sandboxes asked for: counted at once, stored soon, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Literal

import structlog

from carrel import abc
from carrel.model import new_id, utc_now

__all__ = ["Ledger", "Verdict"]

log = structlog.get_logger(__name__)

Verdict = Literal["allowed", "refused"]

_BATCH_SECONDS = 0.5
_RETRY_SECONDS = 2.0
_CLOSE_SECONDS = 10.0
_BATCH = 500
_MOST_WAITING = 10_000

_Key = tuple[str, str, int, str, str]


class Ledger:
    """Takes verdicts, and has them stored."""

    def __init__(self, store: abc.Store, told: Callable[[str, str], None] = lambda verdict, reason: None) -> None:
        """Keep them in `store`. `told`: hears of each verdict and its reason, for the metrics."""
        self._store = store
        self._told = told
        self._waiting: dict[_Key, abc.NetworkRequest] = {}
        self._some = asyncio.Event()
        self._writing = asyncio.Lock()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to store; closing, which stores what still waits, is registered with `exit_stack`."""
        task = asyncio.create_task(self._write(), name="egress-ledger")

        async def close() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self.flush()
            except Exception:  # the store is gone for good: the rest of the shutdown must go on
                log.exception("egress.lost", records=len(self._waiting))

        exit_stack.push_async_callback(close)

    def record(self, session_id: str, host: str, port: int, verdict: Verdict, reason: str) -> None:
        """Count a request. Never waits."""
        self._told(verdict, reason)
        key = (session_id, host, port, verdict, reason)
        if key not in self._waiting and len(self._waiting) >= _MOST_WAITING:
            key = (session_id, abc.OTHER_HOSTS, 0, verdict, reason)
            if key not in self._waiting and len(self._waiting) >= 2 * _MOST_WAITING:
                return  # the store has been away for long; the metrics have counted it
        now = utc_now()
        known = self._waiting.get(key)
        if known is not None:
            self._waiting[key] = replace(known, count=known.count + 1, last_at=now)
            return
        self._waiting[key] = abc.NetworkRequest(
            id=new_id(),
            session_id=key[0],
            host=key[1],
            port=key[2],
            verdict=verdict,
            reason=reason,
            count=1,
            first_at=now,
            last_at=now,
        )
        self._some.set()

    async def flush(self) -> None:
        """Store what has been counted so far."""
        async with self._writing:
            while self._waiting:
                keys = list(self._waiting)[:_BATCH]
                batch = [self._waiting.pop(key) for key in keys]
                try:
                    await self._store.write(lambda tx, batch=batch: tx.network.add(batch))  # type: ignore[misc]
                except BaseException:
                    self._put_back(batch)
                    raise

    def _put_back(self, batch: list[abc.NetworkRequest]) -> None:
        for each in batch:
            key = (each.session_id, each.host, each.port, each.verdict, each.reason)
            newer = self._waiting.get(key)
            both = each if newer is None else replace(each, count=each.count + newer.count, last_at=newer.last_at)
            self._waiting[key] = both

    async def _write(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(_BATCH_SECONDS)
            self._some.clear()
            try:
                await self.flush()
            except Exception:  # they are kept, and tried again
                log.exception("egress.not_stored", waiting=len(self._waiting))
                await asyncio.sleep(_RETRY_SECONDS)
                self._some.set()
