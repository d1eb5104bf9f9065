"""`carrel env`: start and stop environments, and see how they do."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from carrel.cli.context import context_of
from carrel.cli.output import print_json
from carrel.client import EnvironmentStatus

__all__ = ["app"]

app = typer.Typer(help="Start and stop environments, and see how they do.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="ENVIRONMENT", help="The environment's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("status")
def show_status(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show whether it takes prompts, its warm pool, its sessions, and what is wrong with it."""
    with context_of(context).connect() as carrel:
        _show(carrel.environments.status(name), as_json=as_json)


@app.command("start")
def start_environment(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Have it take prompts, and its warm pool be filled."""
    with context_of(context).connect() as carrel:
        _show(carrel.environments.start(name), as_json=as_json)


@app.command("stop")
def stop_environment(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Have it take no more prompts. Those it has taken are answered."""
    with context_of(context).connect() as carrel:
        _show(carrel.environments.stop(name), as_json=as_json)


def _show(status: EnvironmentStatus, *, as_json: bool) -> None:
    if as_json:
        print_json(status)
        return
    lines = {
        "environment": f"{status.name}, version {status.version}",
        "takes prompts": "yes" if status.running else "no, it is stopped",
        "warm": f"{status.warm} of {status.warm_wanted}" + (f", {status.starting} starting" if status.starting else ""),
        "sessions": f"{status.sessions}, {status.live_sessions} with a sandbox",
    }
    for name, value in lines.items():
        print(f"{name + ':':15}{value}")
    for problem in status.problems:
        print(f"{problem.code}: {problem.message}", file=sys.stderr)
