"""PostgreSQL's SQL with SQLite's latitude: the same values go in and come out of either engine.

PostgreSQL has no text with U+0000 in it, and it holds columns to a length that SQLite does not care about. A title may
have a NUL, the name of a model may be long: what the one engine keeps, the other keeps too. So columns of text have no
bound here, and a NUL is written in two characters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.dialects.postgresql.base import PGTypeCompiler
from sqlalchemy.engine import Dialect

__all__ = ["DRIVER", "escape", "unescape"]

DRIVER = "postgresql+carrel"

_NUL, _MARK = "\x00", "\x10"
_NUL_WRITTEN, _MARK_WRITTEN = _MARK + "0", _MARK + "1"


def escape(text: str) -> str:
    """The text as PostgreSQL can keep it. JSON and most other text has neither character, and stays as it is."""
    if _NUL not in text and _MARK not in text:
        return text
    return text.replace(_MARK, _MARK_WRITTEN).replace(_NUL, _NUL_WRITTEN)


def unescape(text: str) -> str:
    """What `escape` was given."""
    if _MARK not in text:
        return text
    return text.replace(_NUL_WRITTEN, _NUL).replace(_MARK_WRITTEN, _MARK)


class _String(sa.String):
    render_bind_cast = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Escapes what is stored, and what it is compared with."""
        return lambda value: escape(value) if isinstance(value, str) else value

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Gives back what was stored."""
        return lambda value: unescape(value) if isinstance(value, str) else value


class _TypeCompiler(PGTypeCompiler):
    def visit_VARCHAR(self, type_: Any, **options: Any) -> str:
        """Text of any length."""
        return "TEXT"


class PostgresDialect(PGDialect_asyncpg):
    """The one that `postgresql+carrel://` names."""

    driver = "carrel"
    supports_statement_cache = True
    type_compiler_cls = _TypeCompiler
    colspecs = {**PGDialect_asyncpg.colspecs, sa.String: _String}


registry.register("postgresql.carrel", __name__, "PostgresDialect")
