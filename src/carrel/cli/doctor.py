"""`carrel doctor`: whether this machine has what Carrel needs, and what to do where it has not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from carrel.cli.context import context_of
from carrel.cli.output import one_line, print_json
from carrel.model import Isolation

if TYPE_CHECKING:
    from carrel.cli.facts import Facts

__all__ = ["Level", "Line", "check", "doctor"]

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 500 * 2**20
COMFORTABLE_FREE_BYTES = 5 * 2**30


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Line:
    """What one check found, and what to do about it."""

    level: Level
    name: str
    found: str
    remedy: str = ""


def doctor(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this machine. The exit code is 1 if something fails."""
    from carrel.cli.facts import gather

    lines = check(gather(context_of(context), config))
    if as_json:
        print_json([asdict(line) for line in lines])
    else:
        _print(lines)
    if any(line.level is Level.FAIL for line in lines):
        raise typer.Exit(1)


def _print(lines: list[Line]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
    for line in lines:
        console.print(
            Text(f"{line.level:<4}  ", style=colours[line.level]) + Text(f"{line.name}: {one_line(line.found)}"),
            soft_wrap=True,
        )
        if line.remedy:
            console.print(Text(f"      {one_line(line.remedy)}", style="dim"), soft_wrap=True)


def check(facts: Facts) -> list[Line]:
    """Judge the facts."""
    return [judge(facts) for judge in _CHECKS]


def _python(facts: Facts) -> Line:
    found = ".".join(map(str, facts.python))
    if facts.python[:2] < OLDEST_PYTHON:
        return Line(Level.FAIL, "Python", found, "Carrel needs Python 3.11 or later.")
    return Line(Level.OK, "Python", found)


def _cli(facts: Facts) -> Line:
    name = "Claude Code"
    if facts.cli_path is None:
        return Line(Level.FAIL, name, "not there", "Install claude-agent-sdk anew (it brings it), or set cli_path.")
    if facts.cli_error is not None:
        remedy = "Look at the line on the processor, or install claude-agent-sdk anew, or set cli_path."
        return Line(Level.FAIL, name, f"{facts.cli_path} does not run: {facts.cli_error}", remedy)
    return Line(Level.OK, name, f"{facts.cli_version} at {facts.cli_path}")


def _processor(facts: Facts) -> Line:
    if facts.cpu_flags is None:
        return Line(Level.OK, "processor", "not an x86, or it does not tell what it can")
    if "avx" not in facts.cpu_flags:
        remedy = "Claude Code ends with SIGILL without it. In a virtual machine choose the host's own processor type."
        return Line(Level.FAIL, "processor", "has no AVX", remedy)
    return Line(Level.OK, "processor", "has AVX")


def _engine(facts: Facts) -> Line:
    name = "Docker engine"
    if "docker" not in facts.runtimes:
        return Line(Level.OK, name, "not used: sandboxes are processes")
    if facts.engine is None:
        remedy = "Start it, let this user reach its socket, or name another by docker.host (CARREL_DOCKER__HOST)."
        return Line(Level.FAIL, name, facts.engine_error or "does not answer", remedy)
    if not facts.image_there:
        remedy = "Build it with scripts/build-images, or name another by docker.image (CARREL_DOCKER__IMAGE)."
        return Line(Level.FAIL, name, f"{facts.engine} has no image {facts.image}", remedy)
    return Line(Level.OK, name, f"{facts.engine}, with {facts.image}")


def _bubblewrap(facts: Facts) -> Line:
    if "local" not in facts.runtimes:
        return Line(Level.OK, "bubblewrap", "not used: sandboxes are containers")
    if facts.isolation in (Isolation.CONTAINER, Isolation.NONE):
        return Line(Level.WARN, "bubblewrap", f"not used: isolation is {facts.isolation}", "Sessions see each other.")
    if facts.bubblewrap_error is not None:
        found = "not there" if facts.bubblewrap is None else "does not work"
        return Line(Level.FAIL, "bubblewrap", found, facts.bubblewrap_error)
    return Line(Level.OK, "bubblewrap", f"works ({facts.bubblewrap})")


def _user_namespaces(facts: Facts) -> Line:
    name = "user namespaces"
    if "local" not in facts.runtimes:
        return Line(Level.OK, name, "not used: sandboxes are containers")
    if facts.user_namespaces_error is None:
        return Line(Level.OK, name, "allowed")
    if facts.bubblewrap_error is None:
        return Line(Level.OK, name, "restricted, but bubblewrap works")
    return Line(Level.WARN, name, "restricted", facts.user_namespaces_error)


def _data(facts: Facts) -> Line:
    if facts.data_error is not None:
        remedy = "Choose another folder with --data or CARREL_DATA."
        return Line(Level.FAIL, "data folder", f"{facts.data}: {facts.data_error}", remedy)
    return Line(Level.OK, "data folder", str(facts.data))


def _disk(facts: Facts) -> Line:
    found = f"{facts.free_bytes / 2**30:.1f} GiB free"
    remedy = "Make room, or choose another folder with --data."
    if facts.free_bytes < LEAST_FREE_BYTES:
        return Line(Level.FAIL, "disk", found, remedy)
    if facts.free_bytes < COMFORTABLE_FREE_BYTES:
        return Line(Level.WARN, "disk", found, remedy)
    return Line(Level.OK, "disk", found)


def _port(facts: Facts) -> Line:
    found = f"{facts.host}:{facts.port}"
    if facts.port_error is None:
        return Line(Level.OK, "port", f"{found} is free")
    if facts.server is not None and facts.server_error is None and facts.server.endswith(f":{facts.port}"):
        return Line(Level.OK, "port", f"{found} is this data folder's server")
    return Line(Level.FAIL, "port", f"{found}: {facts.port_error}", "Choose another with --port or CARREL_PORT.")


def _credential(facts: Facts) -> Line:
    if facts.model_upstream != "anthropic":
        return Line(Level.OK, "credential", f"the model is {facts.model_upstream}; {facts.credential or 'none is set'}")
    if facts.credential is None:
        remedy = "Set ANTHROPIC_API_KEY, ANTHROPIC_AUTH_TOKEN or CLAUDE_CODE_OAUTH_TOKEN for the server, \
or try it without: `carrel serve --model-upstream scripted`."
        return Line(Level.WARN, "credential", "none is set; the server starts, but no turn can run", remedy)
    return Line(Level.OK, "credential", facts.credential)


def _server(facts: Facts) -> Line:
    if facts.server is None:
        return Line(Level.OK, "server", "none runs on this data folder; `carrel serve` starts one")
    if facts.server_error is not None:
        remedy = "If it was killed, start it again with `carrel serve`; it takes up where it was."
        return Line(Level.FAIL, "server", f"{facts.server}: {facts.server_error}", remedy)
    return Line(Level.OK, "server", f"{facts.server} answers")


_CHECKS: tuple[Callable[[Facts], Line], ...] = (
    _python,
    _cli,
    _processor,
    _engine,
    _bubblewrap,
    _user_namespaces,
    _data,
    _disk,
    _port,
    _credential,
    _server,
)
