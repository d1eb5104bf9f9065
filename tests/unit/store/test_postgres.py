"""What the PostgreSQL store does beyond its contract: outages, lost commits, order, and values of every sort."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from carrel import abc
from carrel.errors import MigrationRequired, OperatorError, StoreOutcomeUnknown, StoreUnavailable
from carrel.protocol.events import StoredEvent
from carrel.store import schema, tables
from carrel.store.postgres import PostgresStore, is_postgres, prepare
from carrel.testing.conformance.store import add_session, new_event
from carrel.testing.postgres import PostgresServer, postgres_programs

pytestmark = [pytest.mark.requires("postgres"), pytest.mark.slow]

PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresServer]:
    programs = postgres_programs()
    assert programs is not None
    server = PostgresServer(programs)
    yield server
    server.remove()


@pytest.fixture
def breakable(cluster: PostgresServer) -> Iterator[PostgresServer]:
    """A server of the test's own, to be stopped, killed and frozen."""
    cluster.start()
    yield cluster
    cluster.stop()


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[PostgresStore]:
    async with AsyncExitStack() as stack:
        store = PostgresStore(url, **options)
        await store.start(stack)
        yield store


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def append(session_id: str, text: str) -> Callable[[abc.Transaction], Any]:
    return lambda tx: tx.events.append(session_id, [new_event(text)])


async def said(store: abc.Store, session_id: str) -> list[str]:
    stored = await store.read(lambda tx: tx.events.page(session_id, after=0, limit=1000))
    assert [event.seq for event in stored] == list(range(1, len(stored) + 1))
    return [event.data["text"] for event in stored]


class Proxy:
    """A unix socket before the server's; a line that breaks when it is told to."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.folder = server.folder / "proxy"
        self.breaks: str | None = None
        """At the next COMMIT: `before` it reaches the server, or `after` that, with its answer on the way."""
        self.stays_down = False
        self.down = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def address(self, url: str) -> str:
        """The database's address by way of this proxy."""
        return url.replace(f"host={self._server.folder}", f"host={self.folder}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / ".s.PGSQL.5432"
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            path.unlink(missing_ok=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        if self.down:
            writer.transport.abort()
            return
        there, back = await asyncio.open_unix_connection(self._server.folder / ".s.PGSQL.5432")
        both = {writer, back}
        self._writers |= both
        answer_is_lost = False

        async def questions() -> None:
            nonlocal answer_is_lost
            while data := await reader.read(65536):
                if b"COMMIT" in data:
                    breaks, self.breaks = self.breaks, None
                    self.down = self.down or (breaks is not None and self.stays_down)
                    if breaks == "before":
                        break
                    answer_is_lost = breaks == "after"
                back.write(data)
            for one in both:
                one.transport.abort()

        async def answers() -> None:
            while (data := await there.read(65536)) and not answer_is_lost:
                writer.write(data)
            for one in both:
                one.transport.abort()

        await asyncio.gather(questions(), answers(), return_exceptions=True)
        self._writers -= both


@pytest.mark.parametrize("breaks", ["before", "after"])
async def test_a_commit_whose_answer_is_lost_counts_once(postgres_server: PostgresServer, breaks: str) -> None:
    told: list[StoredEvent] = []
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(postgres_server).running())
        url = proxy.address(await asyncio.to_thread(postgres_server.database))
        store = await stack.enter_async_context(opened(url, on_commit=told.extend))
        session = await add_session(store)
        runs = 0

        def work(tx: abc.Transaction) -> str:
            nonlocal runs
            runs += 1
            tx.events.append(session.id, [new_event("once")])
            return "answer"

        proxy.breaks = breaks
        assert await store.write(work) == "answer"
        assert runs == (2 if breaks == "before" else 1)
        assert await said(store, session.id) == ["once"]
        assert [event.seq for event in told] == [1]


async def test_others_of_the_session_are_told_after_a_commit_in_doubt(postgres_server: PostgresServer) -> None:
    told: list[StoredEvent] = []
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(postgres_server).running())
        url = proxy.address(await asyncio.to_thread(postgres_server.database))
        store = await stack.enter_async_context(opened(url, on_commit=told.extend))
        session = await add_session(store)
        for breaks in ("after", "before", "after"):
            proxy.breaks = breaks
            await asyncio.gather(*(store.write(append(session.id, "x")) for _ in range(8)))
        assert len(await said(store, session.id)) == 24
        assert [event.seq for event in told] == list(range(1, 25))


