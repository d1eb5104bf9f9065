"""The local runtime: a runner forked from a preloaded parent, its agent behind bubblewrap."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from carrel import abc
from carrel.errors import DiskFull, SandboxLaunchFailed, ValidationFailed
from carrel.model import GATEWAY_ONLY, Isolation, NetworkPolicy, SandboxTemplate
from carrel.protocol.bootstrap import Bootstrap
from carrel.runtimes.local import isolation as walls
from carrel.runtimes.local import processes
from carrel.runtimes.local.caps import Fence, Means
from carrel.runtimes.local.cgroups import Caps
from carrel.runtimes.local.nursery import Nursery
from carrel.runtimes.view import COMMANDS, with_model

log = structlog.get_logger(__name__)

_PLAIN = SandboxTemplate()


@dataclass(frozen=True, kw_only=True)
class LocalRuntimeOptions:
    """How local sandboxes are made."""

    folder: Path
    """Where each sandbox has a folder of its own while it lives."""
    link_socket: Path
    gateway_folder: Path
    """The folder, shown to every agent, in which the model gateway's socket stands."""
    cli_path: Path
    isolation: Isolation | None = None
    network: NetworkPolicy = GATEWAY_ONLY
    """Of sandboxes whose template names none."""
    read_only_paths: tuple[str, ...] = ()
    plugins: tuple[Path, ...] = ()
    """Folders of Claude Code's plugins, for every agent to read."""
    skills: Path | None = None
    """One more, with the skills that come with the gateway's tools."""
    model_env: Mapping[str, str] | None = field(default=None, repr=False)
    """What tells each agent of the model's provider, its credential included; None: agents reach our gateway alone."""
    reconnect_window_seconds: float = 300.0
    max_frame_bytes: int = 64 * 1024 * 1024
    outbox_memory_bytes: int = 64 * 1024 * 1024
    outbox_disk_bytes: int = 1024 * 1024 * 1024
    disk_reserve_bytes: int = 0
    caps: Caps = field(default_factory=Caps)
    caps_by: Means = "auto"


