"""What every family of rows needs."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.dialects import postgresql, sqlite

from carrel.errors import InvalidCursor

READ_BATCH = 500


def plain(value: Any) -> Any:
    """A column's value for a model's."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def columns(entity: BaseModel) -> dict[str, Any]:
    """A model as the columns of its table."""
    return {name: plain(getattr(entity, name)) for name in type(entity).model_fields}


def cursor_of(number: int) -> str:
    """The cursor of a list that is ordered by a number."""
    return base64.urlsafe_b64encode(b"n%d" % number).decode().rstrip("=")


def number_of(cursor: str) -> int:
    """The number in such a cursor. Raises InvalidCursor."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        if not text.startswith("n") or not text[1:].isdigit():
            raise ValueError(text)
        number = int(text[1:])
    except ValueError as error:
        raise InvalidCursor(operator_detail=repr(cursor)) from error
    if not 0 <= number < 2**63:
        raise InvalidCursor
    return number


def named_cursor_of(name: str) -> str:
    """The cursor of a list that is ordered by a text."""
    return base64.urlsafe_b64encode(b"t" + name.encode()).decode().rstrip("=")


def name_of(cursor: str) -> str:
    """The text in such a cursor. Raises InvalidCursor."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise InvalidCursor(operator_detail=repr(cursor)) from error
    if not text.startswith("t") or "\x00" in text:
        raise InvalidCursor
    return text[1:]


def update_of(table: sa.Table, names: Iterable[str]) -> sa.Update:
    """Changes the named columns; their values are parameters of the same names."""
    return table.update().values({name: sa.bindparam(name) for name in names})


class Rows:
    """Statements that run often are built once: building one costs several times what SQLite needs to run it."""

    def __init__(self, connection: sa.Connection, *, writing: bool = False) -> None:
        self._connection = connection
        self._writing = writing

    def _insert_or_ignore(self, table: sa.Table, values: Mapping[str, Any]) -> bool:
        """Insert a row, unless one with its key is there. Answers whether it was inserted."""
        insert = sqlite.insert if self._connection.dialect.name == "sqlite" else postgresql.insert
        key = list(table.primary_key)
        statement = insert(table).values(**values).on_conflict_do_nothing().returning(*key)
        return self._connection.execute(statement).first() is not None

    def _one(self, statement: sa.Executable, **parameters: Any) -> Mapping[str, Any] | None:
        row = self._connection.execute(statement, parameters).mappings().first()
        return dict(row) if row is not None else None

    def _all(self, statement: sa.Executable, **parameters: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self._connection.execute(statement, parameters).mappings()]


def batches(items: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    """The items in order, so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