@pytest.mark.parametrize("breaks", ["before", "after"])
async def test_an_outcome_nobody_waited_for_is_found_out(postgres_server: PostgresServer, breaks: str) -> None:
    """The line stays away: the caller is told that it is not known, and can learn it later."""
    told: list[StoredEvent] = []
    async with Proxy(postgres_server).running() as proxy:
        url = proxy.address(await asyncio.to_thread(postgres_server.database))
        async with opened(url, on_commit=told.extend, outage_seconds=0.2) as store:
            session = await add_session(store)
            proxy.breaks, proxy.stays_down = breaks, True
            writing = asyncio.ensure_future(store.write(append(session.id, "x")))
            await until(lambda: proxy.down)
            proxy.cut()
            with pytest.raises(StoreOutcomeUnknown) as caught:
                await writing
            assert caught.value.http_status == 503
            assert caught.value.retry_after_seconds == 5
            assert told == []
            proxy.down = False
            outcome = caught.value.outcome
            assert outcome is not None
            if breaks == "after":
                assert [event.seq for event in await outcome] == [1]
            else:
                with pytest.raises(StoreUnavailable):
                    await outcome
            stored = 1 if breaks == "after" else 0
            assert await said(store, session.id) == ["x"] * stored
            assert len(told) == stored


async def test_what_must_be_stored_is_stored_once_whatever_breaks(postgres_server: PostgresServer) -> None:
    async with Proxy(postgres_server).running() as proxy:
        url = proxy.address(await asyncio.to_thread(postgres_server.database))
        async with opened(url, outage_seconds=0.1) as store:
            session = await add_session(store)
            for breaks in ("before", "after"):
                proxy.breaks, proxy.stays_down = breaks, True
                writing = asyncio.ensure_future(store.write_surely(append(session.id, breaks)))
                await until(lambda: proxy.down)
                proxy.cut()
                with pytest.raises(StoreUnavailable):
                    await store.read(lambda tx: tx.sessions.get(session.id))
                proxy.down = False
                assert [event.data["text"] for event in await writing] == [breaks]
            assert await said(store, session.id) == ["before", "after"]


@pytest.mark.parametrize("how", ["fast", "immediate", "kill"])
async def test_a_short_outage_is_waited_out(breakable: PostgresServer, how: Any) -> None:
    """Writers go on through it; nothing is lost, doubled, or told out of order."""
    told: list[StoredEvent] = []
    async with opened(await asyncio.to_thread(breakable.database), on_commit=told.extend) as store:
        sessions = [await add_session(store) for _ in range(4)]
        over = False
        written = dict.fromkeys([session.id for session in sessions], 0)

        async def write(session_id: str) -> None:
            while not over:
                await store.write(append(session_id, str(written[session_id])))
                written[session_id] += 1

        async with asyncio.TaskGroup() as group:
            for session in sessions:
                group.create_task(write(session.id))
            await until(lambda: min(written.values()) > 3)
            await asyncio.to_thread(breakable.stop, how)
            before = dict(written)
            reading = group.create_task(store.read(lambda tx: tx.counts.sessions()))
            await asyncio.to_thread(breakable.start)
            await until(lambda: all(written[name] > before[name] + 3 for name in written))
            over = True
        assert reading.result() == 4
        for session in sessions:
            assert await said(store, session.id) == [str(n) for n in range(written[session.id])]
            ours = [event.seq for event in told if event.session_id == session.id]
            assert ours == list(range(1, written[session.id] + 1))


async def test_a_long_outage_is_said_and_over_at_once(breakable: PostgresServer) -> None:
    async with opened(await asyncio.to_thread(breakable.database), outage_seconds=0.3) as store:
        session = await add_session(store)
        await asyncio.to_thread(breakable.stop, "fast")
        try:
            with pytest.raises(StoreUnavailable) as caught:
                await store.write(append(session.id, "never"))
            assert (caught.value.http_status, caught.value.retry_after_seconds) == (503, 5)
            with pytest.raises(StoreUnavailable):
                await store.read(lambda tx: tx.sessions.get(session.id))
        finally:
            await asyncio.to_thread(breakable.start)
        await store.write(append(session.id, "again"))
        assert await said(store, session.id) == ["again"]


async def test_a_frozen_server_is_waited_out(breakable: PostgresServer) -> None:
    """Its connections stay open and say nothing; what was asked is asked again elsewhere."""
    url = await asyncio.to_thread(breakable.database)
    async with opened(url, statement_timeout_seconds=0.5, connect_timeout_seconds=0.5) as store:
        session = await add_session(store)
        await asyncio.to_thread(breakable.freeze)
        writing = asyncio.ensure_future(store.write(append(session.id, "x")))
        try:
            done, _ = await asyncio.wait([writing], timeout=2.5)
            assert not done
        finally:
            await asyncio.to_thread(breakable.thaw)
        await writing
        assert await said(store, session.id) == ["x"]


async def test_a_statement_that_takes_too_long_is_ended(postgres: Callable[[], str]) -> None:
    url = await asyncio.to_thread(postgres)
    async with opened(url) as holder, opened(url, statement_timeout_seconds=0.2) as store:
        session = await add_session(holder)
        held, let_go = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with holder._writers.begin() as connection:
                await connection.execute(sa.select(tables.sessions).with_for_update())
                held.set()
                await let_go.wait()

        holding = asyncio.ensure_future(hold())
        await held.wait()
        with pytest.raises(StoreUnavailable, match="timeout"):
            await store.write(append(session.id, "never"))
        let_go.set()
        await holding
        assert await said(store, session.id) == []


