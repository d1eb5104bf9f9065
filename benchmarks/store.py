"""Events stored a second: the store alone, in this process, on a file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench
from carrel import abc
from carrel.model import ADMIN, Session, SessionStatus, new_id, utc_now
from carrel.protocol.events import MessageAssistant, NewEvent
from carrel.store import SqliteStore
from carrel.testing.postgres import PostgresServer, postgres_programs

_BATCHES = (1, 10, 50)
_WRITERS = (1, 20)
_TEXT = "A sentence of the length that one often meets in an answer, neither long nor short. " * 2


async def store(bench: Bench) -> list[Figure]:
    """Writers that append batches at once, each to a session of its own; beside SQLite with one INSERT a batch."""
    figures = []
    for writers in _WRITERS:
        for batch in _BATCHES:
            total = bench.times(20_000 if writers * batch > 1 else 4_000, 500)
            carrel, bare = [], []
            for _ in range(bench.times(3, 1)):
                carrel.append(await _carrel(bench.folder("store"), writers, batch, total))
                bare.append(await asyncio.to_thread(_bare, bench.folder("sqlite"), batch, total))
            figures.append(
                Figure(
                    key=f"store.events_{writers}x{batch}",
                    what=f"events stored, {writers} writer{'s' * (writers > 1)}, batches of {batch}",
                    unit="/s",
                    carrel=Summary.of(carrel),
                    bare=Summary.of(bare),
                    note="bare: sqlite3, one writer, the same rows",
                )
            )
    return figures + await _postgres(bench)


async def _postgres(bench: Bench) -> list[Figure]:
    """The same on PostgreSQL over a unix socket, without its flushes to the disk; none where it is not installed."""
    programs = postgres_programs()
    if programs is None:
        return []
    from carrel.store.postgres import PostgresStore

    server = await asyncio.to_thread(PostgresServer, programs)
    try:
        await asyncio.to_thread(server.start)
        figures = []
        for writers, batch in ((1, 10), (20, 10)):
            total = bench.times(10_000, 500)
            carrel = [
                await _measure(partial(PostgresStore, server.database()), writers, batch, total)
                for _ in range(bench.times(3, 1))
            ]
            figures.append(
                Figure(
                    key=f"store.postgres_events_{writers}x{batch}",
                    what=f"events stored in PostgreSQL, {writers} writer{'s' * (writers > 1)}, batches of {batch}",
                    unit="/s",
                    carrel=Summary.of(carrel),
                    note="PostgreSQL on the same machine, fsync off",
                )
            )
        return figures
    finally:
        await asyncio.to_thread(server.remove)


async def _carrel(folder: Path, writers: int, batch: int, total: int) -> float:
    return await _measure(partial(SqliteStore, folder / "carrel.db"), writers, batch, total)


async def _measure(make: Callable[..., abc.Store], writers: int, batch: int, total: int) -> float:
    published = 0

    def count(events: list[object]) -> None:
        nonlocal published
        published += len(events)

    rounds = max(1, total // (writers * batch))
    async with AsyncExitStack() as stack:
        rows = make(on_commit=count)
        await rows.start(stack)
        sessions = [await _session(rows) for _ in range(writers)]

        async def write(session: str) -> None:
            for _ in range(rounds):
                events = [_event() for _ in range(batch)]
                await rows.write(lambda tx: tx.events.append(session, events))  # noqa: B023

        begun = time.perf_counter()
        await asyncio.gather(*(write(session) for session in sessions))
        seconds = time.perf_counter() - begun
    if published != rounds * writers * batch:
        raise RuntimeError(f"{published} events published of {rounds * writers * batch}")
    return published / seconds


async def _session(rows: abc.Store) -> str:
    def add(tx: abc.Transaction) -> str:
        now = utc_now()
        session = Session(
            id=new_id(),
            number=tx.sessions.next_number(),
            owner=ADMIN.user,
            status=SessionStatus.IDLE,
            spec={},
            created_at=now,
            last_active_at=now,
        )
        tx.sessions.add(session)
        return session.id

    return await rows.write(add)


def _event() -> NewEvent:
    return NewEvent.of(MessageAssistant(message_id="msg_1", block=0, text=_TEXT), at=utc_now(), turn_id="t")


def _bare(folder: Path, batch: int, total: int) -> float:
    """What SQLite itself gives from Python: WAL, the same durability, the same columns."""
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("CREATE TABLE events (s TEXT, n INT, t TEXT, k TEXT, at TEXT, d TEXT, PRIMARY KEY (s, n))")
        begun = time.perf_counter()
        for start in range(0, total, batch):
            at = utc_now().isoformat()
            rows = [
                ("s", n, "t", "message.assistant", at, _event().model_dump_json()) for n in range(start, start + batch)
            ]
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
        return total / (time.perf_counter() - begun)


MEASUREMENTS = {"store": store}
