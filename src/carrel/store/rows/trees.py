"""Who has begun whom."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from carrel import abc
from carrel.model import Session, SessionStatus
from carrel.store import tables
from carrel.store.rows.base import Rows
from carrel.store.rows.sessions import SESSION_COLUMNS

_S, _A = tables.sessions, tables.ancestry
_RESTS = (SessionStatus.STOPPED, SessionStatus.FAILED)
_BELOW = sa.select(_A.c.session_id).where(_A.c.ancestor_id == sa.bindparam("this"))


class SqlTrees(Rows, abc.TreeRows):
    """Who has begun whom."""

    def add(self, child: Session) -> None:
        """Note that a session that has just been stored is below all of its lineage."""
        for ancestor in child.lineage:
            self._connection.execute(_A.insert().values(session_id=child.id, ancestor_id=ancestor))

    def above(self, session: Session) -> Sequence[Session]:
        """The sessions above, the nearest first. They are not held."""
        query = sa.select(*SESSION_COLUMNS).where(_S.c.id.in_(session.lineage), ~_S.c.deleting)
        return [Session.model_validate(row) for row in self._all(query.order_by(_S.c.depth.desc()))]

    def children(self, session_id: str) -> Sequence[Session]:
        """Those that the session has begun, oldest first."""
        query = sa.select(*SESSION_COLUMNS).where(_S.c.parent_id == session_id, ~_S.c.deleting)
        return [Session.model_validate(row) for row in self._all(query.order_by(_S.c.number))]

    def below(self, session_id: str) -> Sequence[Session]:
        """All that are below the session, each behind its parent, in the order in which they were made."""
        query = sa.select(*SESSION_COLUMNS).where(_S.c.id.in_(_BELOW), ~_S.c.deleting)
        return [Session.model_validate(row) for row in self._all(query.order_by(_S.c.number), this=session_id)]

    def live_children(self, session_id: str) -> int:
        """How many of those that the session has begun are neither stopped nor failed."""
        return self._count(_S.c.parent_id == session_id)

    def live_below(self, session_id: str) -> int:
        """The same, of all that are below it."""
        return self._count(_S.c.id.in_(_BELOW), this=session_id)

    def left(self, session_id: str) -> Sequence[str]:
        """The ids of those that the session has begun and of which anything is still there, be they deleted or not."""
        return list(self._connection.execute(sa.select(_S.c.id).where(_S.c.parent_id == session_id)).scalars())

    def _count(self, which: sa.ColumnElement[bool], **parameters: str) -> int:
        query = sa.select(sa.func.count()).select_from(_S).where(which, ~_S.c.deleting, _S.c.status.not_in(_RESTS))
        return int(self._connection.execute(query, parameters).scalar_one())
