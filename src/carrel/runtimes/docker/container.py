"""The wall of a sandbox that is a container: what the engine is told to make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carrel.model import HostFolder, NetworkPolicy, Resources, SandboxTemplate
from carrel.runtimes import view

__all__ = [
    "LINK_FOLDER",
    "LINK_SOCKET",
    "Bind",
    "Caps",
    "ContainerOptions",
    "config",
    "labels_of",
    "labels_of_sandbox",
    "name_of",
    "sandbox_of",
]

LINK_FOLDER = "/run/carrel-link"
LINK_SOCKET = f"{LINK_FOLDER}/link.sock"
_RUNNER = ["/opt/carrel/bin/python", "-I", "-m", "carrel.runner"]
_INSTALLATION = "carrel.installation"
_SANDBOX = "carrel.sandbox"
_SESSION = "carrel.session"
_MIB = 2**20

_OF_A_VOLUME = re.compile(r"/volumes/[^/]+/_data(/|$)")


@dataclass(frozen=True, kw_only=True)
class Caps:
    """The most that one sandbox may take. None: no cap."""

    memory_bytes: int | None = None
    processes: int | None = None
    cpus: float | None = None

    def under(self, resources: Resources) -> Caps:
        """The same, with what a template says put in their place."""
        memory = self.memory_bytes if resources.memory_mb is None else resources.memory_mb * _MIB
        return Caps(
            memory_bytes=memory,
            processes=resources.processes or self.processes,
            cpus=resources.cpus or self.cpus,
        )


@dataclass(frozen=True, kw_only=True)
class ContainerOptions:
    """What every container is made by, where its template says nothing else."""

    image: str
    platform: str | None = None
    oci_runtime: str | None = None
    mounts: tuple[HostFolder, ...] = ()
    network: NetworkPolicy = field(default_factory=NetworkPolicy)
    caps: Caps = field(default_factory=Caps)
    tmp_bytes: int = 512 * _MIB
    shm_bytes: int = 64 * _MIB
    oom_score_adj: int = 500
    stop_grace_seconds: int = 10


@dataclass(frozen=True)
class Bind:
    """A folder or file of ours that the container is shown."""

    source: Path
    """Where we see it; on the engine's host it may be elsewhere."""
    target: str
    read_only: bool = True


def name_of(sandbox_id: str) -> str:
    """What the container of a sandbox is called; so it can be found before it is known whether it was made."""
    return f"carrel-{sandbox_id}"


def labels_of(installation: str) -> list[str]:
    """By which our own containers are found, as a filter."""
    return [f"{_INSTALLATION}={installation}"]


def labels_of_sandbox(sandbox_id: str) -> list[str]:
    """By which the container of one sandbox is found."""
    return [f"{_SANDBOX}={sandbox_id}"]


def sandbox_of(labels: Mapping[str, str]) -> str | None:
    """Whose container it is, by its labels."""
    return labels.get(_SANDBOX)


def config(
    *,
    sandbox_id: str,
    session_id: str,
    installation: str,
    user: tuple[int, int],
    template: SandboxTemplate,
    options: ContainerOptions,
    binds: Sequence[tuple[str, Bind]],
) -> dict[str, Any]:
    """What the engine is to make of one sandbox.

    Args:
        sandbox_id: its own.
        session_id: for its labels.
        installation: for its labels.
        user: whom everything in it runs as.
        template: what the sandbox's environment says.
        options: for all that the template leaves open.
        binds: what it is shown of our folders, each with its path on the engine's host.
    """
    caps = options.caps.under(template.resources)
    network = template.network or options.network
    host: dict[str, Any] = {
        "AutoRemove": False,  # why it ended is asked for afterwards
        "RestartPolicy": {"Name": "no"},
        "Init": True,
        "CapDrop": ["ALL"],
        "Privileged": False,
        "SecurityOpt": ["no-new-privileges:true"],
        "ReadonlyRootfs": True,
        "Tmpfs": {
            "/tmp": f"rw,nosuid,nodev,exec,size={options.tmp_bytes},mode=1777",
            "/run": f"rw,nosuid,nodev,noexec,size={16 * _MIB},mode=755",
        },
        "ShmSize": options.shm_bytes,
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "NetworkMode": "bridge" if network.mode == "open" else "none",
        "OomScoreAdj": options.oom_score_adj,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "5m", "max-file": "2"}},
        "Mounts": [_mount(source, bind.target, bind.read_only) for source, bind in binds]
        + [_mount(each.source, each.target, each.read_only) for each in (*options.mounts, *template.mounts)],
    }
    if caps.memory_bytes is not None:
        host |= {"Memory": caps.memory_bytes, "MemorySwap": caps.memory_bytes}
    if caps.processes is not None:
        host["PidsLimit"] = caps.processes
    if caps.cpus is not None:
        host["NanoCpus"] = int(caps.cpus * 1e9)
    if (runtime := template.oci_runtime or options.oci_runtime) is not None:
        host["Runtime"] = runtime
    return {
        "Image": template.image or options.image,
        "User": f"{user[0]}:{user[1]}",
        "Hostname": "carrel",
        "WorkingDir": view.WORKSPACE,
        "Env": [f"{view.MARK}={sandbox_id}"],
        "Labels": {_INSTALLATION: installation, _SANDBOX: sandbox_id, _SESSION: session_id},
        "Entrypoint": _RUNNER,
        "Cmd": [],
        "Healthcheck": {"Test": ["NONE"]},
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": False,
        "AttachStderr": False,
        "Tty": False,
        "StopTimeout": options.stop_grace_seconds,
        "HostConfig": host,
    }


def _mount(source: str, target: str, read_only: bool) -> dict[str, Any]:
    # Never made where it is missing: a wrong path is to be an error, not an empty folder of root's.
    mount: dict[str, Any] = {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}
    if _OF_A_VOLUME.search(source):
        # It lies in the engine's own folder, of which engines bind nothing in any other way; elsewhere few hosts allow it.
        mount["BindOptions"] = {"Propagation": "rslave"}
    return mount
