"""Sessions of a claude-agent-http, as its database and its Claude Code have kept them, made sessions of ours."""

from __future__ import annotations

import sqlite3
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from carrel import abc
from carrel.api.dialects import claude_agent_http
from carrel.cli.data_folder import lock_data_folder
from carrel.cli.foreign_transcripts import ForeignTranscripts
from carrel.cli.output import one_line
from carrel.cli.storage import open_store, sqlite_path
from carrel.errors import InvalidSettings, OperatorError
from carrel.model import Budget, User, Workspace, utc_now
from carrel.protocol.spec import CreateSession, SessionSpec
from carrel.sessions.imports import ImportedSession, add_imported
from carrel.settings import Settings

__all__ = ["Importer"]

Row = Mapping[str, Any]

_POSTGRES = ("postgres://", "postgresql://", "postgresql+asyncpg://")
_JSON_COLUMNS = ("mcp_servers", "plugins", "allowed_tools", "disallowed_tools", "add_dirs", "metadata")
_WHOLE = TypeAdapter(int)
_MOMENT = TypeAdapter(datetime)


class Rubbish(ValueError):
    """A row that cannot become a session; the message says why."""


@dataclass(frozen=True)
class _Made:
    """What one row has become."""

    session: ImportedSession
    notes: Sequence[str]
    directory: Path


