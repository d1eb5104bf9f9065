"""The wall around an agent on this host: how its command line is wrapped, and what it sees."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from carrel.errors import IsolationUnavailable
from carrel.model import GATEWAY_ONLY, Isolation, NetworkPolicy
from carrel.protocol.bootstrap import EGRESS_SOCKET, GATEWAY_PORT, Mount, Road
from carrel.runtimes.local import seccomp
from carrel.runtimes.view import GATEWAY_SOCKET, HOME, PLUGINS, WORKSPACE, environment

_PROGRAM = "/opt/carrel/claude"
_SHOWN_IN_ETC = (
    "alternatives",
    "ca-certificates",
    "debian_version",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "magic",
    "mime.types",
    "os-release",
    "pki/ca-trust",
    "pki/tls/certs",
    "ssl/certs",
    "ssl/openssl.cnf",
    "timezone",
)
_SHOWN_WITH_NETWORK = ("hosts", "nsswitch.conf", "resolv.conf", "services", "gai.conf")
_WORKSPACE_FD = 9
_ROOTS = ("/mnt", "/media", "/srv", "/opt")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The host's side of one sandbox."""

    folder: Path
    workspace: Path
    workspace_within: Path | None = None
    """The last folder above the workspace that no agent can change."""
    home: Path
    gateway_folder: Path
    cli: Path
    owner: tuple[int, int] | None
    plugins: tuple[Path, ...] = ()
    memory_bytes: int | None = None
    """The most that files may take which are kept in memory; None: half of the host's memory each."""


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """How the runner starts the agent."""

    cli_path: str
    cwd: str
    config_dir: str
    env: dict[str, str]
    late_env_path: str | None
    mounts: list[Mount]
    mount_root: str | None
    plugins: list[str]
    """Where the agent sees them."""
    egress: Road | None = None
    mcp: Road | None = None


def choose(asked: Isolation | None) -> Isolation:
    """The isolation to use: what was asked for, or bubblewrap.

    Raises:
        IsolationUnavailable: bubblewrap is wanted and does not work here; the message says what can be done.
    """
    chosen = asked or Isolation.BUBBLEWRAP
    if chosen is not Isolation.BUBBLEWRAP:
        return chosen
    # The shortest program that goes through everything an agent will.
    command = [*_drop(_probe_user()), *_bwrap(GATEWAY_ONLY), "--ro-bind", "/", "/", "true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if result.returncode != 0:
        raise IsolationUnavailable(
            "bubblewrap does not work here. Allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "or kernel.apparmor_restrict_unprivileged_userns=0), or choose --isolation container inside a container "
            "that isolates by itself, or --isolation none.",
            operator_detail=result.stderr.strip(),
        )
    return chosen


def _probe_user() -> tuple[int, int] | None:
    return (65534, 65534) if os.geteuid() == 0 else None


