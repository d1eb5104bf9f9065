"""Several observers, told one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from carrel import abc
from carrel.protocol.events import StoredEvent

__all__ = ["Observers"]


class Observers(abc.Observer):
    """Tells each of them."""

    def __init__(self, *observers: abc.Observer) -> None:
        """Tell `observers`, in this order."""
        self._all = observers

    def stored(self, events: Sequence[StoredEvent]) -> None:
        """Tell them."""
        for observer in self._all:
            observer.stored(events)

    def first_delta(self, session_id: str, turn_id: str | None) -> None:
        """Tell them."""
        for observer in self._all:
            observer.first_delta(session_id, turn_id)

    def delivered(self, frames: Sequence[abc.Frame]) -> None:
        """Tell them."""
        for observer in self._all:
            observer.delivered(frames)

    def linked(self, session_id: str, *, again: bool) -> None:
        """Tell them."""
        for observer in self._all:
            observer.linked(session_id, again=again)
