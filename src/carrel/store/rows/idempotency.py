"""Requests that may be sent twice."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.store import tables
from carrel.store.rows.base import Rows


class SqlIdempotency(Rows, abc.IdempotencyRows):
    """Requests that may be sent twice."""

    def _this(self, principal: str, key: str) -> sa.ColumnElement[bool]:
        return (tables.idempotency.c.principal == principal) & (tables.idempotency.c.key == key)

    def reserve(self, record: abc.IdempotencyRecord) -> abc.IdempotencyRecord | None:
        """Store the record, unless one with its principal and key is there: then answer that one."""
        known = sa.select(tables.idempotency).where(self._this(record.principal, record.key))
        while True:
            row = self._one(known)
            if row is not None:
                return abc.IdempotencyRecord(**row)
            # Another transaction may store one now; it is then waited for, and found by the next look.
            if self._insert_or_ignore(tables.idempotency, vars(record)):
                return None

    def update(self, principal: str, key: str, **changes: Any) -> None:
        """Change columns."""
        self._connection.execute(tables.idempotency.update().where(self._this(principal, key)).values(**changes))

    def remove(self, principal: str, key: str) -> None:
        """Forget the request."""
        self._connection.execute(tables.idempotency.delete().where(self._this(principal, key)))

    def prune(self, before: datetime) -> None:
        """Forget every request made before."""
        self._connection.execute(tables.idempotency.delete().where(tables.idempotency.c.created_at < before))
