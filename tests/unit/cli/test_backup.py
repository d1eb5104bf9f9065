"""`carrel backup` and `carrel restore` over rows and files made here; with a server and agents, see the integration tests."""

import asyncio
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from carrel import abc
from carrel.cli.app import run
from carrel.model import SandboxStatus, TurnStatus
from carrel.store import SqliteStore
from carrel.testing.conformance.store import (
    NOW,
    add_session,
    new_event,
    new_key,
    new_sandbox,
    new_turn,
)

ENGINES = ["sqlite", pytest.param("postgres", marks=[pytest.mark.requires("postgres"), pytest.mark.slow])]


def store_of(url: str | None, data: Path) -> abc.Store:
    if url is None:
        return SqliteStore(data / "carrel.db")
    from carrel.store.postgres import PostgresStore

    return PostgresStore(url)


def within(store: abc.Store, work: Callable[[abc.Store], Any]) -> Any:
    async def main() -> Any:
        async with AsyncExitStack() as stack:
            await store.start(stack)
            return await work(store)

    return asyncio.run(main())


async def fill(store: abc.Store) -> None:
    """A row in every table, with texts that are hard to keep."""
    session = await add_session(store, title="a\x00b\x10 é", metadata={"ключ": ["𝄞", None, "\x00"]})

    def work(tx: abc.Transaction) -> None:
        tx.turns.add(new_turn(session, 1, TurnStatus.RUNNING, started_at=NOW))
        tx.sandboxes.add(new_sandbox(session, 1, SandboxStatus.LIVE))
        tx.events.append(session.id, [new_event("said\x00"), new_event("é" * 1000)])
        tx.transcripts.append(session.id, subpath="", turn_id=None, lines=['{"uuid":"u"}', "raw \x00\x10 line"])
        tx.users.ensure("alice", NOW)
        tx.keys.add(new_key("alice"))
        record = abc.AuditRecord(
            id="a",
            at=NOW,
            principal="p",
            user_id=None,
            action="x",
            object_type=None,
            object_id=None,
            address=None,
            request_id=None,
            outcome=200,
            details={"n": 1.5},
        )
        tx.audit.add([record])

    await store.write(work)


async def told(store: abc.Store) -> dict[str, Any]:
    def work(tx: abc.Transaction) -> dict[str, Any]:
        session = tx.sessions.page(abc.SessionFilter(), cursor=None, limit=9).items[0]
        return {
            "session": session,
            "turns": tx.turns.page(session.id, cursor=None, limit=9).items,
            "events": [(e.seq, e.at, e.data) for e in tx.events.page(session.id, after=0, limit=9)],
            "lines": tx.transcripts.page(session.id, "", after=0, limit=9),
            "users": tx.users.page(cursor=None, limit=9).items,
            "keys": [key.model_dump() for key in tx.keys.page(None, cursor=None, limit=9).items],
            "audit": tx.audit.page(abc.AuditFilter(), cursor=None, limit=9).items,
        }

    found: dict[str, Any] = await store.read(work)
    return found


def make_files(data: Path) -> None:
    (data / "admin.key").write_text("the-key")
    (data / "admin.key").chmod(0o600)
    (data / "config.yaml").write_text("port: 0\n")
    (data / "server.json").write_text("{}")
    workspace = data / "sessions" / "s" / "workspace"
    workspace.mkdir(parents=True)
    (workspace / "file").write_text("content")
    (workspace / "out").symlink_to("/etc/passwd")
    (data / "users" / "alice" / "notes").mkdir(parents=True)
    (data / "users" / "alice" / "notes" / "one").write_text("hers")
    for name in ("workspaces/w/files", "objects/snapshots/s"):
        (data / name).mkdir(parents=True)
        (data / name / "kept").write_text(name)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("source", ENGINES)
