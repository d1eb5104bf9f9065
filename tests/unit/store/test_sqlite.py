"""What the SQLite store does beyond its contract: it groups commits, uses its indexes, and closes cleanly."""

import asyncio
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from carrel import abc
from carrel.errors import ForeignDatabase, StoreFull
from carrel.model import SessionStatus
from carrel.protocol.events import StoredEvent
from carrel.store import SqliteStore, tables
from carrel.store.rows.base import columns
from carrel.store.transaction import SqlTransaction
from carrel.testing.conformance.store import NOW, add_session, new_event, new_session

COLUMNS = columns(new_session(0, expires_at=None))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db")
        await store.start(stack)
        yield store


def count_commits(store: SqliteStore) -> list[int]:
    commits = [0]

    @sa.event.listens_for(store._writer, "commit")
    def commit(connection: sa.Connection) -> None:
        commits[0] += 1

    return commits


async def test_writes_that_wait_share_a_commit(store: SqliteStore) -> None:
    session = await add_session(store)
    commits = count_commits(store)
    held = threading.Event()
    first = asyncio.ensure_future(store.write(lambda tx: held.wait(10)))
    writes = [
        asyncio.ensure_future(store.write(lambda tx: tx.events.append(session.id, [new_event("x")])))
        for _ in range(150)
    ]
    await asyncio.sleep(0)
    held.set()
    await asyncio.gather(first, *writes)
    assert commits[0] <= 3
    stored = await store.read(lambda tx: tx.events.page(session.id, after=0, limit=1000))
    assert [event.seq for event in stored] == list(range(1, 151))


async def test_one_failure_in_a_group_takes_back_its_own_work_alone(store: SqliteStore) -> None:
    one, two = await add_session(store), await add_session(store)
    held = threading.Event()

    def fail(tx: abc.Transaction) -> None:
        tx.sessions.update(one.id, title="taken back")
        tx.sessions.update(two.id, title="taken back")
        raise LookupError

    async with asyncio.TaskGroup() as group:
        group.create_task(store.write(lambda tx: held.wait(10)))
        before = group.create_task(store.write(lambda tx: tx.sessions.update(one.id, title="before")))
        failed = asyncio.ensure_future(store.write(fail))
        after = group.create_task(store.write(lambda tx: tx.sessions.update(two.id, title="after")))
        await asyncio.sleep(0)
        held.set()
        with pytest.raises(LookupError):
            await failed
    assert (before.result().title, after.result().title) == ("before", "after")
    titles = await store.read(
        lambda tx: [s.title for s in tx.sessions.page(abc.SessionFilter(), cursor=None, limit=9).items]
    )
    assert titles == ["after", "before"]


async def test_a_commit_that_fails_stores_and_publishes_nothing(tmp_path: Path) -> None:
    told: list[StoredEvent] = []
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db", on_commit=told.extend)
        await store.start(stack)
        session = await add_session(store)
        full = [True]

        @sa.event.listens_for(store._writer, "commit")
        def commit(connection: sa.Connection) -> None:
            if full.pop() if full else False:
                raise OSError("no space left on device")

        with pytest.raises(OSError, match="no space"):
            await store.write(lambda tx: tx.events.append(session.id, [new_event("lost")]))
        assert told == []
        await store.write(lambda tx: tx.events.append(session.id, [new_event("kept")]))
        stored = await store.read(lambda tx: tx.events.page(session.id, after=0, limit=9))
        assert [(event.seq, event.data["text"]) for event in stored] == [(1, "kept")]
        assert [event.seq for event in told] == [1]


async def test_a_slow_reader_holds_no_writer_up(store: SqliteStore) -> None:
    session = await add_session(store)
    held, begun = threading.Event(), threading.Event()

    def read(tx: abc.Transaction) -> tuple[str | None, str | None]:
        first = tx.sessions.get(session.id)
        begun.set()
        held.wait(10)
        second = tx.sessions.get(session.id)
        assert first is not None
        assert second is not None
        return first.title, second.title

    reading = asyncio.ensure_future(store.read(read))
    await asyncio.to_thread(begun.wait, 10)
    await asyncio.wait_for(store.write(lambda tx: tx.sessions.update(session.id, title="new")), 5)
    held.set()
    assert await reading == ("a title", "a title"), "a transaction sees one state of the rows"


async def test_a_read_stores_nothing(store: SqliteStore) -> None:
    session = await add_session(store)
    await store.read(lambda tx: tx.sessions.update(session.id, title="never"))
    now = await store.read(lambda tx: tx.sessions.get(session.id))
    assert now is not None
    assert now.title == "a title"


