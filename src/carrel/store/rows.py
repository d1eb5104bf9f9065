"""The roles of a transaction, in SQL that SQLite and PostgreSQL both take."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel

from carrel import abc
from carrel.errors import InvalidCursor, SessionNotFound, TurnNotFound
from carrel.model import Sandbox, SandboxStatus, Session, SessionStatus, Turn, TurnStatus, Usage
from carrel.protocol.events import NewEvent, StoredEvent
from carrel.store import tables

_LIVE_SESSION = (SessionStatus.STARTING, SessionStatus.READY, SessionStatus.RUNNING, SessionStatus.WAITING)
_READ_BATCH = 500


def _plain(value: Any) -> Any:
    """A column's value for a model's."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value


def _columns(entity: BaseModel) -> dict[str, Any]:
    return {name: _plain(getattr(entity, name)) for name in type(entity).model_fields}


def _cursor_of(number: int) -> str:
    return base64.urlsafe_b64encode(b"n%d" % number).decode().rstrip("=")


def _number_of(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        if not text.startswith("n") or not text[1:].isdigit():
            raise ValueError(text)
        number = int(text[1:])
    except ValueError as error:
        raise InvalidCursor(operator_detail=repr(cursor)) from error
    if not 0 <= number < 2**63:
        raise InvalidCursor
    return number


def _update(table: sa.Table, names: Iterable[str]) -> sa.Update:
    """Changes the named columns; their values are parameters of the same names."""
    return table.update().values({name: sa.bindparam(name) for name in names})


class _Rows:
    """Statements that run often are built once: building one costs several times what SQLite needs to run it."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def _one(self, statement: sa.Executable, **parameters: Any) -> Mapping[str, Any] | None:
        row = self._connection.execute(statement, parameters).mappings().first()
        return dict(row) if row is not None else None

    def _all(self, statement: sa.Executable, **parameters: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self._connection.execute(statement, parameters).mappings()]


# ---------------------------------------------------------------------------------------------------------- sessions

_SESSION_COLUMNS = [tables.sessions.c[name] for name in Session.model_fields]
_THIS_SESSION = (tables.sessions.c.id == sa.bindparam("this")) & ~tables.sessions.c.deleting
_GET_SESSION = sa.select(*_SESSION_COLUMNS).where(_THIS_SESSION)
_NEXT_NUMBER = (
    sa.update(tables.counters)
    .where(tables.counters.c.name == "session")
    .values(value=tables.counters.c.value + 1)
    .returning(tables.counters.c.value)
)
_ADD_SESSION = tables.sessions.insert()
_IS_DELETING = sa.select(tables.sessions.c.deleting).where(tables.sessions.c.id == sa.bindparam("this"))


class SqlSessions(_Rows, abc.SessionRows):
    """Sessions."""

    def next_number(self) -> int:
        """A number no session of this installation has had."""
        return int(self._connection.execute(_NEXT_NUMBER).scalar_one())

    def add(self, session: Session) -> None:
        """Store a new session."""
        self._connection.execute(_ADD_SESSION, _columns(session))

    def get(self, session_id: str) -> Session | None:
        """The session, or None."""
        row = self._one(_GET_SESSION, this=session_id)
        return Session.model_validate(row) if row else None

    def update(self, session_id: str, **changes: Any) -> Session:
        """Change columns. Raises SessionNotFound where the session is gone."""
        values = {name: _plain(value) for name, value in changes.items()}
        row = self._one(_update_session(frozenset(values)), this=session_id, **values)
        if row is None:
            raise SessionNotFound
        return Session.model_validate(row)

    def remove(self, session_id: str) -> None:
        """Delete the session and every row that belongs to it."""
        for table in (tables.events, tables.transcript_entries, tables.usage, tables.turns, tables.sandboxes):
            self._connection.execute(table.delete().where(table.c.session_id == session_id))
        self._connection.execute(tables.sessions.delete().where(tables.sessions.c.id == session_id))

    def page(self, which: abc.SessionFilter, *, cursor: str | None, limit: int) -> abc.Page[Session]:
        """Newest first. Raises InvalidCursor."""
        number = tables.sessions.c.number
        query = sa.select(*_SESSION_COLUMNS).where(~tables.sessions.c.deleting).order_by(number.desc()).limit(limit + 1)
        if which.owner is not None:
            query = query.where(tables.sessions.c.owner == which.owner)
        if which.status is not None:
            query = query.where(tables.sessions.c.status == which.status)
        if cursor is not None:
            query = query.where(number < _number_of(cursor))
        found = [Session.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], _cursor_of(found[limit - 1].number) if more else None)

    def unsettled(self, now: datetime) -> Sequence[str]:
        """The ids of sessions that look alive, have turns queued, are being deleted, or whose time to live is over."""
        s, t = tables.sessions, tables.turns
        waiting = sa.select(t.c.session_id).where(t.c.status.in_((TurnStatus.QUEUED, TurnStatus.RUNNING)))
        query = sa.select(s.c.id).where(
            s.c.status.in_(_LIVE_SESSION) | s.c.deleting | (s.c.expires_at <= now) | s.c.id.in_(waiting)
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


@cache
def _update_session(names: frozenset[str]) -> sa.Executable:
    return _update(tables.sessions, names).where(_THIS_SESSION).returning(*_SESSION_COLUMNS)


# ------------------------------------------------------------------------------------------------------------- turns

_TURN_COLUMNS = [tables.turns.c[name] for name in Turn.model_fields]
_THIS_TURN = tables.turns.c.id == sa.bindparam("this")
_GET_TURN = sa.select(*_TURN_COLUMNS).where(_THIS_TURN)
_ADD_TURN = tables.turns.insert()
_OF_THIS_SESSION = tables.turns.c.session_id == sa.bindparam("session")
_QUEUED = (
    sa.select(*_TURN_COLUMNS)
    .where(_OF_THIS_SESSION, tables.turns.c.status == TurnStatus.QUEUED)
    .order_by(tables.turns.c.number)
)
_LIVE = (
    sa.select(*_TURN_COLUMNS)
    .where(_OF_THIS_SESSION, tables.turns.c.status.in_((TurnStatus.RUNNING, TurnStatus.WAITING)))
    .order_by(tables.turns.c.number)
    .limit(1)
)
_NEWEST_TURN = sa.select(sa.func.max(tables.turns.c.number)).where(_OF_THIS_SESSION)


class SqlTurns(_Rows, abc.TurnRows):
    """Turns."""

    def add(self, turn: Turn) -> None:
        """Store a new turn."""
        self._connection.execute(_ADD_TURN, _columns(turn))

    def get(self, turn_id: str) -> Turn | None:
        """The turn, or None."""
        row = self._one(_GET_TURN, this=turn_id)
        return Turn.model_validate(row) if row else None

    def update(self, turn_id: str, **changes: Any) -> Turn:
        """Change columns. Raises TurnNotFound."""
        values = {name: _plain(value) for name, value in changes.items()}
        row = self._one(_update_turn(frozenset(values)), this=turn_id, **values)
        if row is None:
            raise TurnNotFound
        return Turn.model_validate(row)

    def page(self, session_id: str, *, cursor: str | None, limit: int) -> abc.Page[Turn]:
        """Newest first. Raises InvalidCursor."""
        number = tables.turns.c.number
        query = sa.select(*_TURN_COLUMNS).where(tables.turns.c.session_id == session_id)
        query = query.order_by(number.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(number < _number_of(cursor))
        found = [Turn.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], _cursor_of(found[limit - 1].number) if more else None)

    def queued(self, session_id: str) -> Sequence[Turn]:
        """The turns that wait, in order."""
        return [Turn.model_validate(row) for row in self._all(_QUEUED, session=session_id)]

    def live(self, session_id: str) -> Turn | None:
        """The one turn that runs or waits for a person, or None."""
        row = self._one(_LIVE, session=session_id)
        return Turn.model_validate(row) if row else None

    def next_number(self, session_id: str) -> int:
        """The number of the session's next turn."""
        return int(self._connection.execute(_NEWEST_TURN, {"session": session_id}).scalar() or 0) + 1


@cache
def _update_turn(names: frozenset[str]) -> sa.Executable:
    return _update(tables.turns, names).where(_THIS_TURN).returning(*_TURN_COLUMNS)


# ------------------------------------------------------------------------------------------------------------ events


_NUMBER_EVENTS = (
    tables.sessions.update()
    .where(tables.sessions.c.id == sa.bindparam("this"))
    .values(last_seq=tables.sessions.c.last_seq + sa.bindparam("count"))
    .returning(tables.sessions.c.last_seq)
)
_ADD_EVENTS = tables.events.insert()


class SqlEvents(_Rows, abc.EventRows):
    """The event log. Remembers what it appended, so that the store can say so after the commit."""

    def __init__(self, connection: sa.Connection) -> None:
        super().__init__(connection)
        self.appended: list[StoredEvent] = []

    def append(self, session_id: str, events: Iterable[NewEvent]) -> list[StoredEvent]:
        """Number and store events. Raises SessionNotFound."""
        new = list(events)
        if not new:
            return []
        last = self._connection.execute(_NUMBER_EVENTS, {"this": session_id, "count": len(new)}).scalar_one_or_none()
        if last is None:
            raise SessionNotFound
        stored = [
            StoredEvent(
                session_id=session_id,
                seq=last - len(new) + i,
                turn_id=event.turn_id,
                type=event.type,
                at=event.at,
                raw_data=json.dumps(event.data, ensure_ascii=False, separators=(",", ":")),
            )
            for i, event in enumerate(new, start=1)
        ]
        rows = [
            {
                "session_id": e.session_id,
                "seq": e.seq,
                "turn_id": e.turn_id,
                "type": e.type,
                "at": e.at,
                "data": e.raw_data,
            }
            for e in stored
        ]
        self._connection.execute(_ADD_EVENTS, rows)
        self.appended.extend(stored)
        return stored

    def page(
        self, session_id: str, *, after: int, limit: int, turn_id: str | None = None, max_bytes: int | None = None
    ) -> list[StoredEvent]:
        """Events with a higher `seq` than `after`, in order; fewer than `limit` when they pass `max_bytes`."""
        e = tables.events.c
        query = sa.select(e.seq, e.turn_id, e.type, e.at, e.data).where(e.session_id == session_id, e.seq > after)
        if turn_id is not None:
            query = query.where(e.turn_id == turn_id)
        found: list[StoredEvent] = []
        size = 0
        for row in self._connection.execute(query.order_by(e.seq).limit(limit)):
            found.append(
                StoredEvent(
                    session_id=session_id, seq=row.seq, turn_id=row.turn_id, type=row.type, at=row.at, raw_data=row.data
                )
            )
            size += len(row.data)
            if max_bytes is not None and size >= max_bytes:
                break
        return found


# ------------------------------------------------------------------------------------------------------- transcripts


def _uuid_of(line: str) -> str | None:
    try:
        value = json.loads(line).get("uuid")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) and value else None


