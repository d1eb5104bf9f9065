"""Looks at what the files of each sandbox take, and says which sandboxes have written more than they may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from carrel import abc
from carrel.errors import CarrelError
from carrel.model import Sandbox, Session
from carrel.sessions.environments import kept_environment

__all__ = ["DiskWatch"]

log = structlog.get_logger(__name__)

_MIB = 2**20
_LOOK_SECONDS = 1.0
# A folder of a million files takes seconds to look through: that is to be a small part of the time.
_REST_FOR_EACH_SECOND = 19.0
# What an agent itself writes down of its work, so that one that begins above its cap can make room.
_ROOM_ABOVE_BYTES = 4 * _MIB


class Sizes(Protocol):
    """Where sessions' files are; `carrel.workspaces.Folders` is one."""

    def taken(self, session: Session) -> int:
        """How many bytes the files of the session's workspace and home take. Blocks."""


@dataclass
class _Watched:
    session: Session
    cap_bytes: int
    most_bytes: int | None = None
    """What it may take: its cap, or, where it began above, little more than that."""
    due_at: float = 0.0


class DiskWatch:
    """Measures sandboxes that have a cap of their disk, each no oftener than is cheap."""

    def __init__(
        self,
        store: abc.Store,
        folders: Sizes,
        *,
        default_mb: int | None,
        run_blocking: Callable[..., Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the watch.

        Args:
            store: has the sandboxes' sessions, and what their environments say.
            folders: has the files.
            default_mb: the cap where an environment names none; None: there is no cap.
            run_blocking: runs a function that waits for the disk in another thread.
            clock: seconds since whenever.
        """
        self._store = store
        self._folders = folders
        self._default_mb = default_mb
        self._run_blocking = run_blocking
        self._clock = clock
        self._watched: dict[str, _Watched | None] = {}

    async def over(self, sandboxes: Iterable[Sandbox]) -> dict[str, int]:
        """Those that take more than they may, by id, with the bytes that they take; of those that are due to be measured."""
        there = {sandbox.id: sandbox for sandbox in sandboxes}
        new = [sandbox for sandbox_id, sandbox in there.items() if sandbox_id not in self._watched]
        if new:
            self._watched |= await self._store.read(lambda tx: {each.id: self._begin(tx, each) for each in new})
        self._watched = {sandbox_id: each for sandbox_id, each in self._watched.items() if sandbox_id in there}
        found = {}
        for sandbox_id, watched in self._watched.items():
            if watched is None or self._clock() < watched.due_at:
                continue
            begun = self._clock()
            try:
                taken: int = await self._run_blocking(self._folders.taken, watched.session)
            except (OSError, CarrelError) as error:
                # Its folders are not there yet, or are just being replaced: the next look is in a second.
                log.debug("disk.not_measured", session=watched.session.id, error=repr(error))
                continue
            now = self._clock()
            watched.due_at = now + max(_LOOK_SECONDS, _REST_FOR_EACH_SECOND * (now - begun))
            if watched.most_bytes is None:
                over = taken > watched.cap_bytes
                watched.most_bytes = taken + _ROOM_ABOVE_BYTES if over else watched.cap_bytes
            if taken > watched.most_bytes:
                found[sandbox_id] = taken
        return found

    def _begin(self, tx: abc.Transaction, sandbox: Sandbox) -> _Watched | None:
        session = tx.sessions.get(sandbox.session_id)
        if session is None:
            return None
        environment = kept_environment(tx, session)
        own = environment.spec.sandbox.resources.disk_mb if environment is not None else None
        cap = own or self._default_mb
        return None if cap is None else _Watched(session, cap * _MIB)