class LocalRuntime(abc.Runtime):
    """Sandboxes as processes of this host."""

    name = "local"

    def __init__(self, options: LocalRuntimeOptions) -> None:
        """Make the runtime; nothing is started before `start`."""
        self._options = options
        self._isolation = options.isolation or Isolation.BUBBLEWRAP
        self.isolated = self._isolation is not Isolation.NONE
        self._fence = Fence(options.folder, options.caps, options.caps_by)
        self._nursery = Nursery(options.folder / "nursery.log", max_bytes=options.max_frame_bytes)

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Check that this host can isolate as asked, and start the preloaded parent."""
        self._options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await asyncio.to_thread(walls.choose, self._isolation)
        await asyncio.to_thread(self._fence.open)
        exit_stack.callback(self._fence.close)
        await self._nursery.start(exit_stack)

    def check(self, template: SandboxTemplate) -> None:
        """Refuse what only containers have."""
        of_containers = {"image", "platform", "oci_runtime", "mounts", "resources"}
        # How much is written is no matter of the runtime's: the gateway itself looks at the files.
        held = template.model_copy(update={"resources": template.resources.model_copy(update={"disk_mb": None})})
        given = [name for name in sorted(of_containers) if getattr(held, name) != getattr(_PLAIN, name)]
        if given:
            raise ValidationFailed(
                f"sandbox.{given[0]}: the runtime local has none; leave it out, or name a runtime of containers"
            )
        network = template.network
        if network is not None and network.mode == "allow" and self._isolation is not Isolation.BUBBLEWRAP:
            raise ValidationFailed(f"sandbox.network: allow cannot hold with isolation {self._isolation}")

    def finds(self, command: str) -> bool | None:
        """Whether there is such a command below /usr and what else of the host sandboxes see."""
        if "/" in command:
            return Path(command).exists() if command.startswith("/usr/") else None
        return shutil.which(command, path=COMMANDS) is not None

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Start a sandbox; see the contract."""
        folder = self._options.folder / spec.sandbox_id
        state: dict[str, Any] = {"folder": str(folder), "sandbox_id": spec.sandbox_id}
        yield state
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            bootstrap = self._bootstrap(spec, folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(operator_detail=repr(error)) from error
            raise SandboxLaunchFailed(operator_detail=repr(error)) from error
        pid = await self._nursery.fork(bootstrap)
        yield state | {"pid": pid}

    def _bootstrap(self, spec: abc.LaunchSpec, folder: Path) -> Bootstrap:
        options = self._options
        plugins = (*options.plugins, *(Path(path) for path in spec.template.plugins or ()))
        place = walls.Place(
            folder=folder,
            workspace=Path(spec.workspace),
            workspace_within=None if spec.workspace_within is None else Path(spec.workspace_within),
            home=Path(spec.home),
            gateway_folder=options.gateway_folder,
            cli=options.cli_path,
            owner=spec.owner,
            plugins=(*plugins, *([options.skills] if options.skills is not None else [])),
            memory_bytes=options.caps.memory_bytes,
        )
        network = spec.template.network or options.network
        if network.mode == "allow" and self._isolation is not Isolation.BUBBLEWRAP:
            raise SandboxLaunchFailed(operator_detail=f"network: allow cannot hold with isolation {self._isolation}")
        wrapped = walls.wrap(
            self._isolation,
            network,
            place,
            read_only=list(options.read_only_paths),
            sandbox_id=spec.sandbox_id,
            mcp=spec.mcp,
        )
        cli_path = self._fence.enter(folder, wrapped.cli_path, own_user=spec.owner is not None)
        return Bootstrap(
            sandbox_id=spec.sandbox_id,
            generation=spec.generation,
            link_socket=str(options.link_socket),
            link_token=spec.link_token,
            agent_token=spec.agent_token,
            lock_path=str(folder / "lock"),
            log_path=str(folder / "runner.log"),
            spool_path=str(folder / "spool"),
            cli_path=cli_path,
            cwd=wrapped.cwd,
            workspace=spec.workspace,
            home=spec.home,
            config_dir=wrapped.config_dir,
            plugins=wrapped.plugins[: len(plugins)],
            skills=next(iter(wrapped.plugins[len(plugins) :]), None),
            gateway_socket=str(options.gateway_folder / "gateway.sock"),
            agent_env=with_model(wrapped.env, options.model_env),
            direct=options.model_env is not None,
            late_env_path=wrapped.late_env_path,
            owner=spec.owner,
            mounts=wrapped.mounts,
            mount_root=wrapped.mount_root,
            egress=wrapped.egress,
            mcp=wrapped.mcp,
            subreaper=self._isolation is not Isolation.BUBBLEWRAP,
            reconnect_window_seconds=options.reconnect_window_seconds,
            max_frame_bytes=options.max_frame_bytes,
            outbox_memory_bytes=options.outbox_memory_bytes,
            outbox_disk_bytes=options.outbox_disk_bytes,
            disk_reserve_bytes=options.disk_reserve_bytes,
        )

    async def terminate(self, state: Mapping[str, Any]) -> None:
        """End the runner, then whatever carries the sandbox's mark, then its folder."""
        await asyncio.to_thread(self._terminate, str(state["sandbox_id"]), Path(str(state["folder"])))

    def _terminate(self, sandbox_id: str, folder: Path) -> None:
        processes.end_holder(folder / "lock")
        if not self._fence.end(folder):
            log.error("sandbox.group_not_ended", sandbox=sandbox_id)
        if left := processes.end_marked(sandbox_id):
            log.error("sandbox.not_ended", sandbox=sandbox_id, pids=left)
        shutil.rmtree(folder, ignore_errors=True)

    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """Whether each runner's lock is held, or is yet to be taken."""
        return {sandbox_id: _alive(state) for sandbox_id, state in states.items()}

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        """What each takes, by its control group, or else by its processes."""
        return await asyncio.to_thread(self._fence.measure, states)

    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """Every sandbox with a folder here."""
        with os.scandir(self._options.folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return {name: {"sandbox_id": name, "folder": str(self._options.folder / name)} for name in names}

    async def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        """The runner's log."""
        path = Path(str(state["folder"]), "runner.log")
        if path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                yield line

    @property
    def nursery_pid(self) -> int | None:
        """The preloaded parent's process id."""
        return self._nursery.pid


def _alive(state: Mapping[str, Any]) -> bool:
    folder = Path(str(state["folder"]))
    if processes.lock_held(folder / "lock"):
        return True
    # A launch that was cut short after it had asked for a runner may come to one yet; without a folder it cannot.
    return "pid" not in state and folder.exists()
