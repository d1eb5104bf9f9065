"""Turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.errors import TurnNotFound
from carrel.model import Turn, TurnStatus
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, cursor_of, number_of, plain, update_of

_TURN_COLUMNS = [tables.turns.c[name] for name in Turn.model_fields]
_THIS_TURN = tables.turns.c.id == sa.bindparam("this")
_GET_TURN = sa.select(*_TURN_COLUMNS).where(_THIS_TURN)
_ADD_TURN = tables.turns.insert()
_OF_THIS_SESSION = tables.turns.c.session_id == sa.bindparam("session")
_QUEUED = (
    sa.select(*_TURN_COLUMNS)
    .where(_OF_THIS_SESSION, tables.turns.c.status == TurnStatus.QUEUED)
    .order_by(tables.turns.c.number)
)
_LIVE = (
    sa.select(*_TURN_COLUMNS)
    .where(_OF_THIS_SESSION, tables.turns.c.status.in_((TurnStatus.RUNNING, TurnStatus.WAITING)))
    .order_by(tables.turns.c.number)
    .limit(1)
)
_NEWEST_TURN = sa.select(sa.func.max(tables.turns.c.number)).where(_OF_THIS_SESSION)


class SqlTurns(Rows, abc.TurnRows):
    """Turns."""

    def add(self, turn: Turn) -> None:
        """Store a new turn."""
        self._connection.execute(_ADD_TURN, columns(turn))

    def get(self, turn_id: str) -> Turn | None:
        """The turn, or None."""
        row = self._one(_GET_TURN, this=turn_id)
        return Turn.model_validate(row) if row else None

    def update(self, turn_id: str, **changes: Any) -> Turn:
        """Change columns. Raises TurnNotFound."""
        values = {name: plain(value) for name, value in changes.items()}
        row = self._one(_update_turn(frozenset(values)), this=turn_id, **values)
        if row is None:
            raise TurnNotFound
        return Turn.model_validate(row)

    def page(self, session_id: str, *, cursor: str | None, limit: int) -> abc.Page[Turn]:
        """Newest first. Raises InvalidCursor."""
        number = tables.turns.c.number
        query = sa.select(*_TURN_COLUMNS).where(tables.turns.c.session_id == session_id)
        query = query.order_by(number.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(number < number_of(cursor))
        found = [Turn.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], cursor_of(found[limit - 1].number) if more else None)

    def queued(self, session_id: str) -> Sequence[Turn]:
        """The turns that wait, in order."""
        return [Turn.model_validate(row) for row in self._all(_QUEUED, session=session_id)]

    def live(self, session_id: str) -> Turn | None:
        """The one turn that runs or waits for a person, or None."""
        row = self._one(_LIVE, session=session_id)
        return Turn.model_validate(row) if row else None

    def next_number(self, session_id: str) -> int:
        """The number of the session's next turn."""
        return int(self._connection.execute(_NEWEST_TURN, {"session": session_id}).scalar() or 0) + 1


@cache
def _update_turn(names: frozenset[str]) -> sa.Executable:
    return update_of(tables.turns, names).where(_THIS_TURN).returning(*_TURN_COLUMNS)
