"""Rules about calls of tools that people have written."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from carrel import abc
from carrel.model import PermissionRule, RuleScope
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, name_of, named_cursor_of

_T = tables.permission_rules
_COLUMNS = [_T.c[name] for name in PermissionRule.model_fields]


class SqlRules(Rows, abc.RuleRows):
    """Rules about calls of tools that people have written."""

    def add(self, rule: PermissionRule) -> None:
        """Store a new one."""
        self._connection.execute(_T.insert(), columns(rule))

    def get(self, rule_id: str) -> PermissionRule | None:
        """The rule, or None."""
        row = self._one(sa.select(*_COLUMNS).where(_T.c.id == rule_id))
        return PermissionRule.model_validate(row) if row else None

    def remove(self, rule_id: str) -> None:
        """Delete it."""
        self._connection.execute(_T.delete().where(_T.c.id == rule_id))

    def forget(self, scope: RuleScope, target: str) -> None:
        """Delete all that hold for something that is gone."""
        self._connection.execute(_T.delete().where(_T.c.scope == scope, _T.c.target == target))

    def holding(self, targets: Sequence[tuple[RuleScope, str]]) -> Sequence[PermissionRule]:
        """All that hold for any of these, oldest first."""
        any_of = [(_T.c.scope == scope) & (_T.c.target == target) for scope, target in targets]
        query = sa.select(*_COLUMNS).where(sa.or_(sa.false(), *any_of)).order_by(_T.c.id)
        return [PermissionRule.model_validate(row) for row in self._all(query)]

    def page(self, which: abc.RuleFilter, *, cursor: str | None, limit: int) -> abc.Page[PermissionRule]:
        """Oldest first. Raises InvalidCursor."""
        query = sa.select(*_COLUMNS).order_by(_T.c.id).limit(limit + 1)
        for name in ("owner", "scope", "target"):
            if (wanted := getattr(which, name)) is not None:
                query = query.where(_T.c[name] == wanted)
        if cursor is not None:
            query = query.where(_T.c.id > name_of(cursor))
        found = [PermissionRule.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)
