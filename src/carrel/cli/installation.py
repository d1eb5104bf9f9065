"""Everything of an installation, into an archive and out of one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import sqlalchemy as sa

from carrel import __version__
from carrel.cli.archive import ArchiveWriter, Manifest, extract, verify
from carrel.cli.storage import postgres_url, sqlite_path
from carrel.errors import BackupInvalid, DataFolderInUse, InvalidSettings, OperatorError, TargetNotEmpty
from carrel.model import utc_now
from carrel.settings import Settings, load_settings
from carrel.store import dump, schema

__all__ = ["check", "load", "save"]

T = TypeVar("T")

_DATABASE = "carrel.db"
_OWN_FILES = ("admin.key", "config.yaml", ".env")
_TREES = ("sessions", "users", "workspaces", "environments", "objects")


def save(settings: Settings, target: Path) -> tuple[Manifest, list[str]]:
    """Write an archive; a server may run meanwhile. Answers what is in it, and what could not be put there.

    Raises:
        TargetNotEmpty: there is a file of that name.
        OperatorError: there is nothing to back up, or the database is damaged or away.
    """
    if settings.memory:
        raise InvalidSettings("memory is set: there is no database that could be backed up.")
    if not settings.data.is_dir():
        raise OperatorError(f"There is no data folder {settings.data}.")
    users = settings.users.base_dir or settings.data / "users"
    facts = {"version": __version__, "made_at": utc_now().isoformat(), "users_base_dir": str(users)}
    if settings.objects.path is not None:
        facts["objects_path"] = str(settings.objects.path)
    with ArchiveWriter.create(target, facts) as archive:
        # Rows first: files may then be newer than what is said of them, and never older.
        _add_rows(archive, settings)
        for name in _OWN_FILES:
            archive.add_path(name, settings.data / name)
        archive.add_tree("sessions", settings.data / "sessions")
        archive.add_tree("users", users)
        archive.add_tree("workspaces", settings.data / "workspaces")
        archive.add_tree("environments", settings.data / "environments")
        if settings.objects.kind == "disk":
            archive.add_tree("objects", settings.objects.path or settings.data / "objects")
    return archive.manifest, archive.skipped


def check(path: Path) -> Manifest:
    """Read an archive from end to end. Answers what is in it.

    Raises:
        BackupInvalid: it is damaged, or no backup of Carrel's.
    """
    with _opened(path) as file:
        manifest = verify(file)
    _check_facts(manifest)
    return manifest


def load(path: Path, folder: Path, *, users: Path | None = None, database_url: str | None = None) -> Manifest:
    """Make a data folder of an archive. All of it is verified before anything is written.

    Args:
        path: the archive.
        folder: the data folder; must be new, or empty.
        users: where users' directories go; None: into the data folder.
        database_url: an empty PostgreSQL database; None: what the settings in the archive and the environment say.

    Raises:
        BackupInvalid: it is damaged, or no backup of Carrel's.
        TargetNotEmpty: something is there already.
        DataFolderInUse: a server runs there.
    """
    with _opened(path) as file:
        manifest = verify(file)
        _check_facts(manifest)
        for place in filter(None, (folder, users)):
            _must_be_free(place)
        staging = _staging_beside(folder)
        try:
            extract(file, manifest, lambda name: _place(name, staging))
            settings = _settings_of(staging, folder, database_url)
            elsewhere = settings.database.path if postgres_url(settings) is None else None
            if elsewhere is not None and os.path.lexists(elsewhere):
                raise TargetNotEmpty(f"{elsewhere}, which database.path names, is there already.")
            _restore_rows(staging, manifest, settings)
            if elsewhere is not None:
                _move(staging / _DATABASE, elsewhere)
            if users is not None and (staging / "users").exists():
                _move(staging / "users", users)
            _move(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return manifest


# ---------------------------------------------------------------------------------------------------------- the rows


def _add_rows(archive: ArchiveWriter, settings: Settings) -> None:
    with tempfile.TemporaryDirectory(prefix="carrel-backup-") as name:
        folder = Path(name)
        url = postgres_url(settings)
        if url is None:
            archive.manifest.facts |= {
                "engine": "sqlite",
                "revision": _copy_sqlite(sqlite_path(settings), folder / _DATABASE),
            }
            archive.add_path(_DATABASE, folder / _DATABASE)
            return
        from carrel.store.postgres import snapshot

        def write(connection: sa.Connection) -> str:
            return dump.write_dump(connection, lambda table: (folder / _rows_name(table)).open("wb"))

        archive.manifest.facts |= {"engine": "postgresql", "revision": asyncio.run(snapshot(url, write))}
        for table in dump.table_names():
            archive.add_path(_rows_name(table), folder / _rows_name(table))


def _copy_sqlite(path: Path | None, copy: Path) -> str | None:
    """A copy of one moment, by SQLite's own means; a server that writes meanwhile is not held up. Answers the revision."""
    if path is None or not path.is_file():
        raise OperatorError(f"There is no database {path}.")
    with (
        closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
        # One file, with nothing beside it.
        target.execute("PRAGMA journal_mode=DELETE")
        if (said := target.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            raise OperatorError("The database is damaged, so it was not backed up.", operator_detail=str(said)[:500])
    return _in_sqlite(copy, schema.revision_of)


def _in_sqlite(path: Path, work: Callable[[sa.Connection], T]) -> T:
    engine = sa.create_engine(f"sqlite:///{path}")
    try:
        with engine.begin() as connection:
            return work(connection)
    finally:
        engine.dispose()


def _restore_rows(staging: Path, manifest: Manifest, settings: Settings) -> None:
    url = postgres_url(settings)
    from_sqlite = manifest.facts["engine"] == "sqlite"
    kept = staging / _DATABASE
    if from_sqlite:
        _in_sqlite(kept, dump.settle)
        if url is None:
            return
    revision = schema.HEAD if from_sqlite else manifest.facts["revision"]

    def load(connection: sa.Connection, source: sa.Connection | None = None) -> None:
        def rows(table: str) -> Iterable[dict[str, Any]]:
            return dump.rows_of(source, table) if source is not None else _lines(staging, table)

        dump.load(connection, revision, rows)

    if url is None:
        _in_sqlite(kept, load)
    else:
        from carrel.store.postgres import prepare_or_say

        target = url
        if from_sqlite:
            _in_sqlite(
                kept, lambda source: asyncio.run(prepare_or_say(target, lambda connection: load(connection, source)))
            )
            kept.unlink()
        else:
            asyncio.run(prepare_or_say(target, load))
    for table in dump.table_names():
        (staging / _rows_name(table)).unlink(missing_ok=True)


def _lines(staging: Path, table: str) -> Iterator[dict[str, Any]]:
    try:
        with (staging / _rows_name(table)).open("rb") as file:
            yield from dump.lines_of(table, file)
    except FileNotFoundError:  # a table that came after the backup
        return


def _rows_name(table: str) -> str:
    return f"rows.{table}.jsonl"


# --------------------------------------------------------------------------------------------------------- the places


def _place(name: str, staging: Path) -> Path | None:
    """Where a member goes. Raises BackupInvalid for what no backup of ours has."""
    first = name.split("/")[0]
    top = {_DATABASE, *_OWN_FILES, *_TREES, *(_rows_name(table) for table in dump.table_names())}
    if first not in top or (first not in _TREES and first != name):
        raise BackupInvalid(operator_detail=f"{name!r} has no place in a data folder")
    return staging / name


def _check_facts(manifest: Manifest) -> None:
    facts = manifest.facts
    if facts.get("engine") not in ("sqlite", "postgresql") or not isinstance(facts.get("revision"), str):
        raise BackupInvalid(operator_detail="the manifest does not say what database it has")
    if not schema.knows(facts["revision"]):
        raise BackupInvalid(
            f"The backup was made by a newer release of Carrel ({facts.get('version')}); restore it with that one."
        )


def _must_be_free(folder: Path) -> None:
    """Raises TargetNotEmpty, or DataFolderInUse where a server runs on it."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise TargetNotEmpty(f"{folder} is not a folder.")
    with contextlib.suppress(FileNotFoundError), (folder / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataFolderInUse(operator_detail=str(folder)) from error
    if any(folder.iterdir()):
        raise TargetNotEmpty(f"{folder} is not empty, and nothing is overwritten; name a new folder.")


def _staging_beside(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.restoring-", dir=folder.parent))


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        target.rmdir()
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def _settings_of(staging: Path, folder: Path, database_url: str | None) -> Settings:
    """The settings that a server on the restored folder will have."""
    config = staging / "config.yaml"
    database = {"url": database_url} if database_url is not None else None
    return load_settings(config if config.is_file() else None, {"data": folder, "database": database})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise OperatorError(f"There is no file {path}.") from error
    with file:
        yield file