class SqlTranscripts(_Rows, abc.TranscriptRows):
    """The agent's own transcripts."""

    def append(self, session_id: str, *, subpath: str, turn_id: str | None, lines: Sequence[str]) -> None:
        """Store lines in order; one whose uuid is known already is left out."""
        t = tables.transcript_entries
        here = (t.c.session_id == session_id) & (t.c.subpath == subpath)
        uuids = {uuid for line in lines if (uuid := _uuid_of(line))}
        known: set[str | None] = set()
        for batch in _batches(sorted(uuids), _READ_BATCH):
            known.update((self._connection.execute(sa.select(t.c.uuid).where(here, t.c.uuid.in_(batch)))).scalars())
        n = int((self._connection.execute(sa.select(sa.func.max(t.c.n)).where(here))).scalar() or 0)
        rows = []
        for line in lines:
            uuid = _uuid_of(line)
            if uuid in known and uuid is not None:
                continue
            known.add(uuid)
            n += 1
            rows.append(
                {"session_id": session_id, "subpath": subpath, "n": n, "uuid": uuid, "turn_id": turn_id, "line": line}
            )
        if rows:
            self._connection.execute(t.insert(), rows)

    def subpaths(self, session_id: str) -> Sequence[str]:
        """The main transcript (empty) and the sub-agents' ones."""
        t = tables.transcript_entries.c
        query = sa.select(t.subpath).where(t.session_id == session_id).distinct().order_by(t.subpath)
        return list(self._connection.execute(query).scalars())

    def page(self, session_id: str, subpath: str, *, after: int, limit: int) -> list[tuple[int, str]]:
        """Lines after a position, in order, each with its position."""
        t = tables.transcript_entries.c
        query = sa.select(t.n, t.line).where(t.session_id == session_id, t.subpath == subpath, t.n > after)
        return [(row.n, row.line) for row in self._connection.execute(query.order_by(t.n).limit(limit))]

    def copy(self, source: str, target: str, *, up_to_turn: str | None, replace: tuple[str, str] | None) -> None:
        """Copy a session's transcripts to another, to the end of a turn, with one id in them put for another."""
        t = tables.transcript_entries
        query = sa.select(t).where(t.c.session_id == source).order_by(t.c.subpath, t.c.n)
        if up_to_turn is not None:
            wanted = sa.select(tables.turns.c.number).where(tables.turns.c.id == up_to_turn).scalar_subquery()
            later = sa.select(tables.turns.c.id).where(
                tables.turns.c.session_id == source, tables.turns.c.number > wanted
            )
            query = query.where(t.c.turn_id.is_(None) | t.c.turn_id.not_in(later))
        rows = self._all(query)
        for row in rows:
            row["session_id"], row["turn_id"] = target, None
            if replace is not None:
                row["line"] = row["line"].replace(*replace)
        if rows:
            self._connection.execute(t.insert(), rows)


