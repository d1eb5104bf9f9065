"""Control groups: caps on one sandbox that the kernel holds, in version 1 or 2 of its interface.

Each sandbox has a group of its own below a folder of this installation's, which stands below the group the server runs
in: whatever bounds the server bounds its sandboxes too. The agent and all it starts are in the group, the runner is
not: it must live to tell why the agent does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from carrel.abc import Excess, SandboxUsage

_PERIOD_US = 100_000
_END_SECONDS = 10.0
_NEARLY = 32
_MOUNTS = Path("/proc/self/mountinfo")
_OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class Caps:
    """The most that one sandbox may take. None: no cap."""

    memory_bytes: int | None = None
    processes: int | None = None
    """Threads count too."""
    cpus: float | None = None


class Group(ABC):
    """One sandbox's control group."""

    version: int

    def __init__(self, folders: dict[str, Path]) -> None:
        """Look at the group with these folders, by controller; nothing is made."""
        self._folders = folders

    @property
    def entrances(self) -> list[str]:
        """The files a process writes its id to, to be in the group from then on, its children too."""
        return [str(folder / "cgroup.procs") for folder in self._unique()]

    def note(self, path: Path) -> None:
        """Write down which group this is, before it is made."""
        folders = {name: str(folder) for name, folder in self._folders.items()}
        path.write_text(json.dumps({"version": self.version, "folders": folders}))

    @staticmethod
    def noted(path: Path) -> Group | None:
        """The group that was written down there, whether it is there or not; None where nothing was."""
        try:
            said = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        folders = {name: Path(folder) for name, folder in said["folders"].items()}
        return GroupV1(folders) if said["version"] == 1 else GroupV2(folders)

    def make(self, caps: Caps) -> None:
        """Make the group with these caps.

        Raises:
            OSError: the kernel does not let us.
        """
        for folder in self._unique():
            folder.mkdir(exist_ok=True)
        self._cap(caps)

    def processes(self) -> list[int]:
        """The ids of the processes in it."""
        found: set[int] = set()
        for folder in self._unique():
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
        return sorted(found)

    def end(self) -> bool:
        """Kill every process in it and remove it. Whether it is gone now."""
        with contextlib.suppress(OSError):
            _write(self._folders["pids"], "pids.max", 0)  # nobody forks faster than we kill
        deadline = time.monotonic() + _END_SECONDS
        left = self._unique()
        while left:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            left = [folder for folder in left if not _remove(folder)]
            if left and time.monotonic() > deadline:
                return False
            if left:
                time.sleep(0.005)
        return True

    @abstractmethod
    def measure(self) -> SandboxUsage | None:
        """What is in it takes now; None where there is no such group."""

    @abstractmethod
    def _cap(self, caps: Caps) -> None:
        """Write the caps."""

    def _unique(self) -> list[Path]:
        return list(dict.fromkeys(self._folders.values()))

    def _forks_refused(self) -> bool:
        return _table(self._folders["pids"], "pids.events").get("max", 0) > 0


class GroupV1(Group):
    """A folder in the hierarchy of each controller.

    Where memory is at its end the kernel would kill some process of the group, and the agent would go on without its
    tool. Here it puts them to sleep instead, so that the sandbox is ended as a whole, and for a reason that is told.
    """

    version = 1

    def measure(self) -> SandboxUsage | None:
        """See the class above."""
        memory, pids = self._folders["memory"], self._folders["pids"]
        try:
            taken, limit = _number(memory, "memory.usage_in_bytes"), _number(memory, "memory.limit_in_bytes")
            processes = _number(pids, "pids.current")
        except OSError:
            return None
        stat = _table(memory, "memory.stat")
        # What the kernel would give back at once is not counted.
        taken -= stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
        oom = _table(memory, "memory.oom_control")
        # What finds no memory within a system call is told so, and does not sleep; nothing counts it for us. So what is
        # nearly at its end, all that could be given back aside, is taken for at its end.
        full = taken > limit - limit // _NEARLY
        excess: Excess | None = None
        if oom.get("under_oom", 0) or oom.get("oom_kill", 0) or full:
            excess = Excess.MEMORY
        elif self._forks_refused():
            excess = Excess.PROCESSES
        cpu = _number(self._folders["cpuacct"], "cpuacct.usage") / 1e9 if "cpuacct" in self._folders else 0.0
        return SandboxUsage(memory_bytes=max(0, taken), processes=processes, cpu_seconds=cpu, excess=excess)

    def _cap(self, caps: Caps) -> None:
        memory = self._folders["memory"]
        if caps.memory_bytes is not None:
            _write(memory, "memory.limit_in_bytes", caps.memory_bytes)
            with contextlib.suppress(FileNotFoundError):  # a kernel that does not account swap
                _write(memory, "memory.memsw.limit_in_bytes", caps.memory_bytes)
            _write(memory, "memory.oom_control", 1)
        if caps.processes is not None:
            _write(self._folders["pids"], "pids.max", caps.processes)
        if caps.cpus is not None and "cpu" in self._folders:
            _write(self._folders["cpu"], "cpu.cfs_period_us", _PERIOD_US)
            _write(self._folders["cpu"], "cpu.cfs_quota_us", _quota(caps.cpus))


