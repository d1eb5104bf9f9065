"""What a container takes, out of what the engine tells of its control group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carrel.abc import Excess, SandboxUsage

__all__ = ["ended_of", "usage_of"]


def usage_of(stats: Mapping[str, Any], *, out_of_memory: bool) -> SandboxUsage | None:
    """What the container takes; None where nothing of it runs.

    Args:
        stats: what the engine tells.
        out_of_memory: whether the kernel has ended a process of it for want of memory.
    """
    pids = stats.get("pids_stats", {})
    if not pids.get("current"):
        return None
    memory = stats.get("memory_stats", {})
    details = memory.get("stats", {})
    # Version 1 of control groups, then version 2, call by these names what is given back first.
    cache = details.get("total_inactive_file", details.get("inactive_file", 0))
    limit = pids.get("limit") or 0
    processes = int(pids["current"])
    excess = Excess.MEMORY if out_of_memory else Excess.PROCESSES if 0 < limit <= processes else None
    return SandboxUsage(
        memory_bytes=max(0, int(memory.get("usage", 0)) - int(cache)),
        processes=processes,
        cpu_seconds=int(stats.get("cpu_stats", {}).get("cpu_usage", {}).get("total_usage", 0)) / 1e9,
        excess=excess,
    )


def ended_of(inspected: Mapping[str, Any], *, out_of_memory: bool) -> SandboxUsage | None:
    """What a container that does not run any more takes: nothing, but it may have ended of a cap."""
    state = inspected.get("State", {})
    if state.get("Running") or not (out_of_memory or state.get("OOMKilled")):
        return None
    return SandboxUsage(memory_bytes=0, processes=0, cpu_seconds=0.0, excess=Excess.MEMORY)
