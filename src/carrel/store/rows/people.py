"""Users, their keys, and tickets."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.errors import KeyNotFound, UserNotFound
from carrel.model import ApiKey, Ticket, User
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, name_of, named_cursor_of, plain, update_of

_USER_COLUMNS = [tables.users.c[name] for name in User.model_fields]
_THIS_USER = tables.users.c.id == sa.bindparam("this")
_GET_USER = sa.select(*_USER_COLUMNS).where(_THIS_USER)
_LOCK_USER = _GET_USER.with_for_update()


class SqlUsers(Rows, abc.UserRows):
    """Users."""

    def ensure(self, user_id: str, at: datetime) -> User:
        """The user, made now where there is none."""
        known = self.get(user_id)
        if known is not None:
            return known
        user = User(id=user_id, created_at=at)
        self._insert_or_ignore(tables.users, columns(user))
        return self.get(user_id) or user

    def get(self, user_id: str) -> User | None:
        """The user, or None."""
        row = self._one(_GET_USER, this=user_id)
        return User.model_validate(row) if row else None

    def lock(self, user_id: str) -> User | None:
        """The user; until this transaction ends, no other one gets past this line for the same user."""
        row = self._one(_LOCK_USER, this=user_id)
        return User.model_validate(row) if row else None

    def update(self, user_id: str, **changes: Any) -> User:
        """Change columns. Raises UserNotFound."""
        values = {name: plain(value) for name, value in changes.items()}
        row = self._one(_update_user(frozenset(values)), this=user_id, **values)
        if row is None:
            raise UserNotFound
        return User.model_validate(row)

    def page(self, *, cursor: str | None, limit: int) -> abc.Page[User]:
        """By id. Raises InvalidCursor."""
        query = sa.select(*_USER_COLUMNS).order_by(tables.users.c.id).limit(limit + 1)
        if cursor is not None:
            query = query.where(tables.users.c.id > name_of(cursor))
        found = [User.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)


@cache
def _update_user(names: frozenset[str]) -> sa.Executable:
    return update_of(tables.users, names).where(_THIS_USER).returning(*_USER_COLUMNS)


_KEY_COLUMNS = [tables.api_keys.c[name] for name in ApiKey.model_fields]
_THIS_KEY = tables.api_keys.c.id == sa.bindparam("this")
_GET_KEY = sa.select(*_KEY_COLUMNS).where(_THIS_KEY)
_BY_HASH = (
    sa.select(*_KEY_COLUMNS, *[column.label(f"user_{column.name}") for column in _USER_COLUMNS])
    .join(tables.users, tables.users.c.id == tables.api_keys.c.user_id)
    .where(tables.api_keys.c.hash == sa.bindparam("hash"))
)


class SqlKeys(Rows, abc.KeyRows):
    """API keys."""

    def add(self, key: ApiKey) -> None:
        """Store a new key."""
        self._connection.execute(tables.api_keys.insert(), columns(key))

    def get(self, key_id: str) -> ApiKey | None:
        """The key, or None."""
        row = self._one(_GET_KEY, this=key_id)
        return ApiKey.model_validate(row) if row else None

    def by_hash(self, key_hash: str) -> tuple[ApiKey, User] | None:
        """The key with this hash and its user, or None."""
        row = self._connection.execute(_BY_HASH, {"hash": key_hash}).first()
        if row is None:
            return None
        values = list(row)
        key = ApiKey.model_validate(dict(zip(ApiKey.model_fields, values, strict=False)))
        return key, User.model_validate(dict(zip(User.model_fields, values[len(_KEY_COLUMNS) :], strict=True)))

    def update(self, key_id: str, **changes: Any) -> ApiKey:
        """Change columns. Raises KeyNotFound."""
        row = self._one(_update_key(frozenset(changes)), this=key_id, **changes)
        if row is None:
            raise KeyNotFound
        return ApiKey.model_validate(row)

    def page(self, user_id: str | None, *, cursor: str | None, limit: int) -> abc.Page[ApiKey]:
        """Newest first, of one user or of all. Raises InvalidCursor."""
        query = sa.select(*_KEY_COLUMNS).order_by(tables.api_keys.c.id.desc()).limit(limit + 1)
        if user_id is not None:
            query = query.where(tables.api_keys.c.user_id == user_id)
        if cursor is not None:
            query = query.where(tables.api_keys.c.id < name_of(cursor))
        found = [ApiKey.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)


@cache
def _update_key(names: frozenset[str]) -> sa.Executable:
    return update_of(tables.api_keys, names).where(_THIS_KEY).returning(*_KEY_COLUMNS)


class SqlTickets(Rows, abc.TicketRows):
    """Tickets."""

    def add(self, ticket: Ticket) -> None:
        """Store a new ticket."""
        self._connection.execute(tables.tickets.insert(), columns(ticket))

    def get(self, ticket_hash: str) -> Ticket | None:
        """The ticket as it is, be it good or not; None where it is not there."""
        row = self._one(sa.select(tables.tickets).where(tables.tickets.c.hash == ticket_hash))
        return Ticket.model_validate(row) if row else None

    def take(self, ticket_hash: str, now: datetime) -> Ticket | None:
        """The ticket, if it is still good. One that is not reusable is good for this one call."""
        t = tables.tickets
        good = (t.c.hash == ticket_hash) & (t.c.expires_at > now)
        row = self._one(sa.select(t).where(good, t.c.reusable))
        row = row or self._one(t.delete().where(good, ~t.c.reusable).returning(*t.c))
        return Ticket.model_validate(row) if row else None

    def prune(self, before: datetime) -> None:
        """Forget every ticket that expired before."""
        self._connection.execute(tables.tickets.delete().where(tables.tickets.c.expires_at < before))