class GroupV2(Group):
    """One folder for all controllers. Where memory is at its end the kernel kills all that is in it, as a whole."""

    version = 2

    def measure(self) -> SandboxUsage | None:
        """See the class above."""
        folder = self._folders["memory"]
        try:
            taken, processes = _number(folder, "memory.current"), _number(folder, "pids.current")
        except OSError:
            return None
        stat = _table(folder, "memory.stat")
        taken -= stat.get("active_file", 0) + stat.get("inactive_file", 0)
        excess: Excess | None = None
        if _table(folder, "memory.events").get("oom_kill", 0):
            excess = Excess.MEMORY
        elif self._forks_refused():
            excess = Excess.PROCESSES
        cpu = _table(folder, "cpu.stat").get("usage_usec", 0) / 1e6
        return SandboxUsage(memory_bytes=max(0, taken), processes=processes, cpu_seconds=cpu, excess=excess)

    def _cap(self, caps: Caps) -> None:
        folder = self._folders["memory"]
        if caps.memory_bytes is not None:
            _write(folder, "memory.max", caps.memory_bytes)
            with contextlib.suppress(FileNotFoundError):  # a kernel that does not account swap
                _write(folder, "memory.swap.max", 0)
            _write(folder, "memory.oom.group", 1)
        if caps.processes is not None:
            _write(folder, "pids.max", caps.processes)
        if caps.cpus is not None and "cpu" in self._folders:
            _write(folder, "cpu.max", f"{_quota(caps.cpus)} {_PERIOD_US}")


class Cgroups:
    """Where this installation's groups are."""

    def __init__(self, kind: type[Group], bases: dict[str, Path]) -> None:
        """Make groups below `bases`, a folder for each controller (`memory` and `pids` at least)."""
        self._kind = kind
        self._bases = bases

    @property
    def version(self) -> int:
        """1 or 2."""
        return self._kind.version

    @property
    def caps_cpu(self) -> bool:
        """Whether a cap on CPUs can be held."""
        return "cpu" in self._bases

    @classmethod
    def find(cls, name: str, *, mounts: Path = _MOUNTS, own: Path = _OWN) -> Cgroups | None:
        """The control groups that may be made here, in a folder of this name; None where none may.

        Args:
            name: the folder's name, which no other installation on this host has.
            mounts: where the mounts of this process are told.
            own: where the groups of this process are told.
        """
        try:
            said = mounts.read_text(), own.read_text()
        except OSError:  # no such kernel
            return None
        return next((found for found in _found(name, *said) if found.open()), None)

    def group(self, sandbox_id: str, caps: Caps) -> Group:
        """The group of a sandbox with these caps; it is not made by this call."""
        wanted = [name for name in self._bases if name != "cpu" or caps.cpus is not None]
        return self._kind({name: self._bases[name] / sandbox_id for name in wanted})

    def left(self) -> list[tuple[str, Group]]:
        """Every group there is: the sandbox's id, and the group."""
        names: set[str] = set()
        for base in self._bases.values():
            with contextlib.suppress(FileNotFoundError):
                names |= {entry.name for entry in base.iterdir() if entry.is_dir()}
        return [(name, self._kind({c: base / name for c, base in self._bases.items()})) for name in sorted(names)]

    def close(self) -> None:
        """Remove the folders of this installation's where nothing is in them."""
        for base in dict.fromkeys(self._bases.values()):
            _remove(base)

    def open(self) -> bool:
        """Make the folders of this installation's. Whether groups can be made there: tried, for nothing else tells."""
        try:
            for base in dict.fromkeys(self._bases.values()):
                if self._kind is GroupV2:
                    _delegate(base.parent)
                base.mkdir(exist_ok=True)
                if self._kind is GroupV2:
                    _delegate(base)
        except OSError:
            self.close()
            return False
        caps = Caps(memory_bytes=64 << 20, processes=16, cpus=1.0)
        trial = self.group("trial", caps)
        try:
            trial.make(caps)
            works = trial.measure() is not None
        except OSError:
            works = False
        trial.end()
        if not works:
            self.close()
        return works


