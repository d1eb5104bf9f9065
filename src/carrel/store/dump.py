"""Rows as lines of JSON, out of a database and into another; either engine's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any, BinaryIO

import sqlalchemy as sa

from carrel.errors import DatabaseNotEmpty, MigrationRequired
from carrel.model import SandboxStatus
from carrel.store import schema, tables

__all__ = ["lines_of", "load", "rows_of", "settle", "table_names", "write_dump"]

_BATCH = 500
# What connections of one database have committed means nothing to another.
_TABLES = [table for table in tables.metadata.sorted_tables if table is not tables.commits]


def table_names() -> list[str]:
    """Every table, those first that others refer to."""
    return [table.name for table in _TABLES]


def _lines(connection: sa.Connection, name: str) -> Iterator[bytes]:
    """A table's rows in the order of their keys, as lines of JSON."""
    table = tables.metadata.tables[name]
    query = sa.select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_BATCH)
    for row in connection.execute(query).mappings():
        yield json.dumps(dict(row), default=_plain, separators=(",", ":")).encode() + b"\n"


def write_dump(connection: sa.Connection, open_table: Callable[[str], BinaryIO]) -> str:
    """Write every table to a file of its own. Answers the revision of the schema.

    Args:
        connection: a transaction that sees one moment from its first statement to its last.
        open_table: a file for the table with a name; it is closed here.

    Raises:
        MigrationRequired: the schema is of another release.
    """
    revision = schema.revision_of(connection)
    if revision != schema.HEAD:
        raise MigrationRequired(
            "The database has the schema of another release; run `carrel migrate` first, or that release's command.",
            operator_detail=f"revision {revision}",
        )
    for name in table_names():
        with open_table(name) as file:
            file.writelines(_lines(connection, name))
    return revision


def rows_of(connection: sa.Connection, name: str) -> Iterator[dict[str, Any]]:
    """A table's rows, as `load` takes them."""
    table = tables.metadata.tables[name]
    query = sa.select(table).execution_options(yield_per=_BATCH)
    for row in connection.execute(query).mappings():
        yield dict(row)


def lines_of(name: str, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The rows that lines of a dump tell of."""
    moments = [column.name for column in tables.metadata.tables[name].columns if isinstance(column.type, tables.Moment)]
    for line in lines:
        row: dict[str, Any] = json.loads(line)
        for moment in moments:
            if row.get(moment) is not None:
                row[moment] = datetime.fromisoformat(row[moment])
        yield row


def load(connection: sa.Connection, revision: str, rows: Callable[[str], Iterable[dict[str, Any]]]) -> None:
    """Fill an empty database with the rows of one whose schema had this revision, and settle them.

    Args:
        connection: the database, in a transaction.
        revision: of the schema that the rows are from.
        rows: the rows of the table with a name.

    Raises:
        DatabaseNotEmpty: it has rows already.
        MigrationRequired: the rows are from a newer release.
    """
    if schema.revision_of(connection) is not None:
        _must_be_empty(connection)
    else:
        schema.make_at(connection, revision)
    here = sa.inspect(connection)
    for table in _TABLES:
        if not here.has_table(table.name):  # it came after that revision
            continue
        connection.execute(table.delete())
        found = iter(rows(table.name))
        while batch := list(islice(found, _BATCH)):
            connection.execute(table.insert(), batch)
    settle(connection)


def settle(connection: sa.Connection) -> None:
    """Bring restored rows up to date. No sandbox comes with them: where they lived is elsewhere, or they live there yet.

    Raises:
        MigrationRequired: the rows are from a newer release.
    """
    schema.bring_up_to_date(connection)
    connection.execute(
        tables.sandboxes.update()
        .where(tables.sandboxes.c.status != SandboxStatus.GONE)
        .values(status=SandboxStatus.GONE, ended_at=datetime.now(UTC))
    )


def _must_be_empty(connection: sa.Connection) -> None:
    for table in _TABLES:
        if table.name == "counters":
            continue
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            raise DatabaseNotEmpty(operator_detail=table.name)


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(type(value).__name__)
