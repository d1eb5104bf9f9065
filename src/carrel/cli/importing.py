"""`carrel import`: bring in what another service has kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from carrel.cli.context import context_of

__all__ = ["app"]

app = typer.Typer(name="import", help="Bring in what another service has kept.", no_args_is_help=True)


@app.callback()
def _importing() -> None:
    """Bring in what another service has kept."""


@app.command("claude-agent-http")
def claude_agent_http_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Its SQLite file, or the URL of its PostgreSQL database.")],
    base_dir: Annotated[
        Path | None, typer.Option(help="The folder of users' directories. (default: users.base_dir of the settings)")
    ] = None,
    claude_dir: Annotated[Path, typer.Option(help="Where its Claude Code kept transcripts.")] = Path("~/.claude"),
    config: Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Bring in the sessions of a claude-agent-http, with their conversations, under the ids their clients know.

    Run it while no server runs on the data folder. What is here already is left alone, so it may be run again.
    """
    from carrel.cli.foreign_sessions import Importer  # half of the server; no other command has to wait for it

    importer = Importer(context_of(context).settings(config), base_dir, claude_dir.expanduser())
    asyncio.run(importer.run(source, dry_run=dry_run))
