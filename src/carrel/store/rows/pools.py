"""Sessions that wait in a warm pool."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from carrel import abc
from carrel.model import Session, SessionStatus
from carrel.store import tables
from carrel.store.rows.base import Rows

_SESSION_COLUMNS = [tables.sessions.c[name] for name in Session.model_fields]
_IN_POOL = (tables.sessions.c.reserved == sa.bindparam("pool")) & ~tables.sessions.c.deleting
_OLDEST = (
    sa.select(tables.sessions.c.id)
    .where(_IN_POOL, tables.sessions.c.status == SessionStatus.READY)
    .order_by(tables.sessions.c.number)
    .limit(1)
    # Who comes at the same time takes the next one, and does not wait for this one.
    .with_for_update(skip_locked=True)
)
_TAKE = (
    tables.sessions.update()
    .where(tables.sessions.c.id == _OLDEST.scalar_subquery(), _IN_POOL)
    .values(reserved=None)
    .returning(*_SESSION_COLUMNS)
)


class SqlPools(Rows, abc.PoolRows):
    """Sessions that wait in a warm pool."""

    def waiting(self) -> Sequence[Session]:
        """Those of every pool, oldest first; deleted ones are not among them."""
        s = tables.sessions.c
        query = sa.select(*_SESSION_COLUMNS).where(s.reserved.is_not(None), ~s.deleting).order_by(s.number)
        return [Session.model_validate(row) for row in self._all(query)]

    def take(self, pool: str) -> Session | None:
        """Take the oldest whose agent is connected out of this pool; None where there is none."""
        row = self._one(_TAKE, pool=pool)
        return Session.model_validate(row) if row else None