async def test_deadlocks_are_run_again(postgres: Callable[[], str]) -> None:
    async with opened(await asyncio.to_thread(postgres)) as store:
        one, two = await add_session(store), await add_session(store)

        def work(tx: abc.Transaction, first: str, second: str) -> None:
            tx.events.append(first, [new_event("x")])
            tx.events.append(second, [new_event("x")])

        pairs = [(one.id, two.id), (two.id, one.id)] * 4
        await asyncio.gather(*(store.write(lambda tx, p=pair: work(tx, *p)) for pair in pairs))  # type: ignore[misc]
        assert len(await said(store, one.id)) == len(await said(store, two.id)) == 8


async def test_a_read_sees_one_state_of_the_rows_and_changes_none(postgres: Callable[[], str]) -> None:
    async with opened(await asyncio.to_thread(postgres)) as store:
        session = await add_session(store)
        with pytest.raises(sa.exc.DBAPIError, match="read-only"):
            await store.read(lambda tx: tx.sessions.update(session.id, title="never"))
        now = await store.read(lambda tx: tx.sessions.get(session.id))
        assert now == session


async def test_a_cancelled_caller_leaves_no_connection_behind(postgres: Callable[[], str]) -> None:
    async with opened(await asyncio.to_thread(postgres), pool_size=2) as store:
        session = await add_session(store)
        for _ in range(20):
            tasks = [asyncio.ensure_future(store.read(lambda tx: tx.sessions.get(session.id))) for _ in range(5)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await store.read(lambda tx: tx.sessions.get(session.id)) == session


async def test_a_store_that_has_closed_says_so(postgres: Callable[[], str]) -> None:
    async with opened(await asyncio.to_thread(postgres)) as store:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await store.write(lambda tx: None)


# --------------------------------------------------------------------------------------------------------- the schema


async def test_a_new_database_and_a_migrated_one_have_the_same_tables(postgres: Callable[[], str]) -> None:
    def look(connection: sa.Connection) -> None:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == [schema.HEAD]
        assert connection.execute(sa.text("SELECT name, value FROM counters")).all() == [("session", 0)]
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        found = {name for t in tables.metadata.tables for name in _indexes(connection, t)}
        assert found >= {index.name for table in tables.metadata.tables.values() for index in table.indexes}

    for way in (schema.migrate, schema.bring_up_to_date):
        url = await asyncio.to_thread(postgres)
        await prepare(url, way)
        await prepare(url, look)


def _indexes(connection: sa.Connection, table: str) -> set[str | None]:
    return {index["name"] for index in sa.inspect(connection).get_indexes(table)}


async def test_servers_that_start_at_once_migrate_once(postgres: Callable[[], str]) -> None:
    url = await asyncio.to_thread(postgres)
    async with AsyncExitStack() as stack:
        stores = [PostgresStore(url) for _ in range(5)]
        await asyncio.gather(*(store.start(stack) for store in stores))
        numbers = await asyncio.gather(*(store.write(lambda tx: tx.sessions.next_number()) for store in stores))
        assert sorted(numbers) == [1, 2, 3, 4, 5]


async def test_a_newer_database_is_refused(postgres: Callable[[], str]) -> None:
    url = await asyncio.to_thread(postgres)
    await prepare(url, schema.bring_up_to_date)
    await prepare(url, lambda c: c.execute(sa.text("UPDATE alembic_version SET version_num = 'from_the_future'")))
    with pytest.raises(MigrationRequired, match="from_the_future"):
        async with opened(url):
            pass


@pytest.mark.parametrize("url", ["postgresql://nobody@/nowhere?host={}", "postgresql://postgres@/nowhere?host={}"])
async def test_who_is_not_let_in_is_told(postgres_server: PostgresServer, url: str) -> None:
    with pytest.raises(OperatorError, match="does not let us in"):
        async with opened(url.format(postgres_server.folder)):
            pass


async def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(OperatorError, match="cannot be reached"):
        async with opened("postgresql:///x?host=/nowhere/at/all", outage_seconds=0.1):
            pass


@pytest.mark.parametrize(
    ("url", "is_ours"),
    [
        ("postgresql://u:p@h:5432/d", True),
        ("postgres:///d?host=/run", True),
        ("postgresql+asyncpg://h/d", True),
        ("sqlite:///x.db", False),
        ("mysql://h/d", False),
        ("nonsense", False),
    ],
)
def test_addresses(url: str, is_ours: bool) -> None:
    assert is_postgres(url) is is_ours


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
async def test_every_form_of_address_is_taken(postgres_server: PostgresServer, scheme: str) -> None:
    url = (await asyncio.to_thread(postgres_server.database)).replace("postgresql:", f"{scheme}:")
    async with opened(url) as store:
        await add_session(store)
    async with opened(url.replace("//postgres@/", "///") + "&user=postgres") as store:
        assert await store.read(lambda tx: tx.counts.sessions()) == 1
