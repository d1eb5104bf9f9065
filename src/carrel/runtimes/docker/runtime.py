"""The Docker runtime: a container per sandbox, with the runner and its agent inside."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from carrel import abc
from carrel.errors import (
    CarrelError,
    DiskFull,
    EngineElsewhere,
    EngineUnavailable,
    ImageMissing,
    InvalidSettings,
    RuntimeUnavailable,
    SandboxLaunchFailed,
)
from carrel.model import SandboxTemplate, new_id
from carrel.protocol.bootstrap import EGRESS_SOCKET, GATEWAY_PORT, Bootstrap, Road
from carrel.runtimes import view
from carrel.runtimes.docker import container
from carrel.runtimes.docker.container import Bind, ContainerOptions
from carrel.runtimes.docker.engine import Engine, EngineTls, Refusal
from carrel.runtimes.docker.host_paths import HostPaths, own_container, own_mounts
from carrel.runtimes.docker.usage import ended_of, usage_of

log = structlog.get_logger(__name__)

_ALIVE = frozenset({"running", "paused", "restarting"})
_ASKED_AT_ONCE = 8
_NOBODY = 65534
# Docker's words, then Podman's.
_NO_SUCH_SOURCE = re.compile("bind source path does not exist|no such file or directory", re.IGNORECASE)
_LOG_LINES = 1000
_LISTEN_AGAIN_SECONDS = 1.0
_LAUNCH_AGAIN_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class DockerRuntimeOptions:
    """How containers are made, and where."""

    installation: str
    """By which our own containers are told from others'."""
    folder: Path
    """Where each sandbox has a folder of its own while it lives."""
    link_folder: Path
    """The folder, shown to every sandbox, in which the runners' socket `link.sock` stands."""
    gateway_folder: Path
    """The folder, shown to every sandbox, in which the model gateway's socket stands."""
    containers: ContainerOptions
    host: str = "unix:///var/run/docker.sock"
    wait_seconds: float = 30.0
    tls: EngineTls | None = None
    data: Path | None = None
    """Our data folder, and where the engine's host has it; None: found out."""
    data_on_host: Path | None = None
    read_only_paths: tuple[str, ...] = ()
    plugins: tuple[Path, ...] = ()
    model_env: Mapping[str, str] | None = field(default=None, repr=False)
    """What tells each agent of the model's provider, its credential included; None: agents reach our gateway alone."""
    reconnect_window_seconds: float = 300.0
    max_frame_bytes: int = 64 * 1024 * 1024
    outbox_memory_bytes: int = 64 * 1024 * 1024
    outbox_disk_bytes: int = 1024 * 1024 * 1024
    disk_reserve_bytes: int = 0


