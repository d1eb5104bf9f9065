"""The agent's own transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence

import sqlalchemy as sa

from carrel import abc
from carrel.store import tables
from carrel.store.rows.base import READ_BATCH, Rows, batches


def _uuid_of(line: str) -> str | None:
    try:
        value = json.loads(line).get("uuid")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) and value else None


class SqlTranscripts(Rows, abc.TranscriptRows):
    """The agent's own transcripts."""

    def append(self, session_id: str, *, subpath: str, turn_id: str | None, lines: Sequence[str]) -> None:
        """Store lines in order; one whose uuid is known already is left out."""
        t = tables.transcript_entries
        here = (t.c.session_id == session_id) & (t.c.subpath == subpath)
        uuids = {uuid for line in lines if (uuid := _uuid_of(line))}
        known: set[str | None] = set()
        for batch in batches(sorted(uuids), READ_BATCH):
            known.update((self._connection.execute(sa.select(t.c.uuid).where(here, t.c.uuid.in_(batch)))).scalars())
        n = int((self._connection.execute(sa.select(sa.func.max(t.c.n)).where(here))).scalar() or 0)
        rows = []
        for line in lines:
            uuid = _uuid_of(line)
            if uuid in known and uuid is not None:
                continue
            known.add(uuid)
            n += 1
            rows.append(
                {"session_id": session_id, "subpath": subpath, "n": n, "uuid": uuid, "turn_id": turn_id, "line": line}
            )
        if rows:
            self._connection.execute(t.insert(), rows)

    def subpaths(self, session_id: str) -> Sequence[str]:
        """The main transcript (empty) and the sub-agents' ones."""
        t = tables.transcript_entries.c
        query = sa.select(t.subpath).where(t.session_id == session_id).distinct().order_by(t.subpath)
        return list(self._connection.execute(query).scalars())

    def page(self, session_id: str, subpath: str, *, after: int, limit: int) -> list[tuple[int, str]]:
        """Lines after a position, in order, each with its position."""
        t = tables.transcript_entries.c
        query = sa.select(t.n, t.line).where(t.session_id == session_id, t.subpath == subpath, t.n > after)
        return [(row.n, row.line) for row in self._connection.execute(query.order_by(t.n).limit(limit))]

    def copy(self, source: str, target: str, *, up_to_turn: str | None, replace: tuple[str, str] | None) -> None:
        """Copy a session's transcripts to another, to the end of a turn, with one id in them put for another."""
        t = tables.transcript_entries
        query = sa.select(t).where(t.c.session_id == source).order_by(t.c.subpath, t.c.n)
        if up_to_turn is not None:
            query = query.where(t.c.turn_id.is_(None) | t.c.turn_id.not_in(_later_than(source, up_to_turn)))
        rows = self._all(query)
        for row in rows:
            row["session_id"], row["turn_id"] = target, None
            if replace is not None:
                row["line"] = row["line"].replace(*replace)
        if rows:
            self._connection.execute(t.insert(), rows)

    def rewind(self, session_id: str, *, to_turn: str, replace: tuple[str, str] | None) -> None:
        """Forget what came after a turn, and put one id in the rest for another."""
        t = tables.transcript_entries
        here = t.c.session_id == session_id
        self._connection.execute(t.delete().where(here, t.c.turn_id.in_(_later_than(session_id, to_turn))))
        if replace is not None:
            self._connection.execute(t.update().where(here).values(line=sa.func.replace(t.c.line, *replace)))


def _later_than(session_id: str, turn_id: str) -> sa.Select[tuple[str]]:
    """The ids of the session's turns after this one."""
    turns = tables.turns.c
    number = sa.select(turns.number).where(turns.id == turn_id).scalar_subquery()
    return sa.select(turns.id).where(turns.session_id == session_id, turns.number > number)
