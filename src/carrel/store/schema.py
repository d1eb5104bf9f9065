"""Brings a database's schema up to date: a new one is made whole, an older one is migrated."""

from __future__ import annotations

import glob
from pathlib import Path

import sqlalchemy as sa

from carrel.errors import ForeignDatabase, MigrationRequired
from carrel.store import tables

HEAD = "0012"
"""The newest revision that this release knows; a test holds it, and the tables, against the migrations."""

_MIGRATIONS = Path(__file__).with_name("migrations")


def bring_up_to_date(connection: sa.Connection) -> None:
    """Make the schema of a new database, or run the migrations that an older one has not seen.

    Raises:
        MigrationRequired: a newer release of Carrel made it.
        ForeignDatabase: it has tables, and they are not ours.
    """
    inspector = sa.inspect(connection)
    if not inspector.has_table("alembic_version"):
        if found := inspector.get_table_names():
            raise ForeignDatabase(operator_detail=", ".join(found))
        _make(connection)
        return
    if revision_of(connection) != HEAD:
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
    _upgrade(connection, "head", current=revision_of(connection))


def make_at(connection: sa.Connection, revision: str) -> None:
    """Make the schema of a new database as it was at a revision: for rows from that time.

    Raises:
        MigrationRequired: a newer release of Carrel has that revision.
    """
    if revision == HEAD:
        _make(connection)
        return
    _upgrade(connection, revision, current=revision)


def knows(revision: str) -> bool:
    """Whether this release has that revision, or comes after it."""
    return any((_MIGRATIONS / "versions").glob(f"{glob.escape(revision)}_*.py"))


def revision_of(connection: sa.Connection) -> str | None:
    """The revision of the database's schema; None where it has none yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return found


def _upgrade(connection: sa.Connection, target: str, *, current: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise MigrationRequired(operator_detail=f"revision {current}")
    command.upgrade(config, target)
