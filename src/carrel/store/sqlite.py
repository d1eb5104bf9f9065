"""SQLite: a thread that writes, a few that read.

Transactions queue for the writer's thread, and those that have queued up meanwhile share one commit (group commit);
each runs under a savepoint, so one that fails takes back nothing but its own work. `synchronous=NORMAL` loses nothing
when the process is killed; `durability="power"` also survives a power cut, at the price of a disk flush a commit.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from carrel import abc
from carrel.errors import StoreFull
from carrel.protocol.events import StoredEvent
from carrel.store.schema import bring_up_to_date
from carrel.store.transaction import SqlTransaction

_READERS = 4
_GROUP = 200

T = TypeVar("T")


@dataclass(eq=False)
class _Job(Generic[T]):
    work: Callable[[abc.Transaction], T]
    done: asyncio.Future[T]
    result: Any = None
    error: BaseException | None = None
    appended: list[StoredEvent] = field(default_factory=list)

    def run(self, connection: sa.Connection) -> None:
        transaction = SqlTransaction(connection, writing=True)
        # In plain words: SQLAlchemy's own savepoints take ten times as long.
        connection.exec_driver_sql("SAVEPOINT job")
        try:
            self.result = self.work(transaction)
        except BaseException as error:
            engine: Any = connection.connection.dbapi_connection
            if not engine.in_transaction:
                # Where the disk is full, SQLite takes the whole transaction back by itself.
                raise
            connection.exec_driver_sql("ROLLBACK TO job")
            connection.exec_driver_sql("RELEASE job")
            self.error = error
            return
        connection.exec_driver_sql("RELEASE job")
        self.appended = transaction.log.appended


class SqliteStore(abc.Store):
    """Rows in an SQLite file, or in memory."""

    def __init__(
        self,
        path: Path | None,
        *,
        durability: str = "process",
        on_commit: Callable[[list[StoredEvent]], None] = lambda events: None,
    ) -> None:
        """Make the store; nothing is opened before `start`.

        Args:
            path: the database's file; None keeps everything in memory.
            durability: `process` survives a killed process, `power` a power cut.
            on_commit: told what a transaction appended, in the event loop's thread, in the order of commits.
        """
        self._path = path
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._on_commit = on_commit
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._closed = False

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Open, and bring the schema up to date; closing is registered with `exit_stack`."""
        self._loop = asyncio.get_running_loop()
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writer = self._engine("BEGIN IMMEDIATE", poolclass=StaticPool)
        exit_stack.callback(self._writer.dispose)
        await asyncio.to_thread(self._migrate)
        if self._path is not None:
            self._reader = self._engine("BEGIN", pool_size=_READERS, max_overflow=0)
            exit_stack.callback(self._reader.dispose)
            self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="carrel-store-reader")
            exit_stack.push_async_callback(asyncio.to_thread, self._readers.shutdown)
        thread = threading.Thread(target=self._write_jobs, name="carrel-store-writer")
        thread.start()
        exit_stack.push_async_callback(asyncio.to_thread, thread.join)
        exit_stack.callback(self._close)

    async def read(self, work: Callable[[abc.Transaction], T]) -> T:
        """Run a transaction that changes nothing, and answer what it answers."""
        if self._path is None:
            return await self.write(work)
        return await self._loop.run_in_executor(self._readers, self._read, work)

    async def write(self, work: Callable[[abc.Transaction], T]) -> T:
        """Run a transaction: committed when `work` returns, rolled back when it raises."""
        if self._closed:
            raise RuntimeError("the store is closed")
        job: _Job[T] = _Job(work, self._loop.create_future())
        self._jobs.put(job)
        return await job.done

    def _close(self) -> None:
        """Let the writer finish what is queued; whoever comes later would wait for ever."""
        self._closed = True
        self._jobs.put(None)

    def _engine(self, begin: str, **options: Any) -> sa.Engine:
        url = "sqlite://" if self._path is None else f"sqlite:///{self._path}"
        engine = sa.create_engine(url, connect_args={"check_same_thread": False}, **options)

        @sa.event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            # The driver's own implicit BEGIN would start a deferred transaction, which can fail half way through.
            connection.isolation_level = None
            # SQLite's own knows no letters but the first 128.
            connection.create_function("lower", 1, _lower, deterministic=True)
            for pragma in ("journal_mode=WAL", f"synchronous={self._synchronous}", "busy_timeout=10000"):
                connection.execute(f"PRAGMA {pragma}")

        @sa.event.listens_for(engine, "begin")
        def start(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    def _migrate(self) -> None:
        with self._writer.begin() as connection:
            bring_up_to_date(connection)

    def _read(self, work: Callable[[abc.Transaction], T]) -> T:
        with self._reader.connect() as connection:
            return work(SqlTransaction(connection))

    def _write_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            group = [job]
            stop = False
            while len(group) < _GROUP and not self._jobs.empty():
                more = self._jobs.get()
                if more is None:
                    stop = True
                    break
                group.append(more)
            self._commit(group)
            self._loop.call_soon_threadsafe(self._finish, group)
            if stop:
                return

    def _commit(self, group: list[_Job[Any]]) -> None:
        try:
            with self._writer.begin() as connection:
                for job in group:
                    job.run(connection)
        except BaseException as error:
            # The commit itself failed (a full disk, say): nothing of the group is stored.
            for job in group:
                job.error = _told(job.error or error)

    def _finish(self, group: list[_Job[Any]]) -> None:
        for job in group:
            if job.error is None and job.appended:
                self._on_commit(job.appended)
            if job.done.cancelled():
                continue
            if job.error is not None:
                job.done.set_exception(job.error)
            else:
                job.done.set_result(job.result)


def _told(error: BaseException) -> BaseException:
    """What a caller is told of an error of the engine's."""
    origin = getattr(error, "orig", None)
    full = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
    if isinstance(origin, sqlite3.OperationalError) and origin.sqlite_errorcode in full:
        return StoreFull(operator_detail=repr(origin))
    return error


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
