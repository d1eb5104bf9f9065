"""The audit log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from carrel import abc
from carrel.store import tables
from carrel.store.rows.base import Rows, name_of, named_cursor_of


class SqlAudit(Rows, abc.AuditRows):
    """The audit log."""

    def add(self, records: Sequence[abc.AuditRecord]) -> None:
        """Store records."""
        if records:
            self._connection.execute(tables.audit.insert(), [vars(record) for record in records])

    def page(self, which: abc.AuditFilter, *, cursor: str | None, limit: int) -> abc.Page[abc.AuditRecord]:
        """Newest first. Raises InvalidCursor."""
        a = tables.audit.c
        query = sa.select(tables.audit).order_by(a.id.desc()).limit(limit + 1)
        for name in ("user_id", "principal", "action", "object_id"):
            if (value := getattr(which, name)) is not None:
                query = query.where(a[name] == value)
        if which.since is not None:
            query = query.where(a.at >= which.since)
        if which.until is not None:
            query = query.where(a.at < which.until)
        if cursor is not None:
            query = query.where(a.id < name_of(cursor))
        found = [abc.AuditRecord(**row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)

    def prune(self, before: datetime) -> None:
        """Forget every record made before."""
        self._connection.execute(tables.audit.delete().where(tables.audit.c.at < before))
