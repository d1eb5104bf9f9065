"""Runs for a long time and watches what grows: `python -m benchmarks.soak [--minutes N]`.

Twenty users, each with a key of their own, ask for turns with tools all the time: more than may work at once, so that
some always wait, and under a limit on memory, so that sandboxes are freed and woken. Forks, deletions, streams and
files are mixed in. Before and after, with nothing at work, everything is counted; meanwhile memory is sampled.
Ends with 1 where something has leaked or failed, and writes what was found to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Bench, Server, machine, turn_frames, until
from benchmarks.memory import memory
from carrel.model import utc_now

RESULTS = Path(__file__).with_name("results")
USERS = 20
SESSIONS_PER_USER = 2
TURNS_AT_ONCE = 4
IDLE_SECONDS = 2.0
MEMORY_MB = 1400
SLOPE_MB_A_MINUTE = 1.0
JUDGED = ("processes", "folders", "descriptors", "parent_descriptors", "tasks")
"""What may not be more at the end. Threads are shown alone: their pools fill up to a bound whenever all are busy."""
SAMPLE_SECONDS = 2.0
# The road to the model keeps connections open for five seconds, a client's own for as long.
_SETTLE_SECONDS = 12.0
_PROMPT = "[[count: 20]] [[bash: echo {word} > mine.txt; cat mine.txt]]"

Json = dict[str, Any]


@dataclass(frozen=True)
class Count:
    """What there is while nothing is at work."""

    processes: int
    folders: int
    descriptors: int
    parent_descriptors: int
    tasks: int
    threads: int


@dataclass
class Work:
    """What was done, and what went wrong."""

    turns: Counter[str] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class User:
    """One user with a key of their own and two sessions."""

    def __init__(self, name: str, server: Server, key: str, work: Work, chance: random.Random) -> None:
        self._name = name
        # The same server, asked with this user's key.
        self._server = Server(server.process, server.data, replace(server.address, key=key))
        self._work = work
        self._chance = chance
        self._sessions: list[str] = []

    async def begin(self) -> None:
        """Make the sessions, and do everything once: from here on nothing is the first of its kind, and pools are full."""
        self._sessions = [await self._server.session() for _ in range(SESSIONS_PER_USER)]
        for session in self._sessions:
            await self._turn(session)
            for do in (self._fork, self._read, self._stream):
                await do(session)

    async def go_on(self, deadline: float) -> None:
        """Work until the time is over."""
        while time.monotonic() < deadline:
            session = self._chance.choice(self._sessions)
            try:
                await self._turn(session)
                await self._chance.choice([self._fork, self._read, self._stream, self._rest])(session)
            except Exception as error:
                self._work.wrong.append(f"{self._name}, session {session}: {error!r}")
                await asyncio.sleep(1)

    async def _turn(self, session: str) -> None:
        word = f"{session[-6:]}-{self._chance.randrange(10**6)}"
        begun = time.monotonic()
        result = await self._server.run(session, _PROMPT.format(word=word))
        self._work.waited.append(time.monotonic() - begun)
        self._work.turns[self._name] += 1
        if [call["result"] for call in result["tool_calls"]] != [word]:
            raise RuntimeError(f"its tool said {result['tool_calls']}, not {word}")

    async def _fork(self, session: str) -> None:
        fork = await self._server.ask("POST", f"/sessions/{session}/fork", {})
        await self._server.ask("DELETE", f"/sessions/{fork['id']}")
        self._work.other["forks"] += 1

    async def _read(self, session: str) -> None:
        await self._server.ask("GET", f"/sessions/{session}/files")
        await self._server.ask("GET", "/sessions?limit=50")
        self._work.other["reads"] += 1

    async def _stream(self, session: str) -> None:
        connection = await self._server.connect()
        try:
            async for _ in turn_frames(connection, session, "[[count: 10]]"):
                pass
        finally:
            await connection.close()
        self._work.turns[self._name] += 1
        self._work.other["streams"] += 1

    async def _rest(self, session: str) -> None:
        await asyncio.sleep(self._chance.uniform(0, 2 * IDLE_SECONDS))

    async def check_logs(self) -> None:
        """Every log is whole."""
        for session in self._sessions:
            after = 0
            while events := (await self._server.ask("GET", f"/sessions/{session}/events?limit=1000&after={after}"))[
                "data"
            ]:
                if [event["seq"] for event in events] != list(range(after + 1, after + 1 + len(events))):
                    self._work.wrong.append(f"session {session}: its log has gaps")
                after = events[-1]["seq"]


def open_files(pid: int) -> Counter[str]:
    """What the descriptors of a process are: the names of files, and `socket`, `pipe` and the like."""
    found: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # closed meanwhile
            found[os.path.basename(os.readlink(entry.path)).partition(":")[0]] += 1
    return found


async def count(server: Server, session: str) -> Count:
    """Run one turn alone, wait until its process has been freed, then count.

    The road to the model closes connections that it has no more use for when it is next used, and not before: so both
    counts are made behind the same use of it.
    """
    await asyncio.sleep(_SETTLE_SECONDS)
    await server.run(session, "[[say: alone]]")

    async def freed() -> bool:
        return not server.sandbox_processes()

    with suppress(TimeoutError):  # whoever is left is counted
        await until("every sandbox has ended", freed)
    await asyncio.sleep(_SETTLE_SECONDS)
    held = await server.held()
    (parent,) = server.children()
    with os.scandir(server.data / "sandboxes") as entries:
        folders = sum(entry.is_dir() for entry in entries)
    return Count(
        processes=len(server.sandbox_processes()),
        folders=folders,
        descriptors=psutil.Process(server.process.pid).num_fds(),
        parent_descriptors=parent.num_fds(),
        tasks=held["tasks"],
        threads=held["threads"],
    )


async def sample(server: Server, into: list[tuple[float, float]]) -> None:
    """The gateway's own memory (MB), every few seconds."""
    gateway = psutil.Process(server.process.pid)
    begun = time.monotonic()
    while True:
        into.append((time.monotonic() - begun, memory(gateway).private))
        await asyncio.sleep(SAMPLE_SECONDS)


