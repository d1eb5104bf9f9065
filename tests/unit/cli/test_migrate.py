"""`carrel migrate`: the revision before and after, on either engine; `--check` only tells."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from carrel.cli.app import run
from carrel.store import schema

GOLDEN = Path(__file__).parents[2] / "golden" / "store" / "0001.db.sql"


def old_database(data: Path) -> None:
    data.mkdir()
    connection = sqlite3.connect(data / "carrel.db")
    connection.executescript(GOLDEN.read_text())
    connection.close()


def test_an_old_database_is_brought_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_database(tmp_path / "data")
    told = ["--data", str(tmp_path / "data")]
    before = (tmp_path / "data" / "carrel.db").read_bytes()
    assert run(["migrate", *told, "--check"]) == 1
    assert capsys.readouterr().out == f"revision 0001, this release has {schema.HEAD}\n"
    assert (tmp_path / "data" / "carrel.db").read_bytes() == before
    assert run(["migrate", *told]) == 0
    assert capsys.readouterr().out == f"revision 0001 before, {schema.HEAD} now\n"
    assert run(["migrate", *told]) == 0
    assert capsys.readouterr().out == f"revision {schema.HEAD} before, {schema.HEAD} now\n"
    assert run(["migrate", *told, "--check"]) == 0


def test_a_newer_database_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_database(tmp_path / "data")
    connection = sqlite3.connect(tmp_path / "data" / "carrel.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    for more in ([], ["--check"]):
        assert run(["migrate", "--data", str(tmp_path / "data"), *more]) == 2
        assert "newer release" in capsys.readouterr().err


def test_without_a_database_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migrate", "--data", str(tmp_path / "data")]) == 2
    assert "no database" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
@pytest.mark.requires("postgres")
def test_postgres_is_brought_up_to_date(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    postgres: Callable[[], str],
) -> None:
    from carrel.store.postgres import prepare

    url = postgres()
    monkeypatch.setenv("CARREL_DATABASE__URL", url)
    told = ["--data", str(tmp_path / "data")]
    assert run(["migrate", *told, "--check"]) == 1
    assert capsys.readouterr().out == f"revision none, this release has {schema.HEAD}\n"
    asyncio.run(prepare(url, lambda connection: schema.make_at(connection, "0001")))
    assert run(["migrate", *told, "--check"]) == 1
    assert run(["migrate", *told]) == 0
    assert capsys.readouterr().out.endswith(f"revision 0001 before, {schema.HEAD} now\n")
    assert run(["migrate", *told, "--check"]) == 0

    def future(connection: sa.Connection) -> None:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))

    asyncio.run(prepare(url, future))
    assert run(["migrate", *told]) == 2


@pytest.mark.slow
@pytest.mark.requires("postgres")
def test_a_database_that_is_away_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARREL_DATABASE__URL", "postgresql:///x?host=/nowhere/at/all")
    for command in (["migrate"], ["backup", str(tmp_path / "x.tar.gz")]):
        (tmp_path / "data").mkdir(exist_ok=True)
        assert run([*command, "--data", str(tmp_path / "data")]) == 2
        assert "cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "x.tar.gz").exists()


def test_another_kind_of_database_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARREL_DATABASE__URL", "mysql://secret@h/d")
    assert run(["migrate", "--data", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert "postgresql://" in said
    assert "secret" not in said
