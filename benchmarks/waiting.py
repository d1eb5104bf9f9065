"""What it costs to wait for people: ten thousand calls that nobody has answered, in ten thousand sessions."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import psutil

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench
from benchmarks.memory import memory
from carrel import abc
from carrel.model import (
    ADMIN,
    Interaction,
    InteractionKind,
    Session,
    SessionStatus,
    StopReason,
    Turn,
    TurnStatus,
    new_id,
    utc_now,
)
from carrel.protocol.link import digest_of
from carrel.store import SqliteStore

_WAITING = 10_000
_PAGE = 50
_SETTLE_SECONDS = 20.0
"""Longer than the reconciler takes to come round."""


async def waiting(bench: Bench) -> list[Figure]:
    """Fifty to a page, from the oldest to the newest; the gateway's memory and processes beside those of an empty one."""
    count = bench.times(_WAITING, 1_000)
    samples: list[float] = []
    with_none = await _measure(bench, bench.folder("waiting-none"))
    data = bench.folder("waiting")
    await _fill(data, count)
    async with bench.server(data) as server:
        await asyncio.sleep(_SETTLE_SECONDS)
        with_all = memory(psutil.Process(server.process.pid)).private
        sandboxes = len(server.sandbox_processes())
        connection = await server.connect()
        cursor = ""
        for _ in range(count // _PAGE):
            begun = time.perf_counter()
            page = await connection.ask("GET", f"/api/v1/interactions?status=pending&limit={_PAGE}{cursor}")
            samples.append((time.perf_counter() - begun) * 1000)
            if len(page["data"]) != _PAGE:
                raise RuntimeError("the list is shorter than what was put in")
            cursor = f"&cursor={page['next_cursor']}"
        await connection.close()
    if sandboxes:
        raise RuntimeError(f"{sandboxes} processes were started for sessions that wait")
    return [
        Figure(
            key="waiting.page",
            what=f"list {count:,} pending interactions, page of {_PAGE}",
            unit="ms",
            carrel=Summary.of(samples),
        ),
        Figure(
            key="waiting.memory",
            what=f"the gateway's private memory for {count:,} sessions that wait for people",
            unit="MB",
            carrel=Summary.of([with_all]),
            bare=Summary.of([with_none]),
            note="beside a gateway without sessions; no process but the gateway's own",
        ),
    ]


async def _measure(bench: Bench, data: Path) -> float:
    async with bench.server(data) as server:
        await asyncio.sleep(_SETTLE_SECONDS)
        return memory(psutil.Process(server.process.pid)).private


async def _fill(data: Path, count: int) -> None:
    async with AsyncExitStack() as stack:
        store = SqliteStore(data / "carrel.db")
        await store.start(stack)
        for start in range(0, count, 1000):
            await store.write(lambda tx, n=min(1000, count - start): _add(tx, n))  # type: ignore[misc]


def _add(tx: abc.Transaction, count: int) -> None:
    for _ in range(count):
        now, given = utc_now(), {"command": "git push origin main", "description": "Push"}
        session = Session(
            id=new_id(),
            number=tx.sessions.next_number(),
            owner=ADMIN.user,
            status=SessionStatus.WAITING,
            stop_reason=StopReason.REQUIRES_ACTION,
            spec={"permission_mode": "default"},
            cost_usd=0.0,
            created_at=now,
            last_active_at=now,
        )
        turn = Turn(
            id=new_id(), session_id=session.id, number=1, status=TurnStatus.WAITING, created_at=now, started_at=now
        )
        tx.sessions.add(session)
        tx.turns.add(turn)
        tx.interactions.add(
            Interaction(
                id=new_id(),
                session_id=session.id,
                owner=session.owner,
                turn_id=turn.id,
                kind=InteractionKind.PERMISSION,
                title="Bash: git push origin main",
                tool="Bash",
                tool_use_id=f"toolu_{session.number}",
                input=given,
                input_digest=digest_of("Bash", given),
                reason="no rule allows it",
                suggestions=("Bash(git push origin main)",),
                created_at=now,
                lone=True,
            )
        )


MEASUREMENTS = {"waiting": waiting}
