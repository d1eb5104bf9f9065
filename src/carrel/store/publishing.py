"""The order in which what transactions appended is told, where transactions commit side by side.

Two transactions of one session hold its row one after the other, so the second one can only enter here once the first
one has entered, committed and let go of the row. Their answers may still arrive in any order. Each entry therefore
waits until those before it that share a session have been told, or have come to nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from carrel.protocol.events import StoredEvent

__all__ = ["Entry", "Publisher"]


class Entry:
    """What one transaction appended."""

    __slots__ = ("committed", "events", "sessions", "told")

    def __init__(self, events: list[StoredEvent], told: asyncio.Future[None]) -> None:
        self.events = events
        self.sessions = tuple(dict.fromkeys(event.session_id for event in events))
        self.committed: bool | None = None
        self.told = told


class Publisher:
    """Tells of events in the order of commits, session by session."""

    def __init__(self, tell: Callable[[list[StoredEvent]], None]) -> None:
        """Make it.

        Args:
            tell: called with what a transaction appended, in the event loop's thread.
        """
        self._tell = tell
        self._waiting: dict[str, deque[Entry]] = {}

    def enter(self, events: list[StoredEvent]) -> Entry:
        """Take a place. To be called when the transaction has done its work, and before its commit is sent."""
        entry = Entry(events, asyncio.get_running_loop().create_future())
        for session_id in entry.sessions:
            self._waiting.setdefault(session_id, deque()).append(entry)
        return entry

    def leave(self, entry: Entry, *, committed: bool) -> None:
        """Say how the transaction ended, and tell whatever can be told now; once for each entry."""
        entry.committed = committed
        if not committed:
            for session_id in entry.sessions:
                self._waiting[session_id].remove(entry)
                self._drop_empty(session_id)
            entry.told.set_result(None)
        elif not entry.sessions:
            entry.told.set_result(None)
        looked_at = list(entry.sessions)
        while looked_at:
            looked_at.extend(self._advance(looked_at.pop()))

    def _advance(self, session_id: str) -> tuple[str, ...]:
        """Tell the first entry of the session if it may be told; answers the sessions that this has moved."""
        queue = self._waiting.get(session_id)
        if not queue or not queue[0].committed:
            return ()
        entry = queue[0]
        if any(self._waiting[other][0] is not entry for other in entry.sessions):
            return ()
        for other in entry.sessions:
            self._waiting[other].popleft()
            self._drop_empty(other)
        self._tell(entry.events)
        entry.told.set_result(None)
        return entry.sessions

    def _drop_empty(self, session_id: str) -> None:
        if not self._waiting[session_id]:
            del self._waiting[session_id]
