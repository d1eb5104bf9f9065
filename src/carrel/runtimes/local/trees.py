"""What a tree of processes takes, read from /proc: for where no control group counts it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from carrel.abc import SandboxUsage

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK_AGAIN_SECONDS = 10.0
_CHANGED_BYTES = 16 * 1024 * 1024
_MEMORY_FILESYSTEMS = ("tmp", "run", "dev/shm")


@dataclass(frozen=True)
class _Process:
    parent: int
    threads: int
    ticks: int
    resident_bytes: int


@dataclass
class _Known:
    """What was found when the tree was last looked at closely."""

    at: float = 0.0
    resident_bytes: int = -1
    memory_bytes: int = 0


@dataclass
class Trees:
    """Measures trees of processes by descent from their roots."""

    known: dict[str, _Known] = field(default_factory=dict)

    def measure(self, roots: Mapping[str, int], *, memory_cap: int | None = None) -> dict[str, SandboxUsage]:
        """What descends from each root takes, the root itself left out. Blocks; one call at a time.

        A page that processes share is counted once (PSS). To have that counted is dear, so it is done anew only where
        the tree has changed, where it might be above its cap, or now and then.

        Args:
            roots: process ids by name.
            memory_cap: what is looked at closely whenever it might be more.
        """
        self.known = {name: self.known.get(name, _Known()) for name in roots}
        processes = _processes() if roots else {}
        children: dict[int, list[int]] = {}
        for pid, process in processes.items():
            children.setdefault(process.parent, []).append(pid)
        found = {}
        for name, root in roots.items():
            pids = list(_below(root, children))
            if root in processes:
                found[name] = self._measure(self.known[name], {pid: processes[pid] for pid in pids}, memory_cap)
        return found

    def _measure(self, known: _Known, tree: Mapping[int, _Process], cap: int | None) -> SandboxUsage:
        resident = sum(process.resident_bytes for process in tree.values())
        now = time.monotonic()
        changed = abs(resident - known.resident_bytes) > min(_CHANGED_BYTES, resident // 16)
        if changed or now - known.at > _LOOK_AGAIN_SECONDS or (cap is not None and resident > cap):
            known.at, known.resident_bytes = now, resident
            known.memory_bytes = sum(_shared_out(pid, tree[pid]) for pid in tree)
        return SandboxUsage(
            memory_bytes=known.memory_bytes + _in_memory_files(tree),
            processes=sum(process.threads for process in tree.values()),
            cpu_seconds=sum(process.ticks for process in tree.values()) / _TICKS,
        )


def _processes() -> dict[int, _Process]:
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            # Counted from behind the command's name, which may hold anything.
            fields = file.read().rpartition(b")")[2].split()
            found[int(name)] = _Process(
                parent=int(fields[1]),
                threads=int(fields[17]),
                ticks=sum(map(int, fields[11:15])),
                resident_bytes=int(fields[21]) * _PAGE_BYTES,
            )
    return found


def _below(root: int, children: Mapping[int, list[int]]) -> Iterable[int]:
    waiting = list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, ())


def _shared_out(pid: int, process: _Process) -> int:
    """The process's memory, of what it shares with others its share; swap counts too."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except FileNotFoundError:
        return 0
    except OSError:  # it has just ended, or we may not look so closely
        return process.resident_bytes
    values = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines[1:])}
    return (values.get("Pss", 0) + values.get("SwapPss", 0)) * 1024


def _in_memory_files(tree: Iterable[int]) -> int:
    """What lies in files that are kept in memory, in the mounts that the tree's processes have and we have not."""
    seen: dict[int, int] = {}
    ours = _device("/proc/self/root")
    for pid in tree:
        for name in _MEMORY_FILESYSTEMS:
            path = f"/proc/{pid}/root/{name}"
            device = _device(path)
            if device is None or device in seen or device == ours or _device(f"/{name}") == device:
                continue
            with contextlib.suppress(OSError):
                room = os.statvfs(path)
                seen[device] = (room.f_blocks - room.f_bfree) * room.f_frsize
    return sum(seen.values())


def _device(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None
