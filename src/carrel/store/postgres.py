"""PostgreSQL: a pool of connections, and the patience that a database over a network asks for.

A transaction runs in a greenlet of the event loop's thread, so that the rows' code is the one that SQLite runs. What
another transaction undid (a deadlock, say) or a broken connection took away is run again. Only a connection that breaks
while COMMIT is under way leaves a doubt; the mark that each transaction makes resolves it (docs/adr/0009).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from carrel import abc
from carrel.errors import OperatorError, StoreOutcomeUnknown, StoreUnavailable
from carrel.model import new_id, utc_now
from carrel.protocol.events import StoredEvent
from carrel.store import schema, tables
from carrel.store.postgres_dialect import DRIVER
from carrel.store.publishing import Entry, Publisher
from carrel.store.transaction import SqlTransaction

__all__ = ["PostgresStore", "is_postgres", "postgres_engine", "prepare", "prepare_or_say", "snapshot"]

log = structlog.get_logger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 0.5
_CLOSE_SECONDS = 10.0
_CONFLICTS = 100
_OLDEST_SERVER = 13
_MIGRATION_LOCK = int.from_bytes(b"carrel", "big")
_MARK_KEPT = timedelta(days=1)

# Changes nothing, and answers nothing, where the transaction has changed nothing.
_MARK = sa.text(
    "INSERT INTO commits (writer, number, at)"
    " SELECT CAST(:writer AS text), CAST(:number AS bigint), now() WHERE pg_current_xact_id_if_assigned() IS NOT NULL"
    " ON CONFLICT (writer) DO UPDATE SET number = excluded.number, at = excluded.at RETURNING number"
)
# Waits for a transaction that has made such a mark and has not ended yet, whether or not it was the first of its writer.
_LAST_MARK = sa.text(
    "INSERT INTO commits (writer, number, at) VALUES (CAST(:writer AS text), 0, now())"
    " ON CONFLICT (writer) DO UPDATE SET at = excluded.at RETURNING number"
)


def is_postgres(url: str) -> bool:
    """Whether this is the address of a PostgreSQL database."""
    return url.partition("://")[0].partition("+")[0] in ("postgres", "postgresql")


# ---------------------------------------------------------------------------------------------------------- the store


class _Job(Generic[T]):
    """One transaction, through all its attempts."""

    __slots__ = ("done", "outcome", "work", "writing")

    def __init__(self, work: Callable[[abc.Transaction], T], *, writing: bool) -> None:
        loop = asyncio.get_running_loop()
        self.work = work
        self.writing = writing
        self.done: asyncio.Future[T] = loop.create_future()
        self.outcome: asyncio.Future[T] | None = None

    def succeed(self, result: T) -> None:
        """Answer whoever waits."""
        for waiting in (self.done, self.outcome):
            if waiting is not None and not waiting.done():
                waiting.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits."""
        for waiting in (self.done, self.outcome):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)

    def doubt(self, detail: str) -> None:
        """Let whoever waits go, not knowing; the outcome can be waited for."""
        if self.done.done():
            return
        self.outcome = asyncio.get_running_loop().create_future()
        # Nobody has to ask for it.
        self.outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())
        self.done.set_exception(StoreOutcomeUnknown(outcome=asyncio.shield(self.outcome), operator_detail=detail))


@dataclass(frozen=True)
class _Mark:
    """A transaction: that many of a connection's."""

    writer: str
    number: int


class _CommitLost(Exception):
    """The connection broke while COMMIT was under way."""

    def __init__(self, mark: _Mark, entry: Entry, result: Any, cause: Exception) -> None:
        super().__init__(_brief(cause))
        self.mark = mark
        self.entry = entry
        self.result = result


