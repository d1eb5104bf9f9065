"""Brings rows and runtimes together: at start, and now and then."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import structlog

from carrel import abc
from carrel.model import SandboxStatus, utc_now
from carrel.sessions.runtimes import Runtimes
from carrel.sessions.scheduler import Scheduler

log = structlog.get_logger(__name__)

_SWEEP_SECONDS = 15.0


class Reconciler:
    """Finds sessions that need a look, and sandboxes that nobody has."""

    def __init__(self, store: abc.Store, runtimes: Runtimes, scheduler: Scheduler) -> None:
        """Make it; nothing runs before `start`."""
        self._store = store
        self._runtimes = runtimes
        self._scheduler = scheduler

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """End orphans, have every unsettled session looked at, and go on doing so."""
        await self.end_orphans()
        await self.sweep()
        task = asyncio.create_task(self._repeat(), name="reconciler")
        exit_stack.callback(task.cancel)

    async def end_orphans(self) -> None:
        """End every sandbox of ours that no row knows, or that its row says is gone."""
        for runtime, sandbox_id, state in await self._runtimes.owned():
            sandbox = await self._store.read(lambda tx, s=sandbox_id: tx.sandboxes.get(s))  # type: ignore[misc]
            if sandbox is None or sandbox.status is SandboxStatus.GONE:
                log.warning("sandbox.orphan", sandbox=sandbox_id)
                await runtime.terminate(state)

    async def sweep(self) -> None:
        """Have every session looked at that looks alive, has work, or whose time is over."""
        for session_id in await self._store.read(lambda tx: list(tx.sessions.unsettled(utc_now()))):
            self._scheduler.poke(session_id)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                await self.sweep()
            except Exception:
                log.exception("reconciler.failed")