def wrap(
    isolation: Isolation,
    network: NetworkPolicy,
    place: Place,
    *,
    read_only: list[str],
    sandbox_id: str,
    mcp: bool = False,
) -> Wrapped:
    """Prepare the wall of one sandbox; writes what it needs into the sandbox's folder."""
    env = environment(sandbox_id)
    # On a loopback that is the host's as well, others may have taken any port.
    shared = Road(socket=str(place.gateway_folder / "gateway.sock"), port=0) if mcp else None
    if isolation is not Isolation.BUBBLEWRAP:
        env |= {"HOME": str(place.home), "ANTHROPIC_UNIX_SOCKET": str(place.gateway_folder / "gateway.sock")}
        return Wrapped(
            cli_path=str(place.cli),
            cwd=str(place.workspace),
            config_dir=str(place.home / ".claude"),
            env=env,
            late_env_path=None,
            mounts=[],
            mount_root=None,
            plugins=[str(path) for path in place.plugins],
            mcp=shared,
        )
    env |= {"HOME": HOME, "ANTHROPIC_UNIX_SOCKET": GATEWAY_SOCKET, "TMPDIR": "/tmp"}
    shown = {"workspace": place.workspace, "home": place.home, "gateway": place.gateway_folder, "claude": place.cli}
    plugins = {f"plugin-{number}": path for number, path in enumerate(place.plugins, start=1)}
    shown |= plugins
    uid, gid = place.owner or (os.geteuid(), os.getegid())
    passwd = place.folder / "etc"
    passwd.mkdir(mode=0o755, exist_ok=True)
    (passwd / "passwd").write_text(f"agent:x:{uid}:{gid}:agent:{HOME}:/bin/bash\n")
    (passwd / "group").write_text(f"agent:x:{gid}:\n")
    shown["etc"] = passwd
    root: str | None = None
    mounts: list[Mount] = []
    if place.owner is not None:
        root = _root_outside([*shown.values(), place.folder, *(Path(extra) for extra in read_only)])
        within = {"workspace": str(place.workspace_within)} if place.workspace_within is not None else {}
        mounts = [
            Mount(source=str(path), target=f"{root}/{name}", within=within.get(name)) for name, path in shown.items()
        ]
        shown = {name: Path(root, name) for name in shown}
    opened: list[str] = []
    program = [_PROGRAM]
    if place.owner is None and place.workspace_within is not None:
        opened, program = _opened_workspace(place.workspace, place.workspace_within)
        shown["workspace"] = Path(f"/proc/self/fd/{_WORKSPACE_FD}")
    # What the session's creator sets must reach the agent and never the programs that build its wall: they run
    # outside of it, as root where Carrel is, and obey variables of their own. So bubblewrap sets it, at the end: the
    # runner adds it to the arguments. These are in a file, because everyone can read a process's arguments.
    bwrap, *flags = [*_bwrap(network), *_sized(_view(shown, network, read_only), place.memory_bytes)]
    arguments = place.folder / "arguments"
    arguments.write_bytes(b"".join(os.fsencode(flag) + b"\0" for flag in flags))
    arguments.chmod(0o600)
    files = {"--args": arguments}
    if filter_ := seccomp.program():
        files["--seccomp"] = place.folder / "seccomp"
        files["--seccomp"].write_bytes(filter_)
    command = [*_drop(place.owner), bwrap]
    redirections = []
    for fd, (flag, path) in enumerate(files.items(), start=3):
        command += [flag, str(fd)]
        redirections.append(f"{fd}<{shlex.quote(str(path))}")
    egress, road = None, shared
    if network.mode == "allow" or (mcp and network.mode != "open"):
        # It stops when its network is made, says who it is, and goes on when the runner has put ports into it.
        entrance = str(place.folder)
        if network.mode == "allow":
            egress = Road(socket=str(place.gateway_folder / EGRESS_SOCKET), entrance=entrance)
        if shared is not None:
            road = Road(socket=shared.socket, port=GATEWAY_PORT, entrance=entrance)
        pipes = (("--info-fd", "wall", ">"), ("--block-fd", "go", "<"))
        for fd, (flag, name, way) in enumerate(pipes, start=3 + len(files)):
            os.mkfifo(place.folder / name, 0o600)
            command += [flag, str(fd)]
            redirections.append(f"{fd}{way}{shlex.quote(str(place.folder / name))}")
    wrapper = place.folder / "claude"
    run = f'exec {shlex.join([*command, "--", *program])} "$@" {" ".join(redirections)}'
    wrapper.write_text("\n".join(["#!/bin/sh", *opened, run, ""]))
    wrapper.chmod(0o700)
    return Wrapped(
        cli_path=str(wrapper),
        cwd=WORKSPACE,
        config_dir=f"{HOME}/.claude",
        env=env,
        late_env_path=str(arguments),
        mounts=mounts,
        mount_root=root,
        plugins=[f"{PLUGINS}/{name.removeprefix('plugin-')}" for name in plugins],
        egress=egress,
        mcp=road,
    )


