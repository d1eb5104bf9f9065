"""`carrel migrate`: bring the database up to date, or only say whether it is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from carrel.cli.context import context_of
from carrel.errors import InvalidSettings, MigrationRequired, OperatorError
from carrel.settings import Settings

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["migrate"]

T = TypeVar("T")


def migrate(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help="The data folder. (default: CARREL_DATA or ./carrel-data)")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")] = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit code 1 where there is work.")] = False,
) -> None:
    """Bring the database's schema up to date. The server does so itself when it starts."""
    from carrel.store import schema  # and with it the databases, for which no other command has to wait

    given = context_of(context)
    settings = given.settings(config, {"data": data or given.data})
    before = _in_database(settings, schema.revision_of)
    if check:
        sys.stdout.write(f"revision {before or 'none'}, this release has {schema.HEAD}\n")
        if before is not None and not schema.knows(before):
            raise MigrationRequired(operator_detail=f"revision {before}")
        raise typer.Exit(0 if before == schema.HEAD else 1)
    _in_database(settings, schema.bring_up_to_date)
    after = _in_database(settings, schema.revision_of)
    sys.stdout.write(f"revision {before or 'none'} before, {after} now\n")


def _in_database(settings: Settings, work: Callable[[sa.Connection], T]) -> T:
    if settings.memory:
        raise InvalidSettings("memory is set: there is no database that could be migrated.")
    import sqlalchemy as sa

    from carrel.cli.storage import postgres_url, sqlite_path

    url = postgres_url(settings)
    if url is not None:
        from carrel.store.postgres import prepare_or_say

        return asyncio.run(prepare_or_say(url, work))
    path = sqlite_path(settings)
    if path is None or not path.is_file():
        raise OperatorError(f"There is no database {path}; `carrel serve` makes one.")
    engine = sa.create_engine(f"sqlite:///{path}")
    try:
        with engine.begin() as connection:
            return work(connection)
    finally:
        engine.dispose()