async def test_a_store_that_has_closed_says_so(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db")
        await store.start(stack)
    with pytest.raises(RuntimeError, match="closed"):
        await asyncio.wait_for(store.write(lambda tx: None), 5)


async def test_what_is_queued_when_it_closes_is_still_written(tmp_path: Path) -> None:
    path = tmp_path / "carrel.db"
    async with AsyncExitStack() as stack:
        store = SqliteStore(path)
        await store.start(stack)
        session = await add_session(store)
        writes = [
            asyncio.ensure_future(store.write(lambda tx: tx.events.append(session.id, [new_event("x")])))
            for _ in range(500)
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*writes)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM events").fetchall() == [(500,)]
    connection.close()


def fill(tx: abc.Transaction) -> None:
    """At once, in the rows' own format: what is tried here is the listing."""
    assert isinstance(tx, SqlTransaction)
    rows = []
    for number in range(1, 10_001):
        owner = "alice" if number % 2 else "bob"
        status = SessionStatus.STOPPED if number % 100 == 0 else SessionStatus.IDLE
        rows.append(COLUMNS | {"id": f"s{number}", "number": number, "owner": owner, "status": status})
    tx.log._connection.execute(tables.sessions.insert(), rows)


def plans(tx: abc.Transaction, work: Callable[[abc.Transaction], object]) -> list[str]:
    """How SQLite would go about each query of a transaction."""
    assert isinstance(tx, SqlTransaction)
    connection = tx.log._connection
    said: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        said.append((statement, parameters))

    sa.event.listen(connection, "before_cursor_execute", note)
    try:
        work(tx)
    finally:
        sa.event.remove(connection, "before_cursor_execute", note)
    found = []
    for statement, parameters in said:
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
        found += [row[-1] for row in rows]
    return found


FILTERS = {
    "all": abc.SessionFilter(),
    "owner": abc.SessionFilter(owner="alice"),
    "status": abc.SessionFilter(status=SessionStatus.STOPPED),
    "both": abc.SessionFilter(owner="bob", status=SessionStatus.STOPPED),
}


@pytest.mark.slow
@pytest.mark.blocks_loop(
    "ten thousand rows are made in one transaction, in the store's own thread, which holds the GIL"
)
async def test_ten_thousand_sessions_are_listed_by_an_index(store: SqliteStore) -> None:
    await store.write(fill)
    for name, which in FILTERS.items():
        for cursor in (None, (await page(store, which, None)).next_cursor):
            plan = await store.read(
                lambda tx, w=which, c=cursor: plans(tx, lambda tx: tx.sessions.page(w, cursor=c, limit=50))
            )  # type: ignore[misc]
            assert any(re.search(r"USING (COVERING )?INDEX", step) for step in plan), (name, plan)
            assert not any("TEMP B-TREE" in step for step in plan), (name, plan)
    seen: list[int] = []
    cursor = None
    took: list[float] = []
    for turn in range(40):
        started = time.perf_counter()
        found = await page(store, FILTERS["owner"], cursor)
        took.append(time.perf_counter() - started)
        seen += [session.number for session in found.items]
        cursor = found.next_cursor
        await store.write(lambda tx, n=10_001 + 2 * turn: tx.sessions.add(new_session(n)))  # type: ignore[misc]
    assert seen == list(range(9_999, 9_999 - 2 * 2_000, -2)), "no session twice, none left out"
    assert sorted(took)[len(took) // 2] < 0.25


async def page(store: SqliteStore, which: abc.SessionFilter, cursor: str | None) -> abc.Page[Any]:
    return await store.read(lambda tx: tx.sessions.page(which, cursor=cursor, limit=50))


async def test_everyday_queries_use_an_index(store: SqliteStore) -> None:
    session = await add_session(store)

    def everyday(tx: abc.Transaction) -> None:
        tx.sessions.get(session.id)
        tx.turns.get("t")
        tx.turns.queued(session.id)
        tx.turns.live(session.id)
        tx.turns.next_number(session.id)
        tx.events.page(session.id, after=5, limit=50)
        tx.events.page(session.id, after=5, limit=50, turn_id="t")
        tx.sandboxes.current(session.id)
        tx.sandboxes.by_agent_token("x")
        tx.sandboxes.not_gone()
        tx.transcripts.page(session.id, "", after=3, limit=50)
        tx.usage.of_turn("t")

    plan = await store.read(lambda tx: plans(tx, everyday))
    assert len(plan) >= 12
    assert [step for step in plan if step.startswith("SCAN") and "INDEX" not in step and "sandboxes" not in step] == []


async def test_times_without_a_zone_are_refused(store: SqliteStore) -> None:
    session = await add_session(store)
    with pytest.raises(Exception, match="a time without a zone"):
        await store.write(lambda tx: tx.sessions.update(session.id, last_active_at=NOW.replace(tzinfo=None)))


async def test_durability_is_what_was_asked_for(tmp_path: Path) -> None:
    for durability, level in (("process", 1), ("power", 2)):
        async with AsyncExitStack() as stack:
            store = SqliteStore(tmp_path / f"{durability}.db", durability=durability)
            await store.start(stack)
            found = await store.write(
                lambda tx: tx.log._connection.exec_driver_sql("PRAGMA synchronous").scalar()  # type: ignore[attr-defined]
            )
            assert found == level
            mode = await store.read(
                lambda tx: tx.log._connection.exec_driver_sql("PRAGMA journal_mode").scalar()  # type: ignore[attr-defined]
            )
            assert mode == "wal"


async def test_the_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE sessions (session_id TEXT PRIMARY KEY)")
    with pytest.raises(ForeignDatabase, match="carrel import"):
        async with AsyncExitStack() as stack:
            await SqliteStore(path).start(stack)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("sessions",)]


async def test_a_full_disk_is_told_in_plain_words_and_costs_nothing_that_was_stored(store: SqliteStore) -> None:
    session = await add_session(store)

    def bound(pages: int) -> int:
        with store._writer.connect() as connection:
            return int(connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar_one())

    await store.write(lambda tx: None)
    bound(1)  # no more than there are now
    for _ in range(2):
        with pytest.raises(StoreFull) as caught:
            await store.write(lambda tx: tx.sessions.update(session.id, title="x" * 1_000_000))
        assert (caught.value.http_status, caught.value.retry_after_seconds) == (503, 5)
    assert (await store.read(lambda tx: tx.sessions.get(session.id))) == session
    bound(1_000_000)
    await store.write(lambda tx: tx.sessions.update(session.id, title="room"))
    assert (await store.read(lambda tx: tx.sessions.get(session.id))).title == "room"  # type: ignore[union-attr]