class PostgresStore(abc.Store):
    """Rows in a PostgreSQL database."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        statement_timeout_seconds: float = 30.0,
        connect_timeout_seconds: float = 5.0,
        outage_seconds: float = 15.0,
        on_commit: Callable[[list[StoredEvent]], None] = lambda events: None,
    ) -> None:
        """Make the store; nothing is opened before `start`.

        Args:
            url: `postgresql://user:password@host:port/database`, `postgresql:///database?host=/folder/of/the/socket`,
                and whatever else libpq takes as an address.
            pool_size: how many connections there are at most.
            statement_timeout_seconds: what a statement may take, waiting for locks included; above it, 503.
            connect_timeout_seconds: what a connection may take to be made.
            outage_seconds: how long a transaction waits for a database that is away; above it, 503.
            on_commit: told what a transaction appended, in the event loop's thread, in each session in the order of
                commits.
        """
        self._url = url
        self._pool_size = pool_size
        self._statement_timeout_seconds = statement_timeout_seconds
        self._connect_timeout_seconds = connect_timeout_seconds
        self._outage_seconds = outage_seconds
        self._publisher = Publisher(on_commit)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._away = False

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Connect, and bring the schema up to date; closing is registered with `exit_stack`.

        Raises:
            OperatorError: the database cannot be reached within `outage_seconds`, or cannot be used.
        """
        await self._patiently_prepare()
        self._writers = postgres_engine(
            self._url,
            pool_size=self._pool_size,
            pool_timeout_seconds=max(1.0, self._outage_seconds),
            statement_timeout_seconds=self._statement_timeout_seconds,
            connect_timeout_seconds=self._connect_timeout_seconds,
        )
        # A read sees one state of the rows from its first statement to its last, as it does in SQLite.
        self._readers = self._writers.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        exit_stack.push_async_callback(self._writers.dispose)
        exit_stack.push_async_callback(self._finish)

    async def read(self, work: Callable[[abc.Transaction], T]) -> T:
        """Run a transaction that changes nothing, and answer what it answers."""
        return await self._submit(_Job(work, writing=False))

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        """Run a transaction: committed when `work` returns, rolled back when it raises."""
        return await self._submit(_Job(work, writing=True))

    async def _submit(self, job: _Job[T]) -> T:
        if self._closing.is_set():
            raise RuntimeError("the store is closed")
        # In a task of its own: whoever waits may be cancelled, and a commit must not be cut in half by that.
        task = asyncio.get_running_loop().create_task(self._carry_out(job), name="store-transaction")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await job.done

    async def _finish(self) -> None:
        """Let what is under way come to its end; whoever waits for a database that is away need not wait on."""
        self._closing.set()
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _patiently_prepare(self) -> None:
        deadline = time.monotonic() + self._outage_seconds
        while True:
            try:
                await prepare(self._url, _make_ready, self._connect_timeout_seconds)
                return
            except Exception as error:
                if _trouble(error) is not _Trouble.AWAY:
                    raise
                if time.monotonic() > deadline:
                    raise _cannot_be_reached(error) from error
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS)

    # ------------------------------------------------------------------------------------------------- a transaction

    async def _carry_out(self, job: _Job[Any]) -> None:
        try:
            result = await self._persevere(job)
        except asyncio.CancelledError:
            job.fail(StoreUnavailable(operator_detail="the store was closed"))
            raise
        except BaseException as error:
            job.fail(error)
        else:
            job.succeed(result)

    async def _persevere(self, job: _Job[T]) -> T:
        away_since: float | None = None
        conflicts = 0
        pause = 0.0
        while True:
            try:
                result = await self._attempt(job)
            except _CommitLost as lost:
                if await self._was_committed(job, lost):
                    return lost.result  # type: ignore[no-any-return]
                if job.outcome is not None:
                    # Whoever asked has been told that it is not known: to do it now would be no answer to that.
                    raise StoreUnavailable(operator_detail="not committed") from lost
                continue
            except Exception as error:
                trouble = _trouble(error)
                if trouble is None:
                    raise
                if trouble is _Trouble.CONFLICT and conflicts < _CONFLICTS:
                    conflicts += 1
                    await asyncio.sleep(random.uniform(0, 0.001 * min(conflicts, 20)))
                    continue
                now = time.monotonic()
                away_since = away_since or now
                if trouble is not _Trouble.AWAY or now - away_since >= self._outage_seconds or self._closing.is_set():
                    raise StoreUnavailable(operator_detail=_brief(error)) from error
                self._say_away(error)
                await self._pause(pause)
                pause = min(max(pause * 2, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            else:
                if self._away:
                    self._away = False
                    log.info("store.back")
                return result

    async def _attempt(self, job: _Job[T]) -> T:
        engine = self._writers if job.writing else self._readers
        async with engine.connect() as connection:
            try:
                result, appended, mark = await connection.run_sync(_run, job)
            except (OSError, TimeoutError):
                # The driver knows nothing of these: to it, the connection is still good.
                await connection.invalidate()
                raise
            if mark is None:
                return result  # nothing was changed
            entry = self._publisher.enter(appended)
            await self._commit(connection, mark, entry, result)
        await entry.told
        return result

    async def _commit(self, connection: AsyncConnection, mark: _Mark, entry: Entry, result: Any) -> None:
        try:
            await connection.commit()
        except Exception as error:
            if _trouble(error) is not _Trouble.AWAY:
                self._publisher.leave(entry, committed=False)
                raise
            await connection.invalidate()
            raise _CommitLost(mark, entry, result, error) from error
        except BaseException:
            self._publisher.leave(entry, committed=False)
            raise
        self._publisher.leave(entry, committed=True)

    async def _was_committed(self, job: _Job[T], lost: _CommitLost) -> bool:
        """Find out whether a transaction's mark is there, for as long as it takes."""
        committed = False
        since = time.monotonic()
        pause = 0.0
        log.warning("store.commit_lost", error=str(lost), writer=lost.mark.writer, number=lost.mark.number)
        try:
            while True:
                try:
                    async with self._writers.connect() as connection:
                        last = (await connection.execute(_LAST_MARK, {"writer": lost.mark.writer})).scalar_one()
                    committed = int(last) == lost.mark.number
                    break
                except Exception as error:
                    if _trouble(error) is None:
                        raise
                if self._closing.is_set():
                    job.doubt("the store was closed")
                    raise StoreUnavailable(operator_detail="the store was closed before the outcome was known")
                if time.monotonic() - since >= self._outage_seconds:
                    job.doubt(str(lost))
                await self._pause(pause)
                pause = min(max(pause * 2, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        finally:
            self._publisher.leave(lost.entry, committed=committed)
        log.warning("store.commit_found", writer=lost.mark.writer, number=lost.mark.number, committed=committed)
        if committed:
            await lost.entry.told
        return committed

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return

    def _say_away(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            log.warning("store.away", error=_brief(error))


def _run(connection: sa.Connection, job: _Job[T]) -> tuple[T, list[StoredEvent], _Mark | None]:
    """Do the work; where it has changed anything, mark the transaction, so that it can be known again."""
    transaction = SqlTransaction(connection, writing=job.writing)
    result = job.work(transaction)
    if not job.writing:
        return result, [], None
    # What is kept here ends with the connection, and no other one ever has the name.
    ours = connection.info
    writer = ours.setdefault("writer", new_id())
    ours["number"] = ours.get("number", 0) + 1
    changed = connection.execute(_MARK, {"writer": writer, "number": ours["number"]}).first() is not None
    return result, transaction.log.appended, _Mark(writer, ours["number"]) if changed else None


def _make_ready(connection: sa.Connection) -> None:
    schema.bring_up_to_date(connection)
    connection.execute(tables.commits.delete().where(tables.commits.c.at < utc_now() - _MARK_KEPT))


# ------------------------------------------------------------------------------------------------------- connections


class _Unreachable(Exception):
    """No connection could be made."""


def postgres_engine(
    url: str,
    *,
    pool_size: int = 0,
    pool_timeout_seconds: float = 30.0,
    statement_timeout_seconds: float | None = None,
    connect_timeout_seconds: float = 5.0,
) -> AsyncEngine:
    """An engine on a database; nothing is opened yet. Whoever asks for it disposes of it.

    Args:
        url: as `PostgresStore` takes it.
        pool_size: how many connections are kept; 0: none, each is closed after use.
        pool_timeout_seconds: how long one is waited for.
        statement_timeout_seconds: what a statement may take; None: as long as it will.
        connect_timeout_seconds: what a connection may take to be made.
    """
    import asyncpg  # type: ignore[import-untyped]

    # The dialect logs, with tracebacks, that a connection which is lost cannot be rolled back.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    scheme, _, rest = url.partition("://")
    address = f"{scheme.partition('+')[0]}://{rest}"
    settings = {"application_name": "carrel"}
    command_timeout = None
    if statement_timeout_seconds is not None:
        milliseconds = str(int(statement_timeout_seconds * 1000))
        settings |= {"statement_timeout": milliseconds, "idle_in_transaction_session_timeout": milliseconds}
        # A server that is stopped, or behind a line that is cut, does not even say that a statement took too long.
        command_timeout = statement_timeout_seconds + 1.0

    async def connect() -> Any:
        try:
            return await asyncpg.connect(
                address, timeout=connect_timeout_seconds, command_timeout=command_timeout, server_settings=settings
            )
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise _Unreachable(_brief(error)) from error

    pool: dict[str, Any] = {"poolclass": NullPool}
    if pool_size:
        pool = {
            "poolclass": AsyncAdaptedQueuePool,
            "pool_size": pool_size,
            "max_overflow": 0,
            "pool_timeout": pool_timeout_seconds,
        }
    return create_async_engine(f"{DRIVER}://", async_creator=connect, **pool)


async def prepare(url: str, work: Callable[[sa.Connection], T], connect_timeout_seconds: float = 5.0) -> T:
    """Work on the schema, while nobody else does, in one transaction.

    Raises:
        OperatorError: the server is too old, or does not let us in.
        MigrationRequired: a newer release of Carrel made the schema.
    """
    engine = postgres_engine(url, connect_timeout_seconds=connect_timeout_seconds)
    try:
        async with engine.begin() as connection:
            version = int((await connection.execute(sa.text("SHOW server_version_num"))).scalar_one())
            if version < _OLDEST_SERVER * 10_000:
                raise OperatorError(f"PostgreSQL {_OLDEST_SERVER} or newer is needed.", operator_detail=str(version))
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            return await connection.run_sync(work)
    except _Unreachable as error:
        if _is_refusal(error.__cause__):
            raise OperatorError(
                "The database does not let us in; see what database.url says.", operator_detail=str(error)
            ) from error
        raise
    except ValueError as error:
        raise OperatorError("database.url is not an address of PostgreSQL's.", operator_detail=str(error)) from error
    finally:
        await engine.dispose()


async def prepare_or_say(url: str, work: Callable[[sa.Connection], T]) -> T:
    """As `prepare`, for a command: a database that cannot be reached ends it.

    Raises:
        OperatorError: also where the database cannot be reached.
    """
    try:
        return await prepare(url, work)
    except Exception as error:
        if _trouble(error) is _Trouble.AWAY:
            raise _cannot_be_reached(error) from error
        raise


async def snapshot(url: str, work: Callable[[sa.Connection], T]) -> T:
    """Read rows as one moment has them, from the first to the last, however long that takes.

    Raises:
        OperatorError: the database cannot be reached.
    """
    engine = postgres_engine(url)
    reading = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    try:
        async with reading.connect() as connection:
            return await connection.run_sync(work)
    except Exception as error:
        if _trouble(error) is _Trouble.AWAY:
            raise _cannot_be_reached(error) from error
        raise
    finally:
        await engine.dispose()


def _cannot_be_reached(error: Exception) -> OperatorError:
    return OperatorError(
        "The database cannot be reached; see whether it runs, and what database.url says.",
        operator_detail=_brief(error),
    )


# ------------------------------------------------------------------------------------------------------------ trouble


class _Trouble(enum.Enum):
    """What can be wrong with an attempt that is no fault of its work."""

    CONFLICT = "conflict"
    """Another transaction was in the way: at once again."""
    AWAY = "away"
    """The server, or the line to it: again, after a while."""
    SLOW = "slow"
    """A statement took too long."""


_CONFLICT_STATES = frozenset({"40001", "40P01", "0A000"})  # 0A000: a plan from before a migration
_AWAY_STATES = ("08", "57P", "53", "58")


def _trouble(error: BaseException) -> _Trouble | None:
    if isinstance(error, _Unreachable | sa.exc.TimeoutError | OSError):  # TimeoutError is an OSError
        return _Trouble.AWAY
    if not isinstance(error, sa.exc.DBAPIError):
        return None
    state = _state(error.orig)
    if state in _CONFLICT_STATES:
        return _Trouble.CONFLICT
    if state == "57014":
        return _Trouble.SLOW
    if error.connection_invalidated or state.startswith(_AWAY_STATES) or (not state and _is_broken(error.orig)):
        return _Trouble.AWAY
    return None


def _state(error: object) -> str:
    return str(getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or "")


def _is_broken(error: BaseException | None) -> bool:
    """The driver's own errors have no state: of a connection that it found closed, or was closing."""
    return error is not None and "connection" in str(error)


def _is_refusal(error: BaseException | None) -> bool:
    """A wrong password, user or database."""
    return _state(error).startswith(("28", "3D", "42"))


def _brief(error: BaseException) -> str:
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}"[:500]
