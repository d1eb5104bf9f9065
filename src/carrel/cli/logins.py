"""`carrel env login` and `logout`: a Claude subscription for the sessions of one environment."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from carrel.cli.context import context_of
from carrel.cli.output import clean
from carrel.cli.runtimes import bundled_cli
from carrel.errors import OperatorError
from carrel.model_gateway.logins import Logins, command
from carrel.protocol.environments import ENVIRONMENT_NAME
from carrel.settings import Settings

__all__ = ["login", "logins_of", "logout"]

_SAID = """\
This signs in with a Claude subscription for the sessions of the environment {name}, and of no other.
It is for a single operator: you, on a machine of yours. Whoever may open sessions there uses your subscription;
a service for other people uses an API key. The login stays in {folder}, which no sandbox is shown.
"""

Name = Annotated[str, typer.Argument(metavar="NAME", help="The environment.")]
Data = Annotated[Path | None, typer.Option(help="The data folder. (default: CARREL_DATA or ./carrel-data)")]
Config = Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")]


def logins_of(settings: Settings) -> Logins:
    """The logins of the installation with these settings."""
    return Logins(settings.data / "logins", settings.cli_path or bundled_cli())


def login(
    context: typer.Context,
    name: Name,
    data: Data = None,
    config: Config = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is meant.")] = False,
) -> None:
    """Sign in with a Claude subscription for one environment, on the server's machine. For a single operator."""
    settings, folder = _place(context, name, data, config)
    sys.stdout.write(_SAID.format(name=name, folder=folder))
    if settings.credentials == "direct":
        raise OperatorError("With credentials: direct every agent asks the provider itself, and no login is used.")
    if not yes and not typer.confirm("Go on?"):
        raise typer.Exit(1)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    program = settings.cli_path or bundled_cli()
    ended = subprocess.run(command(program, folder, "auth", "login"), cwd=folder, check=False)
    logins = logins_of(settings)
    if ended.returncode != 0 or not logins.has(name):
        raise OperatorError(
            f"Claude Code has not signed in (it ended with {ended.returncode}), so nothing has changed."
        )
    (folder / ".credentials.json").chmod(0o600)
    sys.stdout.write(f"{clean(name)}  signed in; it holds from the next request of a session on\n")


def logout(context: typer.Context, name: Name, data: Data = None, config: Config = None) -> None:
    """Forget an environment's login."""
    _, folder = _place(context, name, data, config)
    if not folder.is_dir():
        raise OperatorError(f"The environment {name} has no login here.")
    shutil.rmtree(folder)
    sys.stdout.write(f"{clean(name)}  signed out\n")


def _place(context: typer.Context, name: str, data: Path | None, config: Path | None) -> tuple[Settings, Path]:
    if re.fullmatch(ENVIRONMENT_NAME, name) is None:
        raise OperatorError(f"{clean(name)!r} is no name of an environment.")
    given = context_of(context)
    settings = given.settings(config, {"data": data or given.data})
    return settings, logins_of(settings).folder(name)