def slope(samples: list[tuple[float, float]], *, after_seconds: float) -> float:
    """By how many MB a minute memory grew, from a point in time on (least squares)."""
    late = [(seconds / 60, mb) for seconds, mb in samples if seconds >= after_seconds]
    if len(late) < 3:
        return 0.0
    return statistics.linear_regression([x for x, _ in late], [y for _, y in late]).slope


async def soak(minutes: float) -> Json:
    """Count, work, count; answers what was found."""
    work = Work()
    samples: list[tuple[float, float]] = []
    settings: dict[str, Any] = {
        "idle_timeout_seconds": IDLE_SECONDS,
        "limits": {"max_concurrent_turns": TURNS_AT_ONCE, "memory_mb": MEMORY_MB, "memory_wait_seconds": 120},
    }
    async with Bench.open(quick=False) as bench, bench.server(**settings) as server:
        users = []
        for number in range(USERS):
            name = f"user-{number:02}"
            key = (await server.ask("POST", "/keys", {"user": name}))["key"]
            users.append(User(name, server, key, work, random.Random(number)))
        await asyncio.gather(*(user.begin() for user in users))
        own = await server.session()
        before = await count(server, own)
        files = open_files(server.process.pid)
        print(f"before: {before}", flush=True)
        for done in (work.turns, work.other, work.waited):
            done.clear()
        watching = asyncio.create_task(sample(server, samples), name="sample")
        deadline = time.monotonic() + minutes * 60
        await asyncio.gather(*(user.go_on(deadline) for user in users))
        watching.cancel()
        after = await count(server, own)
        more = dict(open_files(server.process.pid) - files)
        print(f"after:  {after}", flush=True)
        await asyncio.gather(*(user.check_logs() for user in users))
    return _found(minutes, before, after, samples, work) | {"descriptors_gained": more}


def _found(minutes: float, before: Count, after: Count, samples: list[tuple[float, float]], work: Work) -> Json:
    # What is filled once (pools, caches, prepared statements) is full by the end of the second minute.
    judged = minutes >= 4
    begun = 120.0 if judged else minutes * 30
    grew = slope(samples, after_seconds=begun)
    wrong = list(work.wrong)
    for name in JUDGED:
        was, now = getattr(before, name), getattr(after, name)
        if now > was:
            wrong.append(f"{name}: {was} became {now}")
    if judged and grew >= SLOPE_MB_A_MINUTE:
        wrong.append(f"memory grew by {grew:.2f} MB a minute")
    turns = sorted(work.turns.values())
    return {
        "at": utc_now().isoformat(),
        "machine": machine(),
        "minutes": minutes,
        "users": USERS,
        "turns_at_once": TURNS_AT_ONCE,
        "turns": sum(turns),
        "turns_of_a_user": {"fewest": turns[0] if turns else 0, "most": turns[-1] if turns else 0},
        "turn_seconds": {"median": round(statistics.median(work.waited), 2), "longest": round(max(work.waited), 2)},
        "also": dict(work.other),
        "memory_mb": {"first": round(samples[0][1], 1), "last": round(samples[-1][1], 1)},
        "slope_mb_a_minute": round(grew, 3),
        "slope_judged": judged,
        "slope_from_second": begun,
        "before": asdict(before),
        "after": asdict(after),
        "wrong": wrong,
    }


def write(found: Json) -> None:
    """Put what was found beside the other figures."""
    RESULTS.mkdir(exist_ok=True)
    name = f"soak-{found['at'][:10]}"
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["machine"].items())
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in found.items() if key != "machine")
    (RESULTS / "soak-latest.md").write_text(f"# Soak\n\nMachine: {told}.\n\n| what | found |\n|---|---|\n{rows}\n")


def main() -> int:
    """Soak; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description="Run for a long time and watch what grows.")
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long (default: 10)")
    parser.add_argument("--no-results", action="store_true", help="write nothing to benchmarks/results")
    given = parser.parse_args()
    found = asyncio.run(soak(given.minutes))
    if not given.no_results:
        write(found)
    print(json.dumps({name: value for name, value in found.items() if name != "machine"}, indent=1))
    print(
        "\n".join(["LEAKED OR FAILED:", *found["wrong"]]) if found["wrong"] else "Nothing has leaked, nothing failed."
    )
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