def name_of(folder: Path) -> str:
    """What the folder of an installation's groups is called: it follows from where its sandboxes are."""
    return f"carrel-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def _found(name: str, mounts: str, own: str) -> Iterator[Cgroups]:
    """Where groups might be made, the best place first."""
    where = {controller: path for line in own.splitlines() for controller, path in _owned(line)}
    first: dict[str, Path] = {}
    second: list[Path] = []
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        root, point = fields.split()[3:5]
        kind, _, options = rest.split()[:3]
        if kind == "cgroup":
            for controller in {"memory", "pids", "cpu", "cpuacct"} & set(options.split(",")):
                if controller in where:
                    first[controller] = _beneath(Path(point), root, where[controller]) / name
        elif kind == "cgroup2" and "" in where:
            ours = _beneath(Path(point), root, where[""])
            # A group that has processes of its own cannot pass its controllers on, so the one above is the other
            # choice: systemd's `DelegateSubgroup=` is made for that.
            second += [ours / name] + ([ours.parent / name] if ours != Path(point) else [])
    if {"memory", "pids"} <= first.keys():
        yield Cgroups(GroupV1, first)
    for folder in second:
        yield Cgroups(GroupV2, dict.fromkeys(("memory", "pids", "cpu"), folder))


def _owned(line: str) -> list[tuple[str, str]]:
    """The controllers of a line of /proc/self/cgroup, each with the group we are in; version 2 has none."""
    _, controllers, path = line.split(":", 2)
    return [(controller, path) for controller in controllers.split(",")]


def _beneath(point: Path, root: str, path: str) -> Path:
    """Where a group's folder is, in a mount that may show no more than a part of the hierarchy."""
    shown = path if root == "/" or not path.startswith(root) else path[len(root) :]
    return point / shown.strip("/")


def _delegate(folder: Path) -> None:
    """Have the groups in this folder bounded by the controllers we need (version 2)."""
    offered = (folder / "cgroup.controllers").read_text().split()
    if not {"memory", "pids"} <= set(offered):
        raise OSError(f"{folder} has no memory and pids controllers")
    wanted = [name for name in ("memory", "pids", "cpu") if name in offered]
    passed_on = (folder / "cgroup.subtree_control").read_text().split()
    if missing := [f"+{name}" for name in wanted if name not in passed_on]:
        if _only_us(folder):
            leaf = folder / "carrel-server"
            leaf.mkdir(exist_ok=True)
            _write(leaf, "cgroup.procs", os.getpid())
        _write(folder, "cgroup.subtree_control", " ".join(missing))


def _only_us(folder: Path) -> bool:
    """Whether this process is the one that stands in the way."""
    return (folder / "cgroup.procs").read_text().split() == [str(os.getpid())]


def _quota(cpus: float) -> int:
    return max(1000, round(cpus * _PERIOD_US))


def _number(folder: Path, name: str) -> int:
    return int((folder / name).read_text())


def _table(folder: Path, name: str) -> dict[str, int]:
    """A file of a name and a number a line; empty where it is not there."""
    try:
        lines = (folder / name).read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, _, value in (line.partition(" ") for line in lines) if value.isdigit()}


def _write(folder: Path, name: str, value: object) -> None:
    # Without O_CREAT: in a place that is no control group, there is nothing to write to.
    fd = os.open(folder / name, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _remove(folder: Path) -> bool:
    """Remove a group's folder. Whether it is gone; while something dies in it, it is not."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
