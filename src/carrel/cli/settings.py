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
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="As `carrel serve` would be told.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    as_example: Annotated[bool, typer.Option("--example", help="A config.yaml with all defaults, explained.")] = False,
    as_docs: Annotated[bool, typer.Option("--docs", help="The page docs/settings.md.")] = False,
) -> None:
    """Show every setting, as the server would read it now."""
    if as_example or as_docs:
        from carrel.settings import pages

        sys.stdout.write(pages.example() if as_example else pages.documentation())
        return
    lines = describe(config, {"data": context_of(context).data}, assignments or ())
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    for line in lines:
        value = one_line(line.value) or "(not set)"
        sys.stdout.write(f"{line.name} = {value}    [{line.source}]\n    {one_line(line.description)}\n")
