"""Which runtimes this server has, and how they are made out of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import structlog

from carrel import abc
from carrel.cli.data_folder import DataFolder
from carrel.errors import OperatorError
from carrel.runner.tools import SKILLS
from carrel.runtimes.docker import Caps as ContainerCaps
from carrel.runtimes.docker import ContainerOptions, DockerRuntime, DockerRuntimeOptions, EngineTls
from carrel.runtimes.local import Caps, LocalRuntime, LocalRuntimeOptions
from carrel.sessions.runtimes import Runtimes
from carrel.settings import Settings

__all__ = ["bundled_cli", "choose_runtimes", "engine_tls"]

log = structlog.get_logger(__name__)

_MIB = 2**20


async def choose_runtimes(
    settings: Settings, folder: DataFolder, store: abc.Store, direct: Mapping[str, str] | None
) -> Runtimes:
    """The runtime of the settings, those beside it, and those that still have sandboxes of an earlier start."""
    left = {sandbox.runtime for sandbox in await store.read(lambda tx: list(tx.sandboxes.not_gone()))}
    names = dict.fromkeys([settings.runtime, *settings.runtimes])
    for name in sorted(left - set(names)):
        log.warning("runtime.still_needed", runtime=name, why="a sandbox of it was running when the server last ended")
        names[name] = None  # type: ignore[index]
    makers = {"local": _local, "docker": _docker}
    return Runtimes([makers[name](settings, folder, direct) for name in names if name in makers])


def _local(settings: Settings, folder: DataFolder, direct: Mapping[str, str] | None) -> LocalRuntime:
    memory = None if settings.limits.sandbox_memory_mb is None else settings.limits.sandbox_memory_mb * _MIB
    options = LocalRuntimeOptions(
        folder=settings.data / "sandboxes",
        link_socket=folder.link_socket,
        gateway_folder=folder.sandbox_side,
        cli_path=settings.cli_path or bundled_cli(),
        isolation=settings.isolation,
        network=settings.network,
        read_only_paths=tuple(settings.read_only_paths),
        plugins=tuple(Path(plugin.path) for plugin in settings.plugins),
        skills=SKILLS,
        model_env=direct,
        reconnect_window_seconds=settings.reconnect_window_seconds,
        max_frame_bytes=settings.max_frame_bytes,
        outbox_memory_bytes=settings.outbox_memory_bytes,
        outbox_disk_bytes=settings.outbox_disk_bytes,
        disk_reserve_bytes=settings.limits.disk_reserve_mb * _MIB,
        caps=Caps(memory_bytes=memory, processes=settings.limits.sandbox_processes, cpus=settings.limits.sandbox_cpus),
        caps_by=settings.limits.sandbox_caps,
    )
    return LocalRuntime(options)


def _docker(settings: Settings, folder: DataFolder, direct: Mapping[str, str] | None) -> DockerRuntime:
    docker = settings.docker
    memory = None if settings.limits.sandbox_memory_mb is None else settings.limits.sandbox_memory_mb * _MIB
    options = DockerRuntimeOptions(
        installation=folder.installation(),
        folder=settings.data / "containers",
        link_folder=folder.containers_link.parent,
        gateway_folder=folder.sandbox_side,
        containers=ContainerOptions(
            image=docker.image,
            platform=docker.platform,
            oci_runtime=docker.oci_runtime,
            mounts=tuple(docker.mounts),
            network=settings.network,
            caps=ContainerCaps(
                memory_bytes=memory, processes=settings.limits.sandbox_processes, cpus=settings.limits.sandbox_cpus
            ),
            tmp_bytes=docker.tmp_mb * _MIB,
            shm_bytes=docker.shm_mb * _MIB,
            oom_score_adj=docker.oom_score_adj,
            stop_grace_seconds=docker.stop_grace_seconds,
        ),
        host=docker.host,
        wait_seconds=docker.wait_seconds,
        tls=engine_tls(settings),
        data=settings.data,
        data_on_host=docker.data_on_host,
        read_only_paths=tuple(settings.read_only_paths),
        plugins=tuple(Path(plugin.path) for plugin in settings.plugins),
        model_env=direct,
        reconnect_window_seconds=settings.reconnect_window_seconds,
        max_frame_bytes=settings.max_frame_bytes,
        outbox_memory_bytes=settings.outbox_memory_bytes,
        outbox_disk_bytes=settings.outbox_disk_bytes,
        disk_reserve_bytes=settings.limits.disk_reserve_mb * _MIB,
    )
    return DockerRuntime(options)


def engine_tls(settings: Settings) -> EngineTls | None:
    """How the engine is spoken to by TLS; None: it is not."""
    docker = settings.docker
    return None if docker.tls_ca is None else EngineTls(ca=docker.tls_ca, cert=docker.tls_cert, key=docker.tls_key)


def bundled_cli() -> Path:
    """The Claude Code program that comes with the Agent SDK.

    Raises:
        OperatorError: it is not there.
    """
    spec = find_spec("claude_agent_sdk")
    path = Path(spec.origin).parent / "_bundled" / "claude" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise OperatorError("The Claude Code program is missing. Install claude-agent-sdk anew, or set cli_path.")
    return path
