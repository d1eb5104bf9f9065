"""What `carrel doctor` judges: facts about this machine, gathered without changing it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from carrel.cli.context import Context, running_server
from carrel.client import Carrel
from carrel.errors import CarrelError, IsolationUnavailable, OperatorError
from carrel.model import Isolation
from carrel.settings import Settings

__all__ = ["Facts", "cpu_flags", "gather", "namespaces_error"]

_CLI_SECONDS = 60
_SERVER_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known of this machine. `…_error` says why something does not work; None: it does."""

    python: tuple[int, int, int]
    cli_path: str | None
    cli_version: str | None
    cli_error: str | None
    cpu_flags: frozenset[str] | None
    """None where the processor does not tell, or is not an x86."""
    isolation: Isolation | None
    runtimes: tuple[str, ...]
    engine: str | None
    """Which Docker engine answers; None where none does, or none is wanted."""
    engine_error: str | None
    image: str
    image_there: bool
    bubblewrap: str | None
    bubblewrap_error: str | None
    user_namespaces_error: str | None
    data: Path
    data_error: str | None
    free_bytes: int
    host: str
    port: int
    port_error: str | None
    model_upstream: str
    credential: str | None
    """The name of what is set."""
    server: str | None
    server_error: str | None


def gather(context: Context, config: Path | None = None) -> Facts:
    """Look at everything."""
    settings = context.settings(config)
    cli = _cli_path(settings)
    version, cli_error = _cli_version(cli) if cli is not None else (None, None)
    data_error, free = _folder(settings.data)
    server = context.url or running_server(settings.data)
    runtimes = tuple(dict.fromkeys([settings.runtime, *settings.runtimes]))
    engine, engine_error, image_there = asyncio.run(_engine(settings)) if "docker" in runtimes else (None, None, False)
    return Facts(
        python=sys.version_info[:3],
        cli_path=cli,
        cli_version=version,
        cli_error=cli_error,
        cpu_flags=cpu_flags(_read("/proc/cpuinfo")),
        isolation=settings.isolation,
        runtimes=runtimes,
        engine=engine,
        engine_error=engine_error,
        image=settings.docker.image,
        image_there=image_there,
        bubblewrap=shutil.which("bwrap"),
        bubblewrap_error=_bubblewrap_error(),
        user_namespaces_error=namespaces_error(lambda name: _read(f"/proc/sys/{name}")),
        data=settings.data,
        data_error=data_error,
        free_bytes=free,
        host=settings.host,
        port=settings.port,
        port_error=_port_error(settings.host, settings.port),
        model_upstream=settings.model_upstream,
        credential=_credential(settings),
        server=server,
        server_error=None if server is None else _server_error(server),
    )


def cpu_flags(cpuinfo: str) -> frozenset[str] | None:
    """The flags of the first processor, as /proc/cpuinfo tells them."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return None


def namespaces_error(sysctl: Callable[[str], str]) -> str | None:
    """Why an unprivileged process could not make a user namespace; None where nothing is in its way."""
    if sysctl("user/max_user_namespaces").strip() == "0":
        return "Set sysctl user.max_user_namespaces to 10000 or more."
    if sysctl("kernel/unprivileged_userns_clone").strip() == "0":
        return "Set sysctl kernel.unprivileged_userns_clone to 1."
    if sysctl("kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        return "Set sysctl kernel.apparmor_restrict_unprivileged_userns to 0, or give bwrap an AppArmor profile."
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # a kernel that has no such file says nothing
        return ""


def _cli_path(settings: Settings) -> str | None:
    from carrel.cli.runtimes import bundled_cli

    try:
        path = settings.cli_path or bundled_cli()
    except OperatorError:
        return None
    return str(path) if path.is_file() else None


def _cli_version(path: str) -> tuple[str | None, str | None]:
    with tempfile.TemporaryDirectory(prefix="carrel-doctor-") as home:
        environment = {"HOME": home, "PATH": os.defpath, "DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1"}
        try:
            ran = subprocess.run(
                [path, "--version"],
                env=environment,
                cwd=home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CLI_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, str(error)
    if ran.returncode != 0:
        return None, f"exit code {ran.returncode} {ran.stderr.strip()[:200]}"
    return ran.stdout.strip(), None


async def _engine(settings: Settings) -> tuple[str | None, str | None, bool]:
    """Which engine answers, why none does, and whether the image of sandboxes is there."""
    from carrel.cli.runtimes import engine_tls
    from carrel.runtimes.docker.engine import Engine, Refusal

    host = settings.docker.host
    engine = Engine(host, wait_seconds=0.0, tls=engine_tls(settings))
    try:
        async with AsyncExitStack() as stack:
            await engine.start(stack)
            await engine.wait()
            version = (await engine.info()).get("ServerVersion")
            return f"{version} at {host}", None, await engine.has_image(settings.docker.image)
    except (CarrelError, Refusal) as error:
        return None, f"{host}: {getattr(error, 'operator_detail', None) or error}", False


def _bubblewrap_error() -> str | None:
    from carrel.runtimes.local import isolation

    try:
        isolation.choose(None)
    except IsolationUnavailable as error:
        return error.message
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def _folder(data: Path) -> tuple[str | None, int]:
    there = next(folder for folder in (data, *data.parents) if folder.exists())
    error: str | None = None
    if not there.is_dir():
        error = f"{there} is not a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        error = f"{there} cannot be written to"
    return error, shutil.disk_usage(there).free


def _port_error(host: str, port: int) -> str | None:
    if port == 0:
        return None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return None


def _credential(settings: Settings) -> str | None:
    names = ("anthropic_api_key", "anthropic_auth_token", "claude_code_oauth_token")
    return next((name.upper() for name in names if getattr(settings, name) is not None), None)


def _server_error(url: str) -> str | None:
    try:
        with Carrel(url, timeout_seconds=_SERVER_SECONDS) as carrel:
            carrel.health()
    except CarrelError as error:
        return error.message
    return None
