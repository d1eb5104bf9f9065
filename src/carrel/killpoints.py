"""Named places at which the kill suite ends the process as `kill -9` would. Unarmed, they do nothing."""

from __future__ import annotations

import os
import signal
from typing import Final

POINTS: Final = frozenset(
    {
        "turn.stored",
        "turn.started",
        "sandbox.stored",
        "sandbox.checkpoint",
        "sandbox.forked",
        "bind.sent",
        "frames.received",
        "frames.stored",
        "frames.acked",
        "delta.published",
        "tool.called",
        "tool.finished",
        "pool.stored",
        "pool.taken",
        "interaction.deferred",
        "interaction.answered",
        "interaction.taken",
        "usage.reserved",
        "usage.recorded",
        "evict.marked",
        "clone.staged",
        "restore.marked",
        "restore.adopted",
        "delete.marked",
        "delete.files_gone",
    }
)
"""Every point, in the order a session meets them."""

_armed: dict[str, int] = {}


def arm(point: str, visits: int = 1) -> None:
    """Have the process killed at the given visit of a point, counted from 1.

    Raises:
        ValueError: there is no such point.
    """
    if point not in POINTS:
        raise ValueError(f"no such kill point: {point}; there are {', '.join(sorted(POINTS))}")
    _armed[point] = visits


def reached(point: str) -> None:
    """Say that this point is reached."""
    if not _armed or point not in _armed:
        return
    _armed[point] -= 1
    if _armed[point] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
