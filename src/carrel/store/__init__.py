"""Rows in SQL."""

from carrel.store.sqlite import SqliteStore

__all__ = ["SqliteStore"]