def test_all_comes_back_on_either_engine(
    source: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from_url, to_url = (
        request.getfixturevalue("postgres")() if engine == "postgres" else None for engine in (source, target)
    )
    data, back, path = tmp_path / "data", tmp_path / "back", tmp_path / "backup.tar.gz"
    data.mkdir()
    make_files(data)
    within(store_of(from_url, data), fill)
    before = within(store_of(from_url, data), told)
    if from_url:
        monkeypatch.setenv("CARREL_DATABASE__URL", from_url)
    assert run(["backup", str(path), "--data", str(data)]) == 0
    monkeypatch.delenv("CARREL_DATABASE__URL", raising=False)
    assert run(["backup", "--verify", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    named = ["--database-url", to_url] if to_url else []
    assert run(["restore", str(path), "--data", str(back), *named]) == 0
    assert within(store_of(to_url, back), told) == before
    assert within(store_of(to_url, back), _sandboxes) == []
    assert within(store_of(to_url, back), lambda s: s.write(lambda tx: tx.sessions.next_number())) == 2
    assert (back / "admin.key").read_text() == "the-key"
    assert (back / "sessions" / "s" / "workspace" / "file").read_text() == "content"
    assert os.readlink(back / "sessions" / "s" / "workspace" / "out") == "/etc/passwd"
    assert (back / "users" / "alice" / "notes" / "one").read_text() == "hers"
    for name in ("workspaces/w/files", "objects/snapshots/s"):
        assert (back / name / "kept").read_text() == name
    assert not (back / "server.json").exists()
    assert [stat.S_IMODE(p.stat().st_mode) for p in (back, back / "admin.key")] == [0o700, 0o600]
    assert (back / "carrel.db").exists() is (to_url is None)
    assert not list(back.glob("rows.*"))
    # Once more, into the database that has rows now: refused, and no folder is made.
    if to_url:
        assert run(["restore", str(path), "--data", str(tmp_path / "again"), *named]) == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "backup.tar.gz", "data"]


async def _sandboxes(store: abc.Store) -> list[Any]:
    """None is taken over: it may be alive still, and another server's."""
    return list(await store.read(lambda tx: tx.sandboxes.not_gone()))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    data = tmp_path / "source"
    data.mkdir()
    make_files(data)
    within(SqliteStore(data / "carrel.db"), fill)
    path = tmp_path / "backup.tar.gz"
    assert run(["backup", str(path), "--data", str(data)]) == 0
    return path


def test_nothing_is_overwritten(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_text("kept")
    assert run(["restore", str(archive), "--data", str(target)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["kept"]
    link = tmp_path / "link"
    link.symlink_to(target)
    assert run(["restore", str(archive), "--data", str(link)]) == 2
    assert run(["backup", str(archive), "--data", str(tmp_path / "source")]) == 2


def test_a_folder_in_use_is_refused(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(["restore", str(archive), "--data", str(target)]) == 2
    assert "Another server" in capsys.readouterr().err


def test_an_empty_folder_is_filled_and_users_go_where_they_are_told(archive: Path, tmp_path: Path) -> None:
    target, users = tmp_path / "target", tmp_path / "elsewhere" / "users"
    target.mkdir()
    assert run(["restore", str(archive), "--data", str(target), "--users", str(users)]) == 0
    assert (users / "alice" / "notes" / "one").read_text() == "hers"
    assert not (target / "users").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_archive_is_refused_and_nothing_written(archive: Path, tmp_path: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    assert run(["backup", "--verify", str(archive)]) == 2
    assert run(["restore", str(archive), "--data", str(tmp_path / "target")]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_users_directories_are_found_where_the_settings_say(tmp_path: Path) -> None:
    data, users = tmp_path / "data", tmp_path / "people"
    (users / "bob").mkdir(parents=True)
    (users / "bob" / "file").write_text("his")
    data.mkdir()
    (data / "config.yaml").write_text(f"users: {{base_dir: {users}}}\n")
    within(SqliteStore(data / "carrel.db"), fill)
    path = tmp_path / "b.tar.gz"
    assert run(["backup", str(path), "--data", str(data)]) == 0
    assert run(["restore", str(path), "--data", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "users" / "bob" / "file").read_text() == "his"


def test_objects_are_found_where_the_settings_say_and_left_out_where_a_server_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, objects = tmp_path / "data", tmp_path / "elsewhere"
    objects.mkdir()
    (objects / "one").write_text("kept")
    data.mkdir()
    within(SqliteStore(data / "carrel.db"), fill)
    (data / "config.yaml").write_text(f"objects: {{path: {objects}}}\n")
    assert run(["backup", str(tmp_path / "a.tar.gz"), "--data", str(data)]) == 0
    assert run(["restore", str(tmp_path / "a.tar.gz"), "--data", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/objects/one").read_text() == "kept"
    assert "see what objects.path says" in capsys.readouterr().out
    (data / "config.yaml").write_text("objects: {kind: s3, bucket: b, access_key: mine, secret_key: mine-too}\n")
    assert run(["backup", str(tmp_path / "b.tar.gz"), "--data", str(data)]) == 0
    assert run(["restore", str(tmp_path / "b.tar.gz"), "--data", str(tmp_path / "again")]) == 0
    assert not (tmp_path / "again/objects").exists()


def test_a_database_of_another_name_goes_where_the_settings_say(tmp_path: Path) -> None:
    data, rows = tmp_path / "data", tmp_path / "rows" / "mine.db"
    data.mkdir()
    rows.parent.mkdir()
    (data / "config.yaml").write_text(f"database: {{path: {rows}}}\n")
    within(SqliteStore(rows), fill)
    before = within(SqliteStore(rows), told)
    path = tmp_path / "b.tar.gz"
    assert run(["backup", str(path), "--data", str(data)]) == 0
    assert run(["restore", str(path), "--data", str(tmp_path / "back")]) == 2
    assert not (tmp_path / "back").exists()
    rows.unlink()
    assert run(["restore", str(path), "--data", str(tmp_path / "back")]) == 0
    assert within(SqliteStore(rows), told) == before
    assert not (tmp_path / "back" / "carrel.db").exists()


def test_where_there_is_nothing_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b.tar.gz"
    assert run(["backup", str(target), "--data", str(tmp_path / "no")]) == 2
    (tmp_path / "empty").mkdir()
    assert run(["backup", str(target), "--data", str(tmp_path / "empty")]) == 2
    monkeypatch.setenv("CARREL_MEMORY", "true")
    assert run(["backup", str(target), "--data", str(tmp_path / "empty")]) == 2
    assert run(["restore", str(target), "--data", str(tmp_path / "new")]) == 2
    assert run(["restore", str(target)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
