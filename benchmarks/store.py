"""Events stored a second: the store alone, in this process, on a file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import AsyncExitStack, closing
from pathlib import Path

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench
from carrel import abc
from carrel.auth.principals import ADMIN
from carrel.model import Session, SessionStatus, new_id, utc_now
from carrel.protocol.events import MessageAssistant, NewEvent
from carrel.store import SqliteStore

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
    return figures


async def _carrel(folder: Path, writers: int, batch: int, total: int) -> float:
    published = 0

    def count(events: list[object]) -> None:
        nonlocal published
        published += len(events)

    rounds = max(1, total // (writers * batch))
    async with AsyncExitStack() as stack:
        rows = SqliteStore(folder / "carrel.db", on_commit=count)  # type: ignore[arg-type]
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
            owner=ADMIN.name,
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
