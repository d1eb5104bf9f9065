"""Brings a database's schema up to date."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from carrel.errors import MigrationRequired

HEAD = "0001"
"""The newest revision that this release knows; a test holds it against the migrations."""

_MIGRATIONS = Path(__file__).with_name("migrations")


def migrate(connection: sa.Connection) -> None:
    """Run the migrations that this database has not seen.

    Raises:
        MigrationRequired: a newer release of Carrel made it.
    """
    current = _current(connection)
    if current == HEAD:
        return
    # Only now: importing Alembic costs half a second, and most starts have nothing to migrate.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise MigrationRequired(operator_detail=f"revision {current}")
    command.upgrade(config, "head")


def _current(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
