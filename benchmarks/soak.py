"""Runs for a long time and watches what grows: `python -m benchmarks.soak [--minutes N]`.

200 sessions are made at once; then, in rounds, 20 of them run a turn at the same time and all their processes are
freed again. After each round, with nothing at work, everything is counted. Ends with 1 where something has leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

import psutil

from benchmarks.harness import Bench, Server, gather_bounded, until
from benchmarks.memory import memory
from benchmarks.wire import Connection

_SESSIONS = 200
_AT_ONCE = 20
_WARM_UP_ROUNDS = 2
_SETTLE_SECONDS = 2.0
_PROMPT = "[[count: 50]] [[bash: echo {word} > mine.txt; cat mine.txt]]"


@dataclass(frozen=True)
class Count:
    """What there is while nothing is at work."""

    processes: int
    folders: int
    descriptors: int
    parent_descriptors: int
    tasks: int
    threads: int
    gateway_mb: float
    parent_mb: float


BOUNDS = Count(
    processes=0,
    folders=0,
    descriptors=25,
    parent_descriptors=0,
    tasks=10,
    threads=8,
    gateway_mb=20.0,
    parent_mb=3.0,
)
"""How much more the last count may have than the one after the warm-up: pools and caches fill, and no more.

Descriptors and tasks: connections kept open to the model, and keep-alive timers. Threads: the blocking pool. Memory:
the allocator's own ups and downs, and the pages of the database that SQLite keeps.
"""


async def count(server: Server) -> Count:
    """Wait until every process has been freed, then count."""

    async def freed() -> bool:
        return not server.sandbox_processes()

    with suppress(TimeoutError):  # whoever is left is counted
        await until("every sandbox has ended", freed)
    await asyncio.sleep(_SETTLE_SECONDS)
    held = await server.held()
    (parent,) = server.children()
    gateway = psutil.Process(server.process.pid)
    with os.scandir(server.data / "sandboxes") as entries:
        folders = sum(entry.is_dir() for entry in entries)
    return Count(
        processes=len(server.sandbox_processes()),
        folders=folders,
        descriptors=gateway.num_fds(),
        parent_descriptors=parent.num_fds(),
        tasks=held["tasks"],
        threads=held["threads"],
        gateway_mb=round(memory(gateway).private, 1),
        parent_mb=round(memory(parent).private, 1),
    )


def grown(before: Count, after: Count) -> list[str]:
    """What has grown beyond its bound, in words."""
    found = []
    for field in fields(Count):
        was, now, bound = (getattr(one, field.name) for one in (before, after, BOUNDS))
        if now > was + bound:
            found.append(f"{field.name}: {was} became {now}, which is more than {bound} more")
    return found


async def soak(minutes: float) -> list[str]:
    """Make, run, count; answers what is wrong."""
    wrong: list[str] = []
    async with Bench.open(quick=False) as bench, bench.server(idle_timeout_seconds=0.5) as server:
        sessions = await _make(server)
        deadline = time.monotonic() + minutes * 60
        before = after = await count(server)
        print(f"{len(sessions)} sessions made: {_shown(before)}", flush=True)
        rounds = 0
        while rounds <= _WARM_UP_ROUNDS or time.monotonic() < deadline:
            rounds += 1
            begun = time.monotonic()
            wrong += await _round(server, random.sample(sessions, _AT_ONCE))
            seconds = time.monotonic() - begun
            after = await count(server)
            if rounds == _WARM_UP_ROUNDS:
                before = after
            print(f"round {rounds}, {_AT_ONCE} turns in {seconds:.1f} s: {_shown(after)}", flush=True)
        print(f"after the warm-up: {_shown(before)}\nat the end:        {_shown(after)}")
    return wrong + grown(before, after)


async def _make(server: Server) -> list[str]:
    sessions: list[str] = []

    async def one(connection: Connection) -> None:
        sessions.append(str((await connection.ask("POST", "/api/v1/sessions", {}))["id"]))

    await gather_bounded(_SESSIONS, _SESSIONS, one, server)
    return sessions


async def _round(server: Server, chosen: list[str]) -> list[str]:
    """Twenty turns at once. Each must succeed, hold its own words, and have a log without gaps."""

    async def one(session: str) -> str | None:
        word = f"{session[-6:]}-{random.randrange(10**6)}"
        try:
            result = await server.run(session, _PROMPT.format(word=word))
            events = (await server.ask("GET", f"/sessions/{session}/events?limit=1000"))["data"]
        except RuntimeError as error:
            return f"session {session}: {error}"
        if [call["result"] for call in result["tool_calls"]] != [word]:
            return f"session {session}: its tool said {result['tool_calls']}, not {word}"
        if [event["seq"] for event in events] != list(range(1, len(events) + 1)):
            return f"session {session}: its log has gaps"
        return None

    return [told for told in await asyncio.gather(*(one(session) for session in chosen)) if told]


def _shown(found: Count) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(found).items())


def main() -> int:
    """Soak; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description="Run for a long time and watch what grows.")
    parser.add_argument("--minutes", type=float, default=2.0, help="for how long (default: 2)")
    wrong = asyncio.run(soak(parser.parse_args().minutes))
    print("\n".join(["LEAKED OR FAILED:", *wrong]) if wrong else "Nothing has grown beyond its bounds.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