class Importer:
    """Brings rows in, and says what it does."""

    def __init__(self, settings: Settings, base_dir: Path | None, claude_dir: Path) -> None:
        self._settings = settings
        self._our_users_dir = settings.users.base_dir or settings.data / "users"
        self._users_dir = base_dir or self._our_users_dir
        self._transcripts = ForeignTranscripts(claude_dir)

    async def run(self, source: str, *, dry_run: bool) -> None:
        """Bring in every row of the source, and print what became of each.

        Args:
            source: the path of an SQLite file, or the URL of a PostgreSQL database.
            dry_run: whether it is only said what would be done.

        Raises:
            OperatorError: the source cannot be read, or a server runs on the data folder.
        """
        if self._settings.memory:
            raise InvalidSettings("memory: what is brought into a database in memory would be gone at once.")
        rows = await _rows(source)
        counts: Counter[str] = Counter()
        missing: list[Path] = []
        async with AsyncExitStack() as stack:
            store = await self._open(stack, dry_run=dry_run)
            for row in rows:
                name = one_line(str(row.get("session_id")))
                try:
                    made = self._session(row)
                except Rubbish as problem:
                    counts["skipped"] += 1
                    print(f"{name}: skipped: {one_line(str(problem))}")
                    continue
                if not await _add(store, made.session, dry_run=dry_run):
                    counts["there"] += 1
                    print(f"{name}: already here")
                    continue
                counts["brought"] += 1
                counts["conversations"] += bool(made.session.transcripts)
                if not made.directory.is_dir():
                    missing.append(made.directory)
                print(f"{name}: {_told(made)}")
        self._sum_up(counts, missing, dry_run=dry_run)

    async def _open(self, stack: AsyncExitStack, *, dry_run: bool) -> abc.Store | None:
        """Our store; None where there is none yet, and none is to be made."""
        path = sqlite_path(self._settings)
        new = self._settings.database.url is None and path is not None and not path.exists()
        if dry_run and new:
            return None
        lock_data_folder(self._settings.data, stack)
        store = open_store(self._settings, on_commit=lambda events: None)
        await store.start(stack)
        return store

    def _sum_up(self, counts: Counter[str], missing: Sequence[Path], *, dry_run: bool) -> None:
        would = "would be brought in" if dry_run else "brought in"
        print(
            f"{counts['brought']} {would} ({counts['conversations']} with their conversation), "
            f"{counts['there']} already here, {counts['skipped']} skipped"
        )
        if missing:
            print(f"{len(missing)} of their directories are not there, such as {missing[0]}.")
        if self._users_dir != self._our_users_dir:
            print(
                f"Set users.base_dir to {self._users_dir}, or copy the directories to {self._our_users_dir}: "
                "sessions look for their files there."
            )

    def _session(self, row: Row) -> _Made:
        """What a row says. Raises Rubbish."""
        foreign_id, session_id = _ids(row)
        owner = str(row.get("user_id") or "")
        values = {name: _decoded(row, name) for name in _JSON_COLUMNS}
        try:
            User(id=owner, created_at=utc_now())
            workspace = Workspace(type="user", subdir=(row.get("subdir") or "").strip("/") or None)
            spec = _spec(row, values)
            metadata = dict(values["metadata"] or {})
            if foreign_id != session_id:
                metadata["claude_agent_http_id"] = foreign_id
            CreateSession(metadata=metadata)
            limit = row.get("max_budget_usd")
            budget = None if limit is None else Budget(max_usd=limit)
            turn_count = max(0, _WHOLE.validate_python(row.get("message_count") or 0))
            created = _moment(row, "created_at")
            active = _moment(row, "last_active_at")
        except ValidationError as error:
            first = error.errors()[0]
            raise Rubbish(f"{'.'.join(str(part) for part in first['loc']) or error.title}: {first['msg']}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise Rubbish(str(error)) from error
        directory = self._users_dir / owner / (workspace.subdir or "")
        found = self._transcripts.read(foreign_id, str(row.get("cwd") or directory), session_id)
        notes = [f"{name} is not taken over" for name in ("plugins", "add_dirs") if values[name]]
        if found.broken:
            notes.append(f"{found.broken} lines of its transcript are broken")
        session = ImportedSession(
            id=session_id,
            owner=owner,
            spec=spec,
            workspace=workspace,
            metadata=metadata,
            budget=budget,
            turn_count=turn_count,
            created_at=created,
            last_active_at=active,
            ttl_seconds=self._ttl_seconds(),
            transcripts=found.transcripts,
        )
        return _Made(session, notes, directory)

    def _ttl_seconds(self) -> int | None:
        chosen = self._settings.defaults.ttl_seconds
        return claude_agent_http.DEFAULT_TTL_SECONDS if chosen is None else chosen or None


async def _add(store: abc.Store | None, session: ImportedSession, *, dry_run: bool) -> bool:
    """Whether the session is, or would be, brought in."""
    if store is None:
        return True
    if dry_run:
        return await store.read(lambda tx: tx.sessions.get(session.id) is None)
    return await store.write(lambda tx: add_imported(tx, session, utc_now()))


def _ids(row: Row) -> tuple[str, str]:
    """The row's id, and ours: the same where it is a UUID, and always the same one of it where it is not."""
    foreign = row.get("session_id")
    if not isinstance(foreign, str) or not foreign.strip():
        raise Rubbish("it has no session_id")
    try:
        return foreign, str(uuid.UUID(foreign))
    except ValueError:
        return foreign, str(uuid.uuid5(uuid.NAMESPACE_URL, f"claude-agent-http:{foreign}"))


def _decoded(row: Row, name: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str | bytes):
        return value
    try:
        return from_json(value) if value.strip() else None
    except ValueError as error:
        raise Rubbish(f"{name} is not JSON") from error


def _spec(row: Row, values: Mapping[str, Any]) -> SessionSpec:
    asked = {name: row.get(name) for name in ("system_prompt", "model", "permission_mode", "max_turns")}
    asked |= {name: values[name] for name in ("mcp_servers", "allowed_tools", "disallowed_tools")}
    given = {name: value for name, value in asked.items() if value not in (None, "", [], {})}
    sources = claude_agent_http.DEFAULT_SPEC["setting_sources"]
    return SessionSpec.model_validate({"setting_sources": sources} | given)


def _moment(row: Row, name: str) -> datetime:
    """The old service wrote its host's local time, without a zone."""
    return _MOMENT.validate_python(row.get(name)).astimezone()


def _told(made: _Made) -> str:
    session = made.session
    lines = sum(len(lines) for _, lines in session.transcripts)
    where = "/".join(filter(None, [session.owner, session.workspace.subdir]))
    what = f"a conversation of {lines} lines" if lines else "no conversation found"
    return "; ".join([f"{where}, {session.turn_count} messages, {what}", *made.notes])


# ------------------------------------------------------------------------------------------------------- their rows


async def _rows(source: str) -> list[Row]:
    """Every row of their table, oldest first.

    Raises:
        OperatorError: the source cannot be read, or has no such table.
    """
    rows = await _postgres_rows(source) if source.startswith(_POSTGRES) else _sqlite_rows(Path(source))
    return sorted(rows, key=lambda row: str(row.get("created_at") or ""))


def _sqlite_rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise OperatorError(f"There is no file {path}.")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM sessions")]
    except sqlite3.Error as error:
        raise OperatorError(f"{path} is not a database of claude-agent-http: {error}.") from error


async def _postgres_rows(url: str) -> list[Row]:
    import asyncpg  # type: ignore[import-untyped]

    try:
        connection = await asyncpg.connect(url.replace("postgresql+asyncpg://", "postgresql://"), timeout=15)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        # The URL has a password in it, and some of these errors quote it.
        raise OperatorError(f"The database cannot be reached: {type(error).__name__}.") from error
    try:
        return [dict(record) for record in await connection.fetch("SELECT * FROM sessions")]
    except asyncpg.PostgresError as error:
        raise OperatorError(f"This is not a database of claude-agent-http: {error}.") from error
    finally:
        await connection.close()
