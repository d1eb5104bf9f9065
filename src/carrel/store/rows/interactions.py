"""What waits for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.model import Interaction, InteractionStatus
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, name_of, named_cursor_of, plain

_T = tables.interactions
_COLUMNS = [_T.c[name] for name in Interaction.model_fields]


class SqlInteractions(Rows, abc.InteractionRows):
    """What waits for a person."""

    def add(self, interaction: Interaction) -> bool:
        """Store a new one. False where one with its id is there."""
        return self._insert_or_ignore(_T, columns(interaction))

    def get(self, interaction_id: str) -> Interaction | None:
        """The interaction, or None."""
        row = self._one(sa.select(*_COLUMNS).where(_T.c.id == interaction_id))
        return Interaction.model_validate(row) if row else None

    def resolve(self, interaction_id: str, **changes: Any) -> Interaction | None:
        """Change the columns of one that is pending, its status among them; None where it is not pending any more."""
        pending = (_T.c.id == interaction_id, _T.c.status == InteractionStatus.PENDING)
        values = {name: plain(value) for name, value in changes.items()}
        row = self._one(_T.update().where(*pending).values(**values).returning(*_COLUMNS))
        return Interaction.model_validate(row) if row else None

    def update(self, interaction_id: str, **changes: Any) -> Interaction | None:
        """Change columns, whatever its status; None where there is none."""
        values = {name: plain(value) for name, value in changes.items()}
        row = self._one(_T.update().where(_T.c.id == interaction_id).values(**values).returning(*_COLUMNS))
        return Interaction.model_validate(row) if row else None

    def page(self, which: abc.InteractionFilter, *, cursor: str | None, limit: int) -> abc.Page[Interaction]:
        """Oldest first. Raises InvalidCursor."""
        query = sa.select(*_COLUMNS).order_by(_T.c.id).limit(limit + 1)
        for name in ("owner", "session_id", "turn_id", "status"):
            if (wanted := getattr(which, name)) is not None:
                query = query.where(_T.c[name] == wanted)
        if which.tree is not None:
            query = query.where(_T.c.root_session_id == which.tree)
        if cursor is not None:
            query = query.where(_T.c.id > name_of(cursor))
        found = [Interaction.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)

    def pending(self, session_id: str) -> Sequence[Interaction]:
        """All of a session's that wait, oldest first."""
        query = sa.select(*_COLUMNS).where(_T.c.session_id == session_id, _T.c.status == InteractionStatus.PENDING)
        return [Interaction.model_validate(row) for row in self._all(query.order_by(_T.c.id))]

    def untaken(self, session_id: str) -> Sequence[Interaction]:
        """All of a session's that wait, or whose answer no agent has acted on, oldest first; none that is withdrawn."""
        query = sa.select(*_COLUMNS).where(_T.c.session_id == session_id, _T.c.taken_at.is_(None))
        query = query.where(_T.c.status != InteractionStatus.WITHDRAWN).order_by(_T.c.id)
        return [Interaction.model_validate(row) for row in self._all(query)]
