"""Brings a database's schema up to date: a new one is made whole, an older one is migrated."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from carrel.errors import MigrationRequired
from carrel.store import tables

HEAD = "0001"
"""The newest revision that this release knows; a test holds it, and the tables, against the migrations."""

_MIGRATIONS = Path(__file__).with_name("migrations")


def bring_up_to_date(connection: sa.Connection) -> None:
    """Make the schema of a new database, or run the migrations that an older one has not seen.

    Raises:
        MigrationRequired: a newer release of Carrel made it.
    """
    inspector = sa.inspect(connection)
    if not inspector.has_table("alembic_version"):
        _make(connection)
        return
    if connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none() != HEAD:
        migrate(connection)


def _make(connection: sa.Connection) -> None:
    """All at once, and without Alembic: importing that takes half a second of a first start."""
    tables.metadata.create_all(connection)
    connection.execute(tables.counters.insert().values(name="session", value=0))
    connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
    connection.execute(sa.text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


def migrate(connection: sa.Connection) -> None:
    """Run every migration that the database has not seen.

    Raises:
        MigrationRequired: a newer release of Carrel made it.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise MigrationRequired(operator_detail=f"revision {current}")
    command.upgrade(config, "head")
