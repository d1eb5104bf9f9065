"""Sandboxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.model import Sandbox, SandboxStatus
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, plain, update_of

_SANDBOX_COLUMNS = [tables.sandboxes.c[name] for name in Sandbox.model_fields]
_THIS_SANDBOX = tables.sandboxes.c.id == sa.bindparam("this")
_GET_SANDBOX = sa.select(*_SANDBOX_COLUMNS).where(_THIS_SANDBOX)
_BY_AGENT_TOKEN = sa.select(*_SANDBOX_COLUMNS).where(
    tables.sandboxes.c.agent_token_hash == sa.bindparam("hash"), tables.sandboxes.c.status != SandboxStatus.GONE
)
_CURRENT = (
    sa.select(*_SANDBOX_COLUMNS)
    .where(tables.sandboxes.c.session_id == sa.bindparam("session"), tables.sandboxes.c.status != SandboxStatus.GONE)
    .order_by(tables.sandboxes.c.generation.desc())
    .limit(1)
)
_GET_ACKED = sa.select(tables.sandboxes.c.acked).where(_THIS_SANDBOX).with_for_update()
_SET_ACKED = update_of(tables.sandboxes, ["acked"]).where(_THIS_SANDBOX)


class SqlSandboxes(Rows, abc.SandboxRows):
    """Sandboxes."""

    def add(self, sandbox: Sandbox) -> None:
        """Store a new sandbox."""
        self._connection.execute(tables.sandboxes.insert().values(**columns(sandbox)))

    def get(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox, or None."""
        row = self._one(_GET_SANDBOX, this=sandbox_id)
        return Sandbox.model_validate(row) if row else None

    def by_agent_token(self, token_hash: str) -> Sandbox | None:
        """The sandbox that is not gone and whose agent holds this token."""
        row = self._one(_BY_AGENT_TOKEN, hash=token_hash)
        return Sandbox.model_validate(row) if row else None

    def update(self, sandbox_id: str, **changes: Any) -> None:
        """Change columns; nothing happens where the sandbox is not there."""
        values = {name: plain(value) for name, value in changes.items()}
        self._connection.execute(tables.sandboxes.update().where(tables.sandboxes.c.id == sandbox_id).values(**values))

    def current(self, session_id: str) -> Sandbox | None:
        """The session's newest sandbox that is not gone, or None."""
        row = self._one(_CURRENT, session=session_id)
        return Sandbox.model_validate(row) if row else None

    def not_gone(self) -> Sequence[Sandbox]:
        """Every sandbox that is not known to be gone."""
        query = sa.select(*_SANDBOX_COLUMNS).where(tables.sandboxes.c.status != SandboxStatus.GONE)
        return [Sandbox.model_validate(row) for row in self._all(query)]

    def in_workspace(self, workspace_id: str) -> Sequence[Sandbox]:
        """Every sandbox of a session that works in this persistent workspace and is not known to be gone."""
        s = tables.sessions.c
        theirs = sa.select(s.id).where(s.workspace_id == workspace_id)
        c = tables.sandboxes.c
        query = sa.select(*_SANDBOX_COLUMNS).where(c.status != SandboxStatus.GONE, c.session_id.in_(theirs))
        return [Sandbox.model_validate(row) for row in self._all(query)]

    def advance(self, sandbox_id: str, n: int) -> int:
        """Say that frames up to `n` are stored. Answers the mark before; it never goes back."""
        before = self._connection.execute(_GET_ACKED, {"this": sandbox_id}).scalar_one()
        if n > before:
            self._connection.execute(_SET_ACKED, {"this": sandbox_id, "acked": n})
        return int(before)
