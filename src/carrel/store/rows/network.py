"""What sandboxes asked the egress proxy for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.store import tables
from carrel.store.rows.base import Rows, name_of, named_cursor_of

_N = tables.network_requests
_KIND = [_N.c[name] for name in ("session_id", "host", "port", "verdict", "reason")]
_SAME = sa.and_(*(column == sa.bindparam(f"this_{column.name}") for column in _KIND))
_COUNT_MORE = (
    _N.update().where(_SAME).values(count=_N.c.count + sa.bindparam("more"), last_at=sa.bindparam("this_last_at"))
)


class SqlNetwork(Rows, abc.NetworkRows):
    """What sandboxes asked the egress proxy for."""

    def add(self, requests: Sequence[abc.NetworkRequest], *, most: int = 1000) -> None:
        """Add to what is counted. A session's kinds of requests beyond `most` are counted as of OTHER_HOSTS, port 0."""
        kinds = self._kinds({request.session_id for request in requests})
        for request in requests:
            if request.session_id not in kinds or self._counted(vars(request)):
                continue
            values = dict(vars(request))
            if kinds[request.session_id] >= most:
                values |= {"host": abc.OTHER_HOSTS, "port": 0}
                if self._counted(values):
                    continue
            self._connection.execute(_N.insert(), values)
            kinds[request.session_id] += 1

    def _kinds(self, session_ids: set[str]) -> Counter[str]:
        """How many each of these sessions has, of those that are there; they stay there until this transaction ends."""
        s = tables.sessions.c
        # In one order, or two transactions could wait for each other.
        there = sa.select(s.id).where(s.id.in_(session_ids)).order_by(s.id).with_for_update(read=True, key_share=True)
        found = Counter({str(each): 0 for each in self._connection.execute(there).scalars()})
        counted = (
            sa.select(_N.c.session_id, sa.func.count()).where(_N.c.session_id.in_(found)).group_by(_N.c.session_id)
        )
        found.update({str(session_id): int(count) for session_id, count in self._connection.execute(counted)})
        return found

    def _counted(self, values: dict[str, Any]) -> bool:
        """Count it where its kind is known. Whether it is."""
        same = {f"this_{column.name}": values[column.name] for column in _KIND}
        more = {"more": values["count"], "this_last_at": values["last_at"]}
        return self._connection.execute(_COUNT_MORE, same | more).rowcount > 0

    def page(self, session_id: str, *, cursor: str | None, limit: int) -> abc.Page[abc.NetworkRequest]:
        """A session's, what was first asked for last at the front. Raises InvalidCursor."""
        query = sa.select(_N).where(_N.c.session_id == session_id).order_by(_N.c.id.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(_N.c.id < name_of(cursor))
        found = [abc.NetworkRequest(**row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)
