"""Who may come in: how many sessions there may be, and which waiting turn goes to work next.

Both are counted in the transaction that spends them, so that fifty at once pass exactly up to the limit.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from carrel import abc
from carrel.errors import CarrelError, SessionLimitReached
from carrel.model import utc_now
from carrel.protocol.events import StoredEvent

log = structlog.get_logger(__name__)

_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_LOOK_AGAIN_SECONDS = 1.0
_FREEING = frozenset({"turn.completed", "session.status_changed", "session.deleted"})


@dataclass(frozen=True)
class SessionLimits:
    """How many sessions there may be; None: any number."""

    in_all: int | None = None
    of_user: int | None = None

    def spend(self, tx: abc.Transaction, owner: str) -> None:
        """Make sure that there is room for one more of this owner's, until the transaction ends.

        Raises:
            SessionLimitReached: there is none.
        """
        tx.users.ensure(owner, utc_now())
        user = tx.users.lock(owner)
        of_user = user.max_sessions if user is not None and user.max_sessions is not None else self.of_user
        if of_user is not None and tx.counts.sessions(owner) >= of_user:
            raise SessionLimitReached(of_user, of_user=True)
        if self.in_all is not None:
            tx.lock("sessions")
            if tx.counts.sessions() >= self.in_all:
                raise SessionLimitReached(self.in_all, of_user=False)


def fair_order(waiting: Sequence[abc.WaitingTurn]) -> list[abc.WaitingTurn]:
    """Round robin over users: next is whose user has the fewest at work, then whose user has waited the longest."""
    of_owner: dict[str, list[abc.WaitingTurn]] = defaultdict(list)
    for turn in waiting:
        of_owner[turn.owner].append(turn)
    queued = [(turn.running + i, turn) for turns in of_owner.values() for i, turn in enumerate(turns)]
    # A user's own turns come in the order in which they were queued; the rounds of all users are dealt in turn.
    queued.sort(key=lambda item: (item[0], item[1].last_started_at or _LONG_AGO, item[1].created_at, item[1].turn_id))
    return [turn for _, turn in queued]


class Admission:
    """Lets so many turns work at once, and the others wait in a fair queue."""

    def __init__(self, store: abc.Store, poke: Callable[[str], None], *, max_concurrent_turns: int | None) -> None:
        """Make it.

        Args:
            store: the rows.
            poke: told the id of a session whose turn may go to work now.
            max_concurrent_turns: None lets all of them work.
        """
        self._store = store
        self._poke = poke
        self._limit = max_concurrent_turns
        self._refused = False
        self._freed = asyncio.Event()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to call up who waits; closing is registered with `exit_stack`."""
        if self._limit is None:
            return
        task = asyncio.create_task(self._call_up(), name="admission")

        async def close() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        exit_stack.push_async_callback(close)

    def admits(self, tx: abc.Transaction, turn_id: str) -> bool:
        """Whether this queued turn may go to work; its session must not be counted as busy yet.

        Where it may not, its session is poked when its time has come.
        """
        if self._limit is None:
            return True
        tx.lock("turns at work")
        if self.is_next(tx, turn_id):
            return True
        self._refused = True
        return False

    def is_next(self, tx: abc.Transaction, turn_id: str) -> bool:
        """Whether one of the free places is for this queued turn."""
        if self._limit is None:
            return True
        free = self._limit - tx.counts.busy()
        return free > 0 and turn_id in {turn.turn_id for turn in fair_order(tx.counts.waiting_turns())[:free]}

    def place(self, tx: abc.Transaction, turn_id: str, ahead: int) -> int:
        """How many turns that have to wait come before this one; `ahead` of them are of its own session."""
        if self._limit is None:
            return ahead
        free = self._limit - tx.counts.busy()
        order = [turn.turn_id for turn in fair_order(tx.counts.waiting_turns())]
        before = order.index(turn_id) if turn_id in order else len(order) + ahead
        return max(ahead, before - max(0, free))

    def heard(self, events: Sequence[StoredEvent]) -> None:
        """Events were stored: a place may have become free."""
        if self._refused and any(event.type in _FREEING for event in events):
            self._freed.set()

    async def _call_up(self) -> None:
        while True:
            # Where another gateway frees a place, nothing is heard of it here.
            try:
                # Not `wait_for`: before Python 3.12 it can lose a cancellation that comes with the event.
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    await self._freed.wait()
            except TimeoutError:
                if not self._refused:
                    continue
            self._freed.clear()
            try:
                called = await self._store.read(self._next)
            except CarrelError as error:
                log.warning("admission.store_unavailable", error=str(error))
                continue
            for session_id in called:
                self._poke(session_id)

    def _next(self, tx: abc.Transaction) -> list[str]:
        waiting = fair_order(tx.counts.waiting_turns())
        self._refused = bool(waiting)
        free = (self._limit or 0) - tx.counts.busy()
        return [turn.session_id for turn in waiting[: max(0, free)]]
