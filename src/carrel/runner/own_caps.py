"""Whether this runner's own container has met its cap on processes: an agent that cannot start a thread dies of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

__all__ = ["COUNTERS", "processes_met"]

COUNTERS: Final = ("/sys/fs/cgroup/pids/pids.events", "/sys/fs/cgroup/pids.events")
"""Where the kernel counts, with control groups of version 1 and of version 2."""


def processes_met(counters: Sequence[str] = COUNTERS) -> bool:
    """Whether a process or a thread was refused; False where the kernel does not tell."""
    for path in counters:
        with contextlib.suppress(OSError, ValueError, IndexError), open(path, encoding="ascii") as file:
            return int(file.read().split()[1]) > 0
    return False
