"""The event log."""

from __future__ import annotations

import json
from collections.abc import Iterable

import sqlalchemy as sa

from carrel import abc
from carrel.errors import SessionNotFound
from carrel.protocol.events import NewEvent, StoredEvent
from carrel.store import tables
from carrel.store.rows.base import Rows

_NUMBER_EVENTS = (
    tables.sessions.update()
    .where(tables.sessions.c.id == sa.bindparam("this"))
    .values(last_seq=tables.sessions.c.last_seq + sa.bindparam("count"))
    .returning(tables.sessions.c.last_seq)
)
_ADD_EVENTS = tables.events.insert()


class SqlEvents(Rows, abc.EventRows):
    """The event log. Remembers what it appended, so that the store can say so after the commit."""

    def __init__(self, connection: sa.Connection) -> None:
        super().__init__(connection)
        self.appended: list[StoredEvent] = []

    def append(self, session_id: str, events: Iterable[NewEvent]) -> list[StoredEvent]:
        """Number and store events. Raises SessionNotFound."""
        new = list(events)
        if not new:
            return []
        last = self._connection.execute(_NUMBER_EVENTS, {"this": session_id, "count": len(new)}).scalar_one_or_none()
        if last is None:
            raise SessionNotFound
        stored = [
            StoredEvent(
                session_id=session_id,
                seq=last - len(new) + i,
                turn_id=event.turn_id,
                type=event.type,
                at=event.at,
                raw_data=json.dumps(event.data, ensure_ascii=False, separators=(",", ":")),
            )
            for i, event in enumerate(new, start=1)
        ]
        rows = [
            {
                "session_id": e.session_id,
                "seq": e.seq,
                "turn_id": e.turn_id,
                "type": e.type,
                "at": e.at,
                "data": e.raw_data,
            }
            for e in stored
        ]
        self._connection.execute(_ADD_EVENTS, rows)
        self.appended.extend(stored)
        return stored

    def page(
        self, session_id: str, *, after: int, limit: int, turn_id: str | None = None, max_bytes: int | None = None
    ) -> list[StoredEvent]:
        """Events with a higher `seq` than `after`, in order; fewer than `limit` when they pass `max_bytes`."""
        e = tables.events.c
        query = sa.select(e.seq, e.turn_id, e.type, e.at, e.data).where(e.session_id == session_id, e.seq > after)
        if turn_id is not None:
            query = query.where(e.turn_id == turn_id)
        found: list[StoredEvent] = []
        size = 0
        for row in self._connection.execute(query.order_by(e.seq).limit(limit)):
            found.append(
                StoredEvent(
                    session_id=session_id, seq=row.seq, turn_id=row.turn_id, type=row.type, at=row.at, raw_data=row.data
                )
            )
            size += len(row.data)
            if max_bytes is not None and size >= max_bytes:
                break
        return found

    def completed(
        self, session_id: str, *, turn_id: str | None = None, upto: int | None = None
    ) -> tuple[str, int] | None:
        """The last turn that has ended, and the number of the event that says so: this turn, or up to that number."""
        e = tables.events.c
        query = sa.select(e.turn_id, e.seq).where(e.session_id == session_id, e.type == "turn.completed")
        if turn_id is not None:
            query = query.where(e.turn_id == turn_id)
        if upto is not None:
            query = query.where(e.seq <= upto)
        row = self._connection.execute(query.order_by(e.seq.desc()).limit(1)).first()
        return (row.turn_id, row.seq) if row is not None else None
