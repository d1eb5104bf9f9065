"""Sessions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.errors import SessionNotFound
from carrel.model import InteractionStatus, RuleScope, SandboxStatus, Session, SessionStatus, TurnStatus
from carrel.store import tables
from carrel.store.rows.base import Rows, columns, cursor_of, number_of, plain, update_of

LIVE_SESSION = (SessionStatus.STARTING, SessionStatus.READY, SessionStatus.RUNNING, SessionStatus.WAITING)


SESSION_COLUMNS = [tables.sessions.c[name] for name in Session.model_fields]
_THIS_SESSION = (tables.sessions.c.id == sa.bindparam("this")) & ~tables.sessions.c.deleting
_GET_SESSION = sa.select(*SESSION_COLUMNS).where(_THIS_SESSION)
# SQLite has one writer at a time and leaves the lock out of the statement.
_LOCK_SESSION = _GET_SESSION.with_for_update()
_NEXT_NUMBER = (
    sa.update(tables.counters)
    .where(tables.counters.c.name == "session")
    .values(value=tables.counters.c.value + 1)
    .returning(tables.counters.c.value)
)
_ADD_SESSION = tables.sessions.insert()
_IS_DELETING = sa.select(tables.sessions.c.deleting).where(tables.sessions.c.id == sa.bindparam("this"))


class SqlSessions(Rows, abc.SessionRows):
    """Sessions."""

    def next_number(self) -> int:
        """A number no session of this installation has had."""
        return int(self._connection.execute(_NEXT_NUMBER).scalar_one())

    def add(self, session: Session) -> None:
        """Store a new session."""
        self._connection.execute(_ADD_SESSION, columns(session))

    def get(self, session_id: str) -> Session | None:
        """The session, or None. In a writing transaction, nobody else changes it before that has ended."""
        row = self._one(_LOCK_SESSION if self._writing else _GET_SESSION, this=session_id)
        return Session.model_validate(row) if row else None

    def update(self, session_id: str, **changes: Any) -> Session:
        """Change columns. Raises SessionNotFound where the session is gone."""
        values = {name: plain(value) for name, value in changes.items()}
        row = self._one(_update_session(frozenset(values)), this=session_id, **values)
        if row is None:
            raise SessionNotFound
        return Session.model_validate(row)

    def remove(self, session_id: str) -> None:
        """Delete the session and every row that belongs to it; what it has spent and reserved stays."""
        for table in (
            tables.events,
            tables.transcript_entries,
            tables.turns,
            tables.sandboxes,
            tables.artifacts,
            tables.interactions,
            tables.network_requests,
        ):
            self._connection.execute(table.delete().where(table.c.session_id == session_id))
        # What is below a session goes before it; what it has spent itself goes on counting for those above it.
        self._connection.execute(tables.ancestry.delete().where(tables.ancestry.c.ancestor_id == session_id))
        rules = tables.permission_rules
        mine = (rules.c.scope == RuleScope.SESSION) & (rules.c.target == session_id)
        self._connection.execute(rules.delete().where(mine))
        self._connection.execute(tables.sessions.delete().where(tables.sessions.c.id == session_id))

    def page(self, which: abc.SessionFilter, *, cursor: str | None, limit: int) -> abc.Page[Session]:
        """Newest first. Raises InvalidCursor."""
        number = tables.sessions.c.number
        taken = tables.sessions.c.reserved.is_(None)
        query = sa.select(*SESSION_COLUMNS).where(~tables.sessions.c.deleting, taken)
        query = query.order_by(number.desc()).limit(limit + 1)
        if which.owner is not None:
            query = query.where(tables.sessions.c.owner == which.owner)
        if which.session_id is not None:
            query = query.where(tables.sessions.c.id == which.session_id)
        if which.status is not None:
            query = query.where(tables.sessions.c.status == which.status)
        if which.environment is not None:
            query = query.where(tables.sessions.c.environment == which.environment)
        if which.text is not None:
            query = query.where(_has_text(which.text, self._connection.dialect.name))
        if cursor is not None:
            query = query.where(number < number_of(cursor))
        found = [Session.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], cursor_of(found[limit - 1].number) if more else None)

    def unsettled(self, now: datetime) -> Sequence[str]:
        """The ids of sessions that look alive, have turns queued, are being deleted, or whose time to live is over.

        One whose turn waits for a person without a sandbox is among them only when something of it is due.
        """
        s, t, i = tables.sessions, tables.turns, tables.interactions
        waiting = sa.select(t.c.session_id).where(
            t.c.status.in_((TurnStatus.QUEUED, TurnStatus.RUNNING))
            | ((t.c.status == TurnStatus.WAITING) & ((t.c.deadline_at <= now) | t.c.interrupt_reason.is_not(None)))
        )
        asked = sa.select(i.c.session_id).where(
            i.c.status == InteractionStatus.PENDING, (i.c.expires_at <= now) | (i.c.remind_at <= now)
        )
        housed = sa.select(tables.sandboxes.c.session_id).where(tables.sandboxes.c.status != SandboxStatus.GONE)
        held = sa.select(t.c.session_id).where(t.c.status == TurnStatus.WAITING)
        rests = (s.c.status == SessionStatus.WAITING) & s.c.id.in_(held) & ~s.c.id.in_(housed)
        query = sa.select(s.c.id).where(
            (s.c.status.in_(LIVE_SESSION) & ~rests)
            | s.c.id.in_(asked)
            | s.c.deleting
            | (s.c.expires_at <= now)
            | s.c.restoring.is_not(None)
            | s.c.reserved.is_not(None)
            | s.c.id.in_(waiting)
        )
        return list(self._connection.execute(query).scalars())

    def deleting(self, session_id: str) -> bool:
        """Whether the session is deleted and something of it is still to be removed."""
        return bool(self._connection.execute(_IS_DELETING, {"this": session_id}).scalar())

    def mark_deleting(self, session_id: str) -> None:
        """From now on the session is not found; what is left of it is still to be removed."""
        self._connection.execute(
            tables.sessions.update().where(tables.sessions.c.id == session_id).values(deleting=True)
        )


def _has_text(text: str, dialect: str) -> sa.ColumnElement[bool]:
    """Sessions that have the text in their title, or in what was said."""
    e = tables.events.c
    answered = sa.select(e.session_id).where(e.type == "message.assistant", _contains(_text_of(e.data, dialect), text))
    blocks = _blocks_of(e.data, dialect)
    told = sa.select(e.session_id).where(
        e.type == "message.user",
        # Asked first, because it is quick: few of the blocks need to be taken apart.
        _contains(e.data, json.dumps(text, ensure_ascii=False)[1:-1]),
        sa.exists().select_from(blocks).where(_contains(_text_of(blocks.c.value, dialect), text)),
    )
    s = tables.sessions.c
    return _contains(s.title, text) | s.id.in_(answered) | s.id.in_(told)


def _contains(column: sa.ColumnElement[Any], text: str) -> sa.ColumnElement[bool]:
    return sa.func.lower(column).contains(text.lower(), autoescape=True)


def _text_of(data: sa.ColumnElement[Any], dialect: str) -> sa.ColumnElement[Any]:
    """The member `text` of an object in JSON."""
    if dialect == "sqlite":
        return sa.func.json_extract(data, "$.text")
    return sa.func.json_extract_path_text(sa.cast(_without_nul(data), sa.JSON), "text")


def _blocks_of(data: sa.ColumnElement[Any], dialect: str) -> Any:
    """The elements of the member `content` of an object in JSON."""
    if dialect == "sqlite":
        return sa.func.json_each(data, "$.content").table_valued("value")
    content = sa.func.json_extract_path(sa.cast(_without_nul(data), sa.JSON), "content")
    return sa.func.json_array_elements(content).table_valued(sa.column("value", sa.JSON))


def _without_nul(data: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    # PostgreSQL has no text with such a character, and would refuse the whole query: so it is written as the dialect
    # writes it where it is looked for. An even number of backslashes before it are characters of their own.
    text = sa.cast(data, sa.Text)
    marked = sa.func.regexp_replace(text, r"(?<!\\)((?:\\\\)*)\\u0010", r"\1\\u00101", "g")
    written = sa.func.regexp_replace(marked, r"(?<!\\)((?:\\\\)*)\\u0000", r"\1\\u00100", "g")
    odd = text.contains(r"\u0000", autoescape=True) | text.contains(r"\u0010", autoescape=True)
    return sa.case((odd, written), else_=text)


@cache
def _update_session(names: frozenset[str]) -> sa.Executable:
    return update_of(tables.sessions, names).where(_THIS_SESSION).returning(*SESSION_COLUMNS)
