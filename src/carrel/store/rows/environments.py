"""Environments with their versions, and secrets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.protocol.environments import Environment, Secret
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, name_of, named_cursor_of
from carrel.store.rows.sessions import LIVE_SESSION

_E = tables.environments.c
_NEWEST_FIRST = sa.select(tables.environments).order_by(_E.version.desc())


class SqlEnvironments(Rows, abc.EnvironmentRows):
    """Environments."""

    def add(self, environment: Environment) -> bool:
        """Store a new version. False where it is there already."""
        spec = environment.spec.model_dump(mode="json", exclude_unset=True)
        return self._insert_or_ignore(tables.environments, {**columns(environment), "spec": spec})

    def get(self, name: str, version: int | None = None) -> Environment | None:
        """A version of the environment, by default the newest; None where it is not there."""
        query = _NEWEST_FIRST.where(_E.name == name).limit(1)
        if version is not None:
            query = query.where(_E.version == version)
        row = self._one(query)
        return Environment.model_validate(row) if row else None

    def versions(self, name: str) -> Sequence[Environment]:
        """Every version of the environment, newest first."""
        return [Environment.model_validate(row) for row in self._all(_NEWEST_FIRST.where(_E.name == name))]

    def page(self, *, cursor: str | None, limit: int) -> abc.Page[Environment]:
        """The newest version of each environment, by name. Raises InvalidCursor."""
        newest = sa.select(_E.name, sa.func.max(_E.version).label("version")).group_by(_E.name).subquery()
        same = (newest.c.name == _E.name) & (newest.c.version == _E.version)
        query = sa.select(tables.environments).join(newest, same).order_by(_E.name).limit(limit + 1)
        if cursor is not None:
            query = query.where(_E.name > name_of(cursor))
        found = [Environment.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].name) if more else None)

    def remove(self, name: str) -> None:
        """Delete the environment with all of its versions."""
        self._connection.execute(tables.environments.delete().where(_E.name == name))
        self.set_stopped(name, False)

    def sessions(self, name: str, owner: str | None = None) -> int:
        """How many sessions are in it, of everybody or of one owner; deleted ones do not count."""
        s = tables.sessions.c
        query = sa.select(sa.func.count()).where(s.environment == name, ~s.deleting, s.reserved.is_(None))
        if owner is not None:
            query = query.where(s.owner == owner)
        return int(self._connection.execute(query).scalar_one())

    def with_sandbox(self, name: str) -> Sequence[str]:
        """The ids of sessions in it that have a sandbox or are getting one; not those in warm pools."""
        s = tables.sessions.c
        query = sa.select(s.id).where(
            s.environment == name, s.status.in_(LIVE_SESSION), ~s.deleting, s.reserved.is_(None)
        )
        return list(self._connection.execute(query).scalars())

    def stopped(self) -> Sequence[str]:
        """The names of those that take no prompts, sorted."""
        stopped = tables.stopped_environments.c.name
        return list(self._connection.execute(sa.select(stopped).order_by(stopped)).scalars())

    def set_stopped(self, name: str, stopped: bool) -> None:
        """Have the environment take no prompts from here on, or take them again."""
        table = tables.stopped_environments
        if stopped:
            self._insert_or_ignore(table, {"name": name})
            return
        self._connection.execute(table.delete().where(table.c.name == name))


class SqlSecrets(Rows, abc.SecretRows):
    """Secrets, sealed."""

    def put(self, secret: Secret) -> None:
        """Store a secret, in the place of the one of its name if there is one."""
        values: dict[str, Any] = columns(secret)
        if self._insert_or_ignore(tables.secrets, values):
            return
        self._connection.execute(tables.secrets.update().where(tables.secrets.c.name == secret.name).values(values))

    def get(self, name: str) -> Secret | None:
        """The secret, or None."""
        row = self._one(sa.select(tables.secrets).where(tables.secrets.c.name == name))
        return Secret.model_validate(row) if row else None

    def all(self) -> Sequence[Secret]:
        """Every secret, by name."""
        return [
            Secret.model_validate(row) for row in self._all(sa.select(tables.secrets).order_by(tables.secrets.c.name))
        ]

    def remove(self, name: str) -> bool:
        """Delete it. False where it is not there."""
        query = tables.secrets.delete().where(tables.secrets.c.name == name).returning(tables.secrets.c.name)
        return self._one(query) is not None
