"""Looks at what every sandbox takes, each second: ends the one that runs wild, and frees idle ones for want of memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import structlog

from carrel import abc
from carrel.errors import OutOfMemory
from carrel.model import Failure, Sandbox, SandboxStatus, Session
from carrel.sessions import steps
from carrel.sessions.admission import Admission
from carrel.sessions.disk import DiskWatch
from carrel.sessions.hub import Hub
from carrel.sessions.owner import Owner, excess_failure
from carrel.sessions.runtimes import Runtimes
from carrel.sessions.scheduler import Scheduler

__all__ = ["Guard", "Looked"]

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Looked:
    """What was found when the sandboxes were last looked at."""

    sandboxes: Mapping[str, abc.SandboxUsage] = field(default_factory=dict)
    """By the sandbox's id."""

    @property
    def memory_bytes(self) -> int:
        """What all of them take together."""
        return sum(usage.memory_bytes for usage in self.sandboxes.values())

    @property
    def processes(self) -> int:
        """How many processes and threads they have together."""
        return sum(usage.processes for usage in self.sandboxes.values())


class Guard:
    """Holds sandboxes to what they may take."""

    def __init__(
        self,
        store: abc.Store,
        runtimes: Runtimes,
        hub: Hub,
        owner: Owner,
        scheduler: Scheduler,
        *,
        disk: DiskWatch | None = None,
    ) -> None:
        """Make the guard; it looks at nothing before `start` or `look`. `disk`: None, where disks are not looked at."""
        self._disk = disk
        self._store = store
        self._runtimes = runtimes
        self._hub = hub
        self._owner = owner
        self._scheduler = scheduler
        self._latest = Looked()
        self._wake: set[str] = set()
        self._woken = asyncio.Event()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Look, each second from now on."""
        task = asyncio.create_task(self._repeat(), name="guard")
        exit_stack.callback(task.cancel)
        disks = asyncio.create_task(self._repeat_at_disks(), name="guard-disks")
        exit_stack.callback(disks.cancel)
        for runtime in self._runtimes:
            watching = asyncio.create_task(runtime.watch(self._heard), name=f"watch {runtime.name}")
            exit_stack.callback(watching.cancel)

    def _heard(self, sandbox_id: str) -> None:
        """Something happened to this sandbox: look at once, and have its session looked at."""
        self._wake.add(sandbox_id)
        self._woken.set()

    def latest(self) -> Looked:
        """What was found last."""
        return self._latest

    async def look(self) -> None:
        """Look once, and do what is due."""
        told, self._wake = self._wake, set()
        sandboxes = await self._store.read(lambda tx: list(tx.sandboxes.not_gone()))
        usage = await self._runtimes.measure(sandboxes)
        self._latest = Looked(usage)
        memory = self._owner.memory
        # Until its agent is connected, a sandbox has not taken yet what it will.
        live = [each.session_id for each in sandboxes if each.id in usage and each.status is SandboxStatus.LIVE]
        memory.report(self._latest.memory_bytes, live)
        for sandbox in sandboxes:
            found = usage.get(sandbox.id)
            if found is not None and found.excess is not None and sandbox.status is not SandboxStatus.ENDING:
                self._end(sandbox, found.excess, str(found))
            elif sandbox.id in told:
                self._scheduler.poke(sandbox.session_id)
        if memory.limit_bytes is not None:
            over = self._latest.memory_bytes - memory.limit_bytes
            if over >= 0:
                await self._free([each for each in sandboxes if each.id in usage], usage, over)

    async def look_at_disks(self) -> None:
        """Look once at what sandboxes have written, and end those that have written too much."""
        if self._disk is None:
            return
        sandboxes = await self._store.read(lambda tx: list(tx.sandboxes.not_gone()))
        over = await self._disk.over(each for each in sandboxes if each.status is not SandboxStatus.ENDING)
        for sandbox in sandboxes:
            if sandbox.id in over:
                self._end(sandbox, abc.Excess.DISK, f"{over[sandbox.id]} bytes")

    def _end(self, sandbox: Sandbox, excess: abc.Excess, takes: str) -> None:
        log.warning("sandbox.excess", session=sandbox.session_id, sandbox=sandbox.id, of=excess, takes=takes)
        self._hub.fail(sandbox.id, excess_failure(excess), takes)
        self._scheduler.poke(sandbox.session_id)

    async def _free(self, sandboxes: list[Sandbox], usage: Mapping[str, abc.SandboxUsage], over_bytes: int) -> None:
        """Free idle sandboxes, the least recently used first, until enough is on its way back."""
        # What is ending already is as good as back: its turn to be counted is the next look.
        over_bytes -= sum(usage[each.id].memory_bytes for each in sandboxes if each.status is SandboxStatus.ENDING)
        live = {each.id: each for each in sandboxes if each.status is SandboxStatus.LIVE}
        for sandbox_id, session in await self._store.read(
            lambda tx: _resting(tx, live.values(), self._owner.admission)
        ):
            if over_bytes < 0:
                return
            link = self._hub.link(sandbox_id)
            if link is None or not link.ready or link.background_tasks > 0:
                continue
            if await self._owner.free(session.id, sandbox_id):
                log.info("sandbox.freed", session=session.id, sandbox=sandbox_id, why="memory")
                over_bytes -= usage[sandbox_id].memory_bytes
                if session.reserved is not None:
                    self._owner.heard_of_pool(session, Failure(code=OutOfMemory.code, message=OutOfMemory().message))
                self._scheduler.poke(session.id)

    async def _repeat(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._woken.wait()
            self._woken.clear()
            try:
                await self.look()
            except Exception:
                # The store may be away for a while; whoever runs wild meanwhile is still there at the next look.
                log.exception("guard.failed")

    async def _repeat_at_disks(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.look_at_disks()
            except Exception:
                # The store may be away for a while, as above.
                log.exception("guard.failed")


def _resting(tx: abc.Transaction, sandboxes: Iterable[Sandbox], admission: Admission) -> list[tuple[str, Session]]:
    """Those whose sessions rest, each with its session: warm pools' first, then the least recently used."""
    found = []
    for sandbox in sandboxes:
        session = tx.sessions.get(sandbox.session_id)
        if session is not None and steps.resting(tx, session, admission):
            found.append((sandbox.id, session))
    # Those of warm pools first: nobody misses them.
    return sorted(found, key=lambda each: (each[1].reserved is None, each[1].last_active_at))
