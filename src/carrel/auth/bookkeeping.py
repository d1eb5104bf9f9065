"""What authentication writes down, beside the requests and never in their way."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import datetime, timedelta

import structlog

from carrel import abc
from carrel.errors import CarrelError, KeyNotFound
from carrel.model import ApiKey, utc_now

__all__ = ["Bookkeeping"]

log = structlog.get_logger(__name__)

_EVERY = timedelta(minutes=1)
_REMEMBERED = 10_000


class Bookkeeping:
    """Notes when keys were last used, at most once a minute each, and which users came without a row of their own."""

    def __init__(self, store: abc.Store) -> None:
        """Make it; nothing is written before `start`."""
        self._store = store
        self._noted: dict[str, datetime] = {}
        self._uses: dict[str, datetime] = {}
        self._users: set[str] = set()
        self._some = asyncio.Event()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Write from now on. What is unwritten at the end is written while `exit_stack` closes."""
        task = asyncio.create_task(self._repeat(), name="auth-bookkeeping")

        async def close() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._write()

        exit_stack.push_async_callback(close)

    def used(self, key: ApiKey) -> None:
        """The key has opened something just now."""
        now = utc_now()
        last = max(filter(None, (key.last_used_at, self._noted.get(key.id))), default=None)
        if last is not None and now - last < _EVERY:
            return
        if len(self._noted) >= _REMEMBERED:
            self._noted = {name: at for name, at in self._noted.items() if now - at < _EVERY}
        self._noted[key.id] = self._uses[key.id] = now
        self._some.set()

    def came(self, user_id: str) -> None:
        """Somebody was vouched for who has no row yet."""
        self._users.add(user_id)
        self._some.set()

    async def _repeat(self) -> None:
        while True:
            await self._some.wait()
            await self._write()

    async def _write(self) -> None:
        self._some.clear()
        uses, self._uses = self._uses, {}
        users, self._users = self._users, set()
        if not uses and not users:
            return

        def work(tx: abc.Transaction) -> None:
            for user_id in sorted(users):
                tx.users.ensure(user_id, utc_now())
            for key_id, at in uses.items():
                try:
                    tx.keys.update(key_id, last_used_at=at)
                except KeyNotFound:  # its user was removed meanwhile: there is nothing left to note it at
                    continue

        try:
            await self._store.write(work)
        except CarrelError as error:
            # Nobody waits for this; the next use, or the next visit, has it written again.
            log.warning("auth.bookkeeping_failed", code=error.code)
