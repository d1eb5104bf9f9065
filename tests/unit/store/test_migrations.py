"""Schemas: migrations and tables in step, old databases load, newer ones are refused.

`tests/golden/store/NNNN.db.sql` is a database as that revision made it, with a few rows, as SQL text. Never change one.
"""

import sqlite3
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import carrel.store
from carrel import abc
from carrel.errors import MigrationRequired
from carrel.model import SandboxStatus, SessionStatus, StopReason, TurnStatus, Usage
from carrel.protocol.events import EVENT_TYPES
from carrel.store import SqliteStore, schema, tables

GOLDEN = Path(__file__).parents[2] / "golden" / "store"
MIGRATIONS = Path(carrel.store.__file__).with_name("migrations")
SESSION = "01a00000-0000-7000-8000-000000000001"
TURN = "01a00000-0000-7000-8000-000000000002"
SANDBOX = "01a00000-0000-7000-8000-000000000003"


async def opened(path: Path, stack: AsyncExitStack) -> SqliteStore:
    store = SqliteStore(path)
    await store.start(stack)
    return store


@pytest.mark.parametrize("way", [schema.migrate, schema.bring_up_to_date])
def test_a_new_database_and_a_migrated_one_have_the_same_tables(tmp_path: Path, way: Any) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    with engine.begin() as connection:
        way(connection)
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == [schema.HEAD]
        assert connection.execute(sa.text("SELECT name, value FROM counters")).all() == [("session", 0)]
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        found = {index for t in tables.metadata.tables for index in _indexes(connection, t)}
        assert found >= {index.name for table in tables.metadata.tables.values() for index in table.indexes}
    engine.dispose()


def _indexes(connection: sa.Connection, table: str) -> set[str | None]:
    return {index["name"] for index in sa.inspect(connection).get_indexes(table)}


def test_revisions_follow_one_line_and_each_has_a_golden_database() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert len(scripts.get_heads()) == 1
    revisions = sorted(script.revision for script in scripts.walk_revisions())
    assert [path.name for path in sorted(GOLDEN.iterdir())] == [f"{revision}.db.sql" for revision in revisions]


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.sql")), ids=lambda path: path.name)
async def test_an_old_database_loads(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path)
    connection.executescript(golden.read_text())
    connection.close()
    async with AsyncExitStack() as stack:
        store = await opened(path, stack)

        def look(tx: abc.Transaction) -> None:
            session = tx.sessions.get(SESSION)
            assert session is not None
            assert (session.status, session.stop_reason) == (SessionStatus.READY, StopReason.END_TURN)
            assert session.created_at == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
            assert session.usage == Usage(input_tokens=3, output_tokens=5)
            assert session.metadata == {"ключ": ["𝄞", None]}
            assert session.spec == {"model": "m"}
            turn = tx.turns.get(TURN)
            assert turn is not None
            assert (turn.status, turn.cost_usd, turn.num_turns) == (TurnStatus.SUCCEEDED, 0.25, 2)
            sandbox = tx.sandboxes.current(SESSION)
            assert sandbox is not None
            assert (sandbox.id, sandbox.status, sandbox.acked) == (SANDBOX, SandboxStatus.LIVE, 9)
            events = tx.events.page(SESSION, after=0, limit=100)
            assert [event.seq for event in events] == [1, 2, 3]
            for event in events:
                EVENT_TYPES[event.type].model_validate(event.data)
            assert tx.transcripts.page(SESSION, "", after=0, limit=9) == [(1, '{"uuid":"u1","text":"é"}')]
            assert tx.usage.of_turn(TURN) == (Usage(input_tokens=3, output_tokens=5), 0.25, 1)

        await store.read(look)
        number = await store.write(lambda tx: tx.sessions.next_number())
        assert number == 8


async def test_a_newer_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "newer.db"
    async with AsyncExitStack() as stack:
        await opened(path, stack)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    connection.commit()
    before = list(connection.iterdump())
    with pytest.raises(MigrationRequired, match="from_the_future"):
        async with AsyncExitStack() as stack:
            await opened(path, stack)
    assert list(connection.iterdump()) == before
    connection.close()


async def test_opening_again_migrates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "same.db"
    for _ in range(2):
        async with AsyncExitStack() as stack:
            await opened(path, stack)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM alembic_version").fetchall() == [(1,)]
    assert connection.execute("SELECT name, value FROM counters").fetchall() == [("session", 0)]
    connection.close()