def _opened_workspace(workspace: Path, within: Path) -> tuple[list[str], list[str]]:
    """Lines that open a workspace whose path an agent may change, and the program that closes it again in the wall.

    Should a link stand anywhere below `within`, what was opened has another name than this.
    """
    real = shlex.quote(str(within.resolve() / workspace.relative_to(within)))
    lines = [
        f"exec {_WORKSPACE_FD}<{shlex.quote(str(workspace))} || exit 1",
        f'[ "$(readlink /proc/self/fd/{_WORKSPACE_FD})" = {real} ] || {{ echo "the workspace has moved" >&2; exit 1; }}',
    ]
    # An open directory of the host would be a way out.
    return lines, ["/bin/sh", "-c", f'exec {_WORKSPACE_FD}<&-; exec "$0" "$@"', _PROGRAM]


def _drop(owner: tuple[int, int] | None) -> list[str]:
    """Where Carrel is root, each session's agent is an unprivileged user of its own."""
    if owner is None:
        return []
    user = [f"--reuid={owner[0]}", f"--regid={owner[1]}", "--clear-groups"]
    return [_program("setpriv", "util-linux"), *user, "--no-new-privs"]


def _program(name: str, package: str) -> str:
    """Where the program is: absolute, because whoever runs it has another PATH than we."""
    found = shutil.which(name)
    if found is None:
        raise IsolationUnavailable(
            f"{package} ({name}) is not installed. Install it (Debian: apt-get install {package}), or choose "
            "--isolation container inside a container that isolates by itself, or --isolation none."
        )
    return os.path.abspath(found)


def _bwrap(network: NetworkPolicy) -> list[str]:
    flags = [_program("bwrap", "bubblewrap"), "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    flags += [
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--hostname",
        "carrel",
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
    ]
    if network.mode != "open":
        flags.append("--unshare-net")
    return flags


def _view(shown: dict[str, Path], network: NetworkPolicy, read_only: list[str]) -> list[str]:
    flags = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            flags += ["--symlink", f"usr/{name}", str(path)]
        elif path.is_dir():
            flags += ["--ro-bind", str(path), str(path)]
    for name in _SHOWN_IN_ETC + (_SHOWN_WITH_NETWORK if network.mode == "open" else ()):
        flags += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    flags += ["--ro-bind", str(shown["etc"] / "passwd"), "/etc/passwd"]
    flags += ["--ro-bind", str(shown["etc"] / "group"), "/etc/group"]
    flags += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run"]
    for extra in read_only:
        flags += ["--ro-bind", extra, extra]
    flags += ["--ro-bind", str(shown["gateway"]), str(Path(GATEWAY_SOCKET).parent)]
    flags += ["--ro-bind", str(shown["claude"]), _PROGRAM]
    for name, path in shown.items():
        if name.startswith("plugin-"):
            flags += ["--ro-bind", str(path), f"{PLUGINS}/{name.removeprefix('plugin-')}"]
    flags += ["--bind", str(shown["home"]), HOME, "--bind", str(shown["workspace"]), WORKSPACE, "--chdir", WORKSPACE]
    return [*flags, "--remount-ro", "/"]


def _sized(flags: list[str], most_bytes: int | None) -> list[str]:
    """The same view, in which no filesystem that is kept in memory takes more than this.

    What such files take is no process's, so that where control groups do not count them, nothing else would.
    """
    if most_bytes is None or not _knows_sizes():
        return flags
    size = ["--size", str(most_bytes)]
    found: list[str] = []
    for position, flag in enumerate(flags):
        found += [*size, flag] if flag == "--tmpfs" else [flag]
        if flags[position - 1 : position + 1] == ["--dev", "/dev"]:
            found += ["--perms", "1777", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    return found


@functools.cache
def _knows_sizes() -> bool:
    """Whether this bubblewrap has `--size` (0.7.0 has)."""
    told = subprocess.run([_program("bwrap", "bubblewrap"), "--help"], capture_output=True, text=True, check=False)
    return "--size" in told.stdout + told.stderr


def _root_outside(paths: list[Path]) -> str:
    """A folder everyone may walk through and that hides nothing we need when something is mounted over it."""
    needed = [path.resolve() for path in paths]
    for root in _ROOTS:
        if Path(root).is_dir() and not any(path.is_relative_to(root) for path in needed):
            return root
    raise IsolationUnavailable(f"One of {', '.join(_ROOTS)} must exist and hold nothing of Carrel's.")