def _batches(items: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


# --------------------------------------------------------------------------------------------------------- sandboxes

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
_GET_ACKED = sa.select(tables.sandboxes.c.acked).where(_THIS_SANDBOX)
_SET_ACKED = _update(tables.sandboxes, ["acked"]).where(_THIS_SANDBOX)


class SqlSandboxes(_Rows, abc.SandboxRows):
    """Sandboxes."""

    def add(self, sandbox: Sandbox) -> None:
        """Store a new sandbox."""
        self._connection.execute(tables.sandboxes.insert().values(**_columns(sandbox)))

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
        values = {name: _plain(value) for name, value in changes.items()}
        self._connection.execute(tables.sandboxes.update().where(tables.sandboxes.c.id == sandbox_id).values(**values))

    def current(self, session_id: str) -> Sandbox | None:
        """The session's newest sandbox that is not gone, or None."""
        row = self._one(_CURRENT, session=session_id)
        return Sandbox.model_validate(row) if row else None

    def not_gone(self) -> Sequence[Sandbox]:
        """Every sandbox that is not known to be gone."""
        query = sa.select(*_SANDBOX_COLUMNS).where(tables.sandboxes.c.status != SandboxStatus.GONE)
        return [Sandbox.model_validate(row) for row in self._all(query)]

    def advance(self, sandbox_id: str, n: int) -> int:
        """Say that frames up to `n` are stored. Answers the mark before; it never goes back."""
        before = self._connection.execute(_GET_ACKED, {"this": sandbox_id}).scalar_one()
        if n > before:
            self._connection.execute(_SET_ACKED, {"this": sandbox_id, "acked": n})
        return int(before)


# ------------------------------------------------------------------------------------------------ usage, idempotency


class SqlUsage(_Rows, abc.UsageRows):
    """What model requests took."""

    def add(self, record: abc.UsageRecord) -> None:
        """Store a record."""
        self._connection.execute(
            tables.usage.insert().values(
                id=record.id,
                session_id=record.session_id,
                turn_id=record.turn_id,
                model=record.model,
                cost_usd=record.cost_usd,
                at=record.at,
                **record.usage.model_dump(),
            )
        )

    def of_turn(self, turn_id: str) -> tuple[Usage, float | None, int]:
        """The sums of a turn: tokens, cost (None where any part of it is unknown), and how many requests."""
        u = tables.usage.c
        names = list(Usage.model_fields)
        sums = [sa.func.coalesce(sa.func.sum(u[name]), 0).label(name) for name in names]
        row = (
            self._connection.execute(
                sa.select(
                    *sums,
                    sa.func.count().label("requests"),
                    sa.func.count(u.cost_usd).label("priced"),
                    sa.func.coalesce(sa.func.sum(u.cost_usd), 0.0).label("cost"),
                ).where(u.turn_id == turn_id)
            )
        ).one()
        total = Usage(**{name: int(getattr(row, name)) for name in names})
        return total, (float(row.cost) if row.priced == row.requests else None), int(row.requests)


class SqlIdempotency(_Rows, abc.IdempotencyRows):
    """Requests that may be sent twice."""

    def _this(self, principal: str, key: str) -> sa.ColumnElement[bool]:
        return (tables.idempotency.c.principal == principal) & (tables.idempotency.c.key == key)

    def reserve(self, record: abc.IdempotencyRecord) -> abc.IdempotencyRecord | None:
        """Store the record, unless one with its principal and key is there: then answer that one."""
        row = self._one(sa.select(tables.idempotency).where(self._this(record.principal, record.key)))
        if row is not None:
            return abc.IdempotencyRecord(**row)
        self._connection.execute(tables.idempotency.insert().values(**vars(record)))
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