class DockerRuntime(abc.Runtime):
    """Sandboxes as containers."""

    name = "docker"
    isolated = True

    def __init__(self, options: DockerRuntimeOptions) -> None:
        """Make the runtime; no engine is asked before `start`."""
        self._options = options
        self._engine = Engine(options.host, wait_seconds=options.wait_seconds, tls=options.tls)
        self._paths = HostPaths()
        self._labels = container.labels_of(options.installation)
        # Which met their cap of memory and go on: an engine says so once, and not when it is asked.
        self._out_of_memory: set[str] = set()

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Check that the engine answers, and say what of the wall it cannot build."""
        self._options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._engine.start(exit_stack)
        try:
            await self._engine.wait()
            self._paths = await self._host_paths()
            await self._look_at_the_engine()
            for place in (self._options.link_folder, self._options.gateway_folder, self._options.folder):
                self._paths.of(place)
            if self._options.host.startswith("tcp://"):
                await self._see_that_it_is_here()
        except (RuntimeUnavailable, Refusal) as error:
            raise EngineUnavailable(
                f"No Docker engine answers at {self._options.host} as it should. Start it, let this user reach it (or its "
                "proxy make all the calls of docs/docker.md), name another with docker.host, or choose runtime: local.",
                operator_detail=str(error),
            ) from error

    async def _see_that_it_is_here(self) -> None:
        """Have a container made, and never started, that is shown a file which we have just written."""
        options, probe = self._options, f"probe-{new_id()}"
        folder = options.folder / probe
        folder.mkdir(mode=0o700)
        file = folder / "probe"
        file.touch()
        name = container.name_of(probe)
        wanted = container.config(
            sandbox_id=probe,
            session_id="",
            installation=options.installation,
            user=(_NOBODY, _NOBODY),
            template=SandboxTemplate(),
            options=options.containers,
            binds=[(self._paths.of(file), Bind(file, "/probe"))],
        )
        try:
            await self._engine.create(name, wanted, platform=options.containers.platform)
        except ImageMissing:  # said already, and without it nothing is launched
            return
        except RuntimeUnavailable:
            raise
        except SandboxLaunchFailed as error:
            if _NO_SUCH_SOURCE.search(error.operator_detail or "") is None:
                log.warning("docker.files_not_checked", detail=error.operator_detail)
                return
            raise EngineElsewhere(
                f"The Docker engine at {options.host} does not see {file}, which is in this server's data folder, so it "
                "is not an engine of this host, or has the folder elsewhere. Run Carrel beside its engine, or say with "
                "docker.data_on_host where the engine's host has the data folder.",
                operator_detail=error.operator_detail,
            ) from error
        finally:
            await self._engine.remove(name)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _host_paths(self) -> HostPaths:
        options = self._options
        if options.data is not None and options.data_on_host is not None:
            return HostPaths([(options.data, options.data_on_host)])
        own = own_container()
        inspected = None if own is None else await self._engine.inspect(own)
        # None: in a container, but of another engine or none; then both see the same, or a launch says what is wrong.
        return HostPaths() if inspected is None else HostPaths(own_mounts(inspected))

    async def _look_at_the_engine(self) -> None:
        info, wall = await self._engine.info(), self._options.containers
        runtimes = info.get("Runtimes") or {}
        if wall.oci_runtime is not None and wall.oci_runtime not in runtimes:
            there = ", ".join(sorted(runtimes))
            raise InvalidSettings(
                f"docker.oci_runtime {wall.oci_runtime!r} is not known to the engine; it has {there}."
            )
        lacking = [name for name in ("MemoryLimit", "SwapLimit", "PidsLimit", "CPUCfsQuota") if info.get(name) is False]
        if lacking:
            log.warning("docker.not_capped", lacking=lacking, why="the engine's kernel does not have these controllers")
        if not await self._engine.has_image(wall.image):
            log.warning("docker.image_missing", image=wall.image, remedy="scripts/build-images")
        log.info("docker.engine", version=info.get("ServerVersion"), driver=info.get("Driver"), image=wall.image)

    async def lacks(self, template: SandboxTemplate) -> CarrelError | None:
        """Whether the engine answers, and has the image."""
        try:
            there = await self._engine.has_image(template.image or self._options.containers.image)
        except (RuntimeUnavailable, Refusal):
            return RuntimeUnavailable()
        return None if there else ImageMissing()

    # --------------------------------------------------------------------------------------------------------- launch

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Start a sandbox; see the contract."""
        await self._engine.wait()
        name = container.name_of(spec.sandbox_id)
        state: dict[str, Any] = {"sandbox_id": spec.sandbox_id, "container": name}
        yield dict(state)
        try:
            wanted, bootstrap = await asyncio.to_thread(self._prepare, spec)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(operator_detail=repr(error)) from error
            raise SandboxLaunchFailed(operator_detail=repr(error)) from error
        except InvalidSettings as error:
            raise SandboxLaunchFailed(operator_detail=error.message) from error
        platform = spec.template.platform or self._options.containers.platform
        told = _told(bootstrap)
        deadline = None
        while True:
            try:
                if deadline is not None:
                    await self._engine.wait()
                    await self._engine.remove(name)
                await self._engine.create(name, wanted, platform=platform)
                yield state | {"created": True}
                await self._engine.run(name, told)
                break
            except RuntimeUnavailable as error:
                # An engine that ends answers until it does. What was begun has no bootstrap yet, so that it can be redone.
                deadline = deadline or time.monotonic() + self._options.wait_seconds
                if time.monotonic() > deadline:
                    raise
                log.warning("docker.launch_again", sandbox=spec.sandbox_id, detail=error.operator_detail)
                await asyncio.sleep(_LAUNCH_AGAIN_SECONDS)
        yield state | {"created": True, "started": True}

    def _prepare(self, spec: abc.LaunchSpec) -> tuple[dict[str, Any], Bootstrap]:
        """The sandbox's own folder; what its container is to be, and what its runner is told."""
        options = self._options
        user = spec.owner or (os.geteuid(), os.getegid())
        if user[0] == 0:
            raise SandboxLaunchFailed(operator_detail="an agent is never root, and this session has no user of its own")
        folder = options.folder / spec.sandbox_id
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "passwd").write_text(
            f"root:x:0:0:root:/root:/bin/sh\nagent:x:{user[0]}:{user[1]}:agent:{view.HOME}:/bin/bash\n"
        )
        (folder / "group").write_text(f"root:x:0:\nagent:x:{user[1]}:\n")
        binds = [
            Bind(Path(spec.workspace), view.WORKSPACE, read_only=False),
            Bind(Path(spec.home), view.HOME, read_only=False),
            Bind(options.gateway_folder, view.GATEWAY_FOLDER),
            Bind(options.link_folder, container.LINK_FOLDER),
            Bind(folder / "passwd", "/etc/passwd"),
            Bind(folder / "group", "/etc/group"),
            *(Bind(Path(path), path) for path in options.read_only_paths),
        ]
        plugins = {f"{view.PLUGINS}/{number}": path for number, path in enumerate(_plugins(options, spec), start=1)}
        binds += [Bind(path, target) for target, path in plugins.items()]
        wanted = container.config(
            sandbox_id=spec.sandbox_id,
            session_id=spec.session_id,
            installation=options.installation,
            user=user,
            template=spec.template,
            options=options.containers,
            binds=[(self._paths.of(bind.source), bind) for bind in binds],
        )
        env = view.environment(spec.sandbox_id) | {
            "HOME": view.HOME,
            "TMPDIR": "/tmp",
            "ANTHROPIC_UNIX_SOCKET": view.GATEWAY_SOCKET,
        }
        del env["PATH"]  # the image knows better where its programs are
        bootstrap = Bootstrap(
            sandbox_id=spec.sandbox_id,
            generation=spec.generation,
            link_socket=container.LINK_SOCKET,
            link_token=spec.link_token,
            agent_token=spec.agent_token,
            lock_path="",
            log_path="",
            spool_path=f"{view.HOME}/.carrel-spool",
            cli_path="",
            cwd=view.WORKSPACE,
            workspace=view.WORKSPACE,
            home=view.HOME,
            config_dir=f"{view.HOME}/.claude",
            plugins=list(plugins),
            gateway_socket=view.GATEWAY_SOCKET,
            agent_env=view.with_model(env, options.model_env) | spec.template.variables,
            direct=options.model_env is not None,
            places=_places(spec),
            egress=self._egress(spec),
            mcp=Road(socket=view.GATEWAY_SOCKET, port=GATEWAY_PORT) if spec.mcp else None,
            reconnect_window_seconds=options.reconnect_window_seconds,
            max_frame_bytes=options.max_frame_bytes,
            outbox_memory_bytes=options.outbox_memory_bytes,
            outbox_disk_bytes=options.outbox_disk_bytes,
            disk_reserve_bytes=options.disk_reserve_bytes,
        )
        return wanted, bootstrap

    def _egress(self, spec: abc.LaunchSpec) -> Road | None:
        network = spec.template.network or self._options.containers.network
        if network.mode != "allow":
            return None
        return Road(socket=f"{view.GATEWAY_FOLDER}/{EGRESS_SOCKET}")

    # ------------------------------------------------------------------------------------------------ those that live

    async def terminate(self, state: Mapping[str, Any]) -> None:
        """Kill the container and remove it, then the sandbox's folder."""
        sandbox_id = str(state["sandbox_id"])
        await self._engine.remove(str(state["container"]))
        await asyncio.to_thread(shutil.rmtree, self._options.folder / sandbox_id, ignore_errors=True)
        self._out_of_memory.discard(sandbox_id)

    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """Whether each container runs; those of an engine that does not answer are not confirmed gone."""
        if not states:
            return {}
        labels = list(self._labels)
        if len(states) == 1:
            labels += container.labels_of_sandbox(next(iter(states)))
        try:
            alive = {sandbox_id for sandbox_id, state in (await self._ours(labels)).items() if state in _ALIVE}
        except RuntimeUnavailable as error:
            log.warning("runtime.unavailable", runtime=self.name, detail=error.operator_detail)
            return dict.fromkeys(states, True)
        return {sandbox_id: sandbox_id in alive for sandbox_id in states}

    async def _ours(self, labels: list[str]) -> dict[str, str]:
        """Whose containers there are, and the state of each."""
        return {
            sandbox_id: str(each["State"])
            for each in await self._engine.ours(labels)
            if (sandbox_id := container.sandbox_of(each["Labels"])) is not None
        }

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        """What each container takes, by the engine."""
        asking = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def one(sandbox_id: str, name: str) -> tuple[str, abc.SandboxUsage | None]:
            async with asking:
                return sandbox_id, await self._measure(sandbox_id, name)

        found = await asyncio.gather(*(one(each, str(state["container"])) for each, state in states.items()))
        return {sandbox_id: usage for sandbox_id, usage in found if usage is not None}

    async def _measure(self, sandbox_id: str, name: str) -> abc.SandboxUsage | None:
        stats = await self._engine.stats(name)
        if stats is None:
            return None
        usage = usage_of(stats, out_of_memory=sandbox_id in self._out_of_memory)
        if usage is not None:
            return usage
        inspected = await self._engine.inspect(name)
        return None if inspected is None else ended_of(inspected, out_of_memory=sandbox_id in self._out_of_memory)

    async def watch(self, heard: Callable[[str], None]) -> None:
        """Listen to the engine's events."""
        while True:
            try:
                async for event in self._engine.events(self._labels, ["die", "oom"]):
                    sandbox_id = container.sandbox_of(event["Actor"]["Attributes"])
                    if sandbox_id is None:
                        continue
                    if event["Action"] == "oom":
                        self._out_of_memory.add(sandbox_id)
                    heard(sandbox_id)
            except RuntimeUnavailable as error:
                log.debug("docker.events_away", detail=error.operator_detail)
            # What happened meanwhile is found by whoever misses a runner, and looks again each second.
            await asyncio.sleep(_LISTEN_AGAIN_SECONDS)

    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """Every container with our label, and every folder that was made for one."""
        with os.scandir(self._options.folder) as entries:
            found = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
        found |= set(await self._ours(self._labels))
        return {each: {"sandbox_id": each, "container": container.name_of(each)} for each in found}

    async def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        """What runner and agent wrote to the container's output."""
        for piece in await self._engine.logs(str(state["container"]), _LOG_LINES):
            for line in piece.splitlines():
                yield line


def _told(bootstrap: Bootstrap) -> bytes:
    # Only what is not as usual: so an image of an earlier release understands it wherever it can give what is asked.
    return bootstrap.model_dump_json(exclude_defaults=True).encode() + b"\n"


def _plugins(options: DockerRuntimeOptions, spec: abc.LaunchSpec) -> list[Path]:
    return [*options.plugins, *(Path(path) for path in spec.template.plugins or ())]


def _places(spec: abc.LaunchSpec) -> dict[str, tuple[int, int]]:
    """What the runner has to find mounted, where an agent may have put a link in the path that the engine follows."""
    if spec.workspace_within is None:
        return {}
    fd = os.open(spec.workspace_within, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in Path(spec.workspace).relative_to(spec.workspace_within).parts:
            child = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = child
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return {view.WORKSPACE: (found.st_dev, found.st_ino)}
