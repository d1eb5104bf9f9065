"""A server's orderly end: no new turns, a while for those that run, then every sandbox ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from carrel import abc
from carrel.api import Services
from carrel.errors import StoreUnavailable
from carrel.model import SandboxStatus, StopReason, TurnStatus
from carrel.sessions import transitions
from carrel.sessions.hub import Hub
from carrel.sessions.owner import Owner
from carrel.sessions.runtimes import Runtimes

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 0.05
_INTERRUPT_SECONDS = 5.0


async def drain(owner: Owner, services: Services, hub: Hub, runtimes: Runtimes, seconds: float) -> None:
    """End every sandbox of this server; running turns have `seconds` to finish and are interrupted after that."""
    owner.draining = True
    try:
        await _put_all_to_sleep(services, seconds)
    except StoreUnavailable:
        # The rows keep what they say; the next start mends them. What runs is ended all the same.
        log.warning("drain.store_away")
        for runtime, _, state in await runtimes.owned():
            await runtime.terminate(state)
    if services.tasks:
        await asyncio.wait(services.tasks, timeout=_INTERRUPT_SECONDS)


async def _put_all_to_sleep(services: Services, seconds: float) -> None:
    store = services.store
    await _until(lambda: _nothing_runs(store), seconds)
    running = await store.write(_interrupt_all)
    for session_id in running:
        services.sessions.poke(session_id)
    if running:
        await _until(lambda: _nothing_runs(store), _INTERRUPT_SECONDS)
    session_ids = await store.write(_put_to_sleep)
    await asyncio.gather(*(services.sessions.settle(session_id) for session_id in session_ids))


async def _until(done: Callable[[], Awaitable[bool]], seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not await done() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_LOOK_SECONDS)


async def _nothing_runs(store: abc.Store) -> bool:
    return not await store.read(lambda tx: _running_turns(tx))


def _running_turns(tx: abc.Transaction) -> list[tuple[str, str]]:
    found = []
    for sandbox in tx.sandboxes.not_gone():
        live = tx.turns.live(sandbox.session_id)
        if live is not None and live.status is TurnStatus.RUNNING:
            found.append((sandbox.session_id, live.id))
    return found


def _interrupt_all(tx: abc.Transaction) -> list[str]:
    running = _running_turns(tx)
    for _, turn_id in running:
        tx.turns.update(turn_id, interrupt_reason=StopReason.INTERRUPTED)
    return [session_id for session_id, _ in running]


def _put_to_sleep(tx: abc.Transaction) -> list[str]:
    found = []
    for sandbox in tx.sandboxes.not_gone():
        session = tx.sessions.get(sandbox.session_id)
        if session is not None:
            live = tx.turns.live(session.id)
            waits = (
                live is not None and live.status is TurnStatus.WAITING and transitions.open_call(tx, live) is not None
            )
            if live is not None and not waits:
                transitions.complete_turn(tx, session, live, TurnStatus.INTERRUPTED, stop_reason=StopReason.INTERRUPTED)
            if not waits:
                transitions.settle(tx, session)
        tx.sandboxes.update(sandbox.id, status=SandboxStatus.ENDING)
        found.append(sandbox.session_id)
    return found
