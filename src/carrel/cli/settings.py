"""`carrel settings`: every setting, its value, where that comes from, what it means."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from carrel.cli.context import context_of
from carrel.cli.output import one_line, print_json
from carrel.settings import describe

__all__ = ["settings"]


def settings(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show every setting, as the server would read it now."""
    lines = describe(config, {"data": context_of(context).data})
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    for line in lines:
        value = one_line(line.value) or "(not set)"
        sys.stdout.write(f"{line.name} = {value}    [{line.source}]\n    {one_line(line.description)}\n")
