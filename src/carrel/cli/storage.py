"""Which store the settings name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from carrel import abc
from carrel.errors import InvalidSettings
from carrel.protocol.events import StoredEvent
from carrel.settings import Settings
from carrel.store import SqliteStore

__all__ = ["open_store", "postgres_url", "sqlite_path"]


def postgres_url(settings: Settings) -> str | None:
    """The address of the PostgreSQL database, or None where rows are in SQLite.

    Raises:
        InvalidSettings: the address is of another kind of database, or what it needs is not installed.
    """
    if settings.database.url is None or settings.memory:
        return None
    url = settings.database.url.get_secret_value()
    try:
        import asyncpg  # type: ignore[import-untyped]  # noqa: F401

        from carrel.store.postgres import is_postgres
    except ImportError as error:
        raise InvalidSettings("database.url: install carrel[postgres] to use PostgreSQL.") from error
    if not is_postgres(url):
        raise InvalidSettings("database.url: must begin with postgresql://; without it, rows are in SQLite.")
    return url


def sqlite_path(settings: Settings) -> Path | None:
    """The SQLite database's file, where rows are in SQLite; None: in memory."""
    return None if settings.memory else settings.database.path or settings.data / "carrel.db"


def open_store(settings: Settings, on_commit: Callable[[list[StoredEvent]], None] = lambda events: None) -> abc.Store:
    """The store, not started yet.

    Raises:
        InvalidSettings: as `postgres_url`.
    """
    url = postgres_url(settings)
    if url is None:
        return SqliteStore(sqlite_path(settings), durability=settings.durability, on_commit=on_commit)
    from carrel.store.postgres import PostgresStore

    return PostgresStore(
        url,
        pool_size=settings.database.pool_size,
        statement_timeout_seconds=settings.database.statement_timeout_seconds,
        outage_seconds=settings.database.outage_seconds,
        on_commit=on_commit,
    )
