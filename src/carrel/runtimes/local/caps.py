"""Holds each sandbox to its caps: by a control group where one can be made, else by looking and by the caller's hand."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import structlog

from carrel.abc import Excess, SandboxUsage
from carrel.errors import InvalidSettings
from carrel.runtimes.local import processes
from carrel.runtimes.local.cgroups import Caps, Cgroups, Group, name_of
from carrel.runtimes.local.trees import Trees

log = structlog.get_logger(__name__)

Means = Literal["auto", "cgroup", "watchdog"]

_NOTE = "cgroup"


class Fence:
    """The caps of every sandbox of this installation. It blocks: call it from a thread."""

    def __init__(self, folder: Path, caps: Caps, means: Means) -> None:
        """Fence the sandboxes whose folders are in `folder`; nothing is made before `open`."""
        self._folder = folder
        self._caps = caps
        self._means = means
        self._cgroups: Cgroups | None = None
        self._trees = Trees()

    def open(self) -> None:
        """Choose the means, say which in the log, and end what is left in groups of sandboxes that are gone.

        Raises:
            InvalidSettings: control groups are asked for, and none can be made here.
        """
        if self._means != "watchdog":
            self._cgroups = Cgroups.find(name_of(self._folder))
        if self._cgroups is None and self._means == "cgroup":
            raise InvalidSettings(
                "limits.sandbox_caps is `cgroup`, and no control group with memory and pids controllers can be made "
                "here. Run as root, or under systemd with Delegate=yes and DelegateSubgroup=server, or choose `auto`."
            )
        told = {"memory_mb": (self._caps.memory_bytes or 0) >> 20 or None, "processes": self._caps.processes}
        means = "watchdog" if self._cgroups is None else f"cgroup v{self._cgroups.version}"
        log.info("sandbox.caps", by=means, cpus=self._caps.cpus, **told)
        if self._caps.cpus is not None and (self._cgroups is None or not self._cgroups.caps_cpu):
            log.warning("sandbox.cpus_not_capped", why="there is no control group for it here")
        for sandbox_id, group in self._cgroups.left() if self._cgroups is not None else ():
            if not (self._folder / sandbox_id).exists():
                log.warning("sandbox.orphan", sandbox=sandbox_id, pids=group.processes())
                group.end()

    def close(self) -> None:
        """Remove what has no sandbox in it any more."""
        if self._cgroups is not None:
            self._cgroups.close()

    def enter(self, folder: Path, cli_path: str, *, own_user: bool) -> str:
        """Make the fence of a new sandbox: the program that starts its agent within.

        Args:
            folder: the sandbox's own.
            cli_path: the program that starts the agent.
            own_user: whether its agent is a user of its own, all of whose processes are the sandbox's.

        Raises:
            OSError: it cannot be made.
        """
        lines = ["#!/bin/sh"]
        if self._cgroups is not None:
            group = self._cgroups.group(folder.name, self._caps)
            group.note(folder / _NOTE)
            group.make(self._caps)
            lines += [f"echo $$ >{shlex.quote(entrance)} || exit 1" for entrance in group.entrances]
        start = [cli_path]
        if own_user and self._caps.processes is not None and (prlimit := shutil.which("prlimit")) is not None:
            # A belt: between two looks of a watchdog, a fork bomb grows to this and no further.
            most = self._caps.processes + self._caps.processes // 4
            start = [prlimit, f"--nproc={most}:{most}", cli_path]
        if len(start) == len(lines) == 1:
            return cli_path
        program = folder / "agent"
        program.write_text("\n".join([*lines, f'exec {shlex.join(start)} "$@"', ""]))
        program.chmod(0o700)
        return str(program)

    def measure(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, SandboxUsage]:
        """What each of these sandboxes takes; those of which nothing runs are left out."""
        found: dict[str, SandboxUsage] = {}
        roots: dict[str, int] = {}
        for sandbox_id, state in states.items():
            folder = Path(str(state.get("folder", self._folder / sandbox_id)))
            group = Group.noted(folder / _NOTE)
            if group is not None and (usage := group.measure()) is not None:
                found[sandbox_id] = usage
            elif group is None and (runner := processes.holder(folder / "lock")) is not None:
                roots[sandbox_id] = runner
        for sandbox_id, usage in self._trees.measure(roots, memory_cap=self._caps.memory_bytes).items():
            found[sandbox_id] = dataclasses.replace(usage, excess=self._excess(usage))
        return found

    def _excess(self, usage: SandboxUsage) -> Excess | None:
        if self._caps.memory_bytes is not None and usage.memory_bytes > self._caps.memory_bytes:
            return Excess.MEMORY
        if self._caps.processes is not None and usage.processes > self._caps.processes:
            return Excess.PROCESSES
        return None

    def end(self, folder: Path) -> bool:
        """Kill what is in the sandbox's group, and remove it. Whether nothing is left of it."""
        group = Group.noted(folder / _NOTE)
        return group is None or group.end()
