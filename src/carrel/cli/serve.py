"""`carrel serve`: run the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from carrel.cli.context import context_of
from carrel.errors import InvalidSettings
from carrel.model import Isolation

__all__ = ["serve"]


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="The address to listen on. (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port. (default: 8000)")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that holds everything. (default: carrel-data)")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")] = None,
    model_upstream: Annotated[
        str | None, typer.Option(metavar="anthropic|scripted|scripted:FILE|URL", help="Where the model is.")
    ] = None,
    auth: Annotated[
        Literal["key", "none"] | None, typer.Option(help="`none`: no key is wanted; on loopback only.")
    ] = None,
    isolation: Annotated[Isolation | None, typer.Option(help="What stands around agents.")] = None,
    network: Annotated[
        str | None, typer.Option(metavar='gateway-only|open|{"allow": [NAMES]}', help="What agents reach.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="What is logged.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting: limits.max_sessions=20. May be repeated."),
    ] = None,
    dialect: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PORT[,auth=MODE]", help="Speak like an older service on a port; repeatable."),
    ] = None,
    reload: Annotated[bool, typer.Option("--reload", help="Start again when Carrel's code changes.")] = False,
) -> None:
    """Run the server until it is told to end."""
    given = context_of(context)
    said = {
        "host": host,
        "port": port,
        "data": data or given.data,
        "model_upstream": model_upstream,
        "auth": auth,
        "isolation": isolation,
        "network": network,
        "log_level": log_level,
        "dialects": dict(_dialect(text) for text in dialect) if dialect else None,
    }
    if config is not None and not config.is_file():
        raise InvalidSettings(f"There is no file {config}.")
    settings = given.settings(config, said, assignments or ())  # also where it reloads: what is wrong is said at once
    if reload:
        from carrel.cli.reload import supervise

        supervise(_arguments(said, config, assignments or (), dialect or ()))
        return
    from carrel.cli import server  # the whole server; no other command has to wait for it

    server.serve(settings)


def _dialect(text: str) -> tuple[str, dict[str, str]]:
    """`NAME=PORT[,auth=MODE]`, as settings.

    Raises:
        InvalidSettings: it is not written so.
    """
    name, separator, rest = text.partition("=")
    port, *more = rest.split(",")
    said = {"port": port}
    for item in more:
        key, _, value = item.partition("=")
        if key not in ("auth", "host") or not value:
            separator = ""
        said[key] = value
    if not separator or not port.isdigit():
        raise InvalidSettings(
            f"--dialect {text}: write it as NAME=PORT or NAME=PORT,auth=MODE, such as sdk-server=3000,auth=keys."
        )
    return name, said


def _arguments(
    said: Mapping[str, object], config: Path | None, assignments: Sequence[str], dialects: Sequence[str]
) -> list[str]:
    arguments = ["serve"]
    for name, value in {**said, "config": config}.items():
        if value is not None and name != "dialects":
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    for assignment in assignments:
        arguments += ["--set", assignment]
    for text in dialects:
        arguments += ["--dialect", text]
    return arguments
