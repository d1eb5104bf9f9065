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
            wanted = sa.select(tables.turns.c.number).where(tables.turns.c.id == up_to_turn).scalar_subquery()
            later = sa.select(tables.turns.c.id).where(
                tables.turns.c.session_id == source, tables.turns.c.number > wanted
            )
            query = query.where(t.c.turn_id.is_(None) | t.c.turn_id.not_in(later))
        rows = self._all(query)
        for row in rows:
            row["session_id"], row["turn_id"] = target, None
            if replace is not None:
                row["line"] = row["line"].replace(*replace)
        if rows:
            self._connection.execute(t.insert(), rows)
