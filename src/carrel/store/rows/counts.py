"""What limits are held against."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from carrel import abc
from carrel.model import SessionStatus, TurnStatus
from carrel.store import tables
from carrel.store.rows.base import Rows

_TAKEN = tables.sessions.c.reserved.is_(None)
"""What waits in a warm pool is nobody's, and counts nowhere."""
_AT_WORK = tables.sessions.c.status.in_((SessionStatus.STARTING, SessionStatus.RUNNING)) | tables.sessions.c.id.in_(
    sa.select(tables.turns.c.session_id).where(tables.turns.c.status == TurnStatus.RUNNING)
)
_BUSY = sa.select(sa.func.count()).select_from(tables.sessions).where(_AT_WORK, ~tables.sessions.c.deleting, _TAKEN)


class SqlCounts(Rows, abc.CountRows):
    """What limits are held against."""

    def sessions(self, owner: str | None = None) -> int:
        """How many sessions there are, of everybody or of one owner; deleted ones do not count."""
        query = sa.select(sa.func.count()).select_from(tables.sessions).where(~tables.sessions.c.deleting, _TAKEN)
        if owner is not None:
            query = query.where(tables.sessions.c.owner == owner)
        return int(self._connection.execute(query).scalar_one())

    def busy(self) -> int:
        """How many sessions have a turn at work, or a sandbox starting for one."""
        return int(self._connection.execute(_BUSY).scalar_one())

    def queued_turns(self) -> int:
        """How many turns wait, in all sessions."""
        query = sa.select(sa.func.count()).where(tables.turns.c.status == TurnStatus.QUEUED)
        return int(self._connection.execute(query.select_from(tables.turns)).scalar_one())

    def waiting_turns(self) -> Sequence[abc.WaitingTurn]:
        """The first queued turn of every session that has none at work and no sandbox starting, oldest first."""
        s, t = tables.sessions.c, tables.turns.c
        first = (
            sa.select(t.session_id, sa.func.min(t.number).label("number"))
            .where(t.status == TurnStatus.QUEUED)
            .group_by(t.session_id)
            .subquery()
        )
        heads = self._all(
            sa.select(t.id.label("turn_id"), t.session_id, s.owner, t.created_at)
            .join(first, (first.c.session_id == t.session_id) & (first.c.number == t.number))
            .join(tables.sessions, s.id == t.session_id)
            .where(~_AT_WORK, s.status.not_in((SessionStatus.STOPPED, SessionStatus.FAILED)), ~s.deleting)
            .order_by(t.created_at, t.id)
        )
        if not heads:
            return []
        at_work = sa.case((_AT_WORK, s.id))
        owners = {
            row["owner"]: row
            for row in self._all(
                sa.select(
                    s.owner,
                    sa.func.count(at_work.distinct()).label("running"),
                    sa.func.max(t.started_at).label("last_started_at"),
                )
                .select_from(tables.sessions)
                .outerjoin(tables.turns, t.session_id == s.id)
                .where(s.owner.in_({head["owner"] for head in heads}), ~s.deleting)
                .group_by(s.owner)
            )
        }
        return [
            abc.WaitingTurn(
                **head,
                running=owners[head["owner"]]["running"],
                last_started_at=owners[head["owner"]]["last_started_at"],
            )
            for head in heads
        ]
