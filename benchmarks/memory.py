"""What sessions cost: memory of live and idle ones, of the gateway beside them, and the list of very many."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench, Server, gather_bounded, until
from benchmarks.wire import Connection
from carrel import abc
from carrel.model import ADMIN, Session, SessionStatus, new_id, utc_now
from carrel.protocol.events import NewEvent, SessionCreated
from carrel.store import SqliteStore

_PROMPT = "[[count: 5 @100]]"
_SETTLE_SECONDS = 2.0
_LISTED = 10_000
_PAGE = 50


@dataclass
class Memory:
    """Of one process or of several, in MB: its own, resident, and its share of what is common (`pss`)."""

    private: float = 0.0
    resident: float = 0.0
    pss: float = 0.0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.private + other.private, self.resident + other.resident, self.pss + other.pss)


def memory(process: psutil.Process) -> Memory:
    """What the kernel says of a process now."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    except PermissionError:
        # Not ours to look into (a runner cannot be dumped, and we are not root): what it has for itself is near enough.
        told = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        private, resident = (int(told[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS"))
        return Memory(private, resident, private)
    sizes = {line.split()[0].rstrip(":"): int(line.split()[1]) / 1024 for line in lines}
    private = sum(size for name, size in sizes.items() if name in ("Private_Clean", "Private_Dirty"))
    return Memory(private, sizes["Rss"], sizes["Pss"])


@dataclass
class Tree:
    """A live session's processes, or the bare SDK's."""

    runner: Memory
    wall: Memory
    cli: Memory

    @property
    def all(self) -> Memory:
        """The whole of it."""
        return self.runner + self.wall + self.cli


def tree(root: psutil.Process) -> Tree:
    """The processes from `root` down. Everything below the CLI is the CLI's."""
    found = Tree(memory(root), Memory(), Memory())
    for process in root.children(recursive=True):
        if process.name() == "claude":
            found.cli += memory(process)
        else:
            found.wall += memory(process)
    return found


async def live(bench: Bench) -> list[Figure]:
    """Sessions whose agent is connected and has answered one turn."""
    count = bench.times(10, 2)
    async with bench.server() as server, bench.bare() as bare:
        before = memory(psutil.Process(server.process.pid))
        sessions = [await server.session() for _ in range(count)]
        for session in sessions:
            await server.run(session, _PROMPT)
        await bare.do("cold", prompt=_PROMPT)
        await asyncio.sleep(_SETTLE_SECONDS)
        (parent,) = server.children()
        trees = [tree(runner) for runner in parent.children()]
        bare_tree = tree(psutil.Process(bare.process.pid))
        gateway, nursery = memory(psutil.Process(server.process.pid)), memory(parent)
    if len(trees) != count:
        raise RuntimeError(f"{len(trees)} runners for {count} live sessions")
    return [
        _figure("live_private", "a live session, private", [t.all.private for t in trees], bare_tree.all.private),
        _figure("live_resident", "a live session, resident", [t.all.resident for t in trees], bare_tree.all.resident),
        _figure("live_pss", "a live session, its share", [t.all.pss for t in trees], bare_tree.all.pss),
        _figure("live_cli", "of that: the CLI, private", [t.cli.private for t in trees], bare_tree.cli.private),
        _figure(
            "live_over_cli",
            "of that: all but the CLI, private",
            [t.runner.private + t.wall.private for t in trees],
            bare_tree.runner.private,
            note="runner and wall; bare: the Python process",
        ),
        _figure("live_runner", "of that: the runner, private", [t.runner.private for t in trees]),
        _figure("parent", "the preloaded parent, private", [nursery.private]),
        _figure("gateway_0", "the gateway, nothing done yet, resident", [before.resident], note=_private(before)),
        _figure("gateway_live", f"the gateway, {count} live, resident", [gateway.resident], note=_private(gateway)),
    ]


async def idle(bench: Bench) -> list[Figure]:
    """A thousand sessions without a process, some of which have run; and a gateway that does nothing."""
    count = bench.times(1000, 50)
    seconds = bench.times(10, 2)
    ran: list[str] = []

    async with bench.server(idle_timeout_seconds=0.2) as server:

        async def one(connection: Connection) -> None:
            ran.append(str((await connection.ask("POST", "/api/v1/sessions", {}))["id"]))

        await gather_bounded(count, 20, one, server)
        for session in ran[: bench.times(5, 1)]:
            await server.run(session, _PROMPT)
        await until("every process is gone", lambda: _no_processes(server))
        await asyncio.sleep(_SETTLE_SECONDS)
        gateway = psutil.Process(server.process.pid)
        used = gateway.cpu_times()
        await asyncio.sleep(seconds)
        now = gateway.cpu_times()
        cpu = max(0.0, 100 * (now.user + now.system - used.user - used.system) / seconds)
        found, processes = memory(gateway), len(server.sandbox_processes())
    return [
        _figure("idle_processes", f"processes of {count} idle sessions", [processes], unit=""),
        _figure("gateway_1000_idle", f"the gateway, {count} idle, resident", [found.resident], note=_private(found)),
        _figure("gateway_cpu", f"the gateway at rest, CPU over {seconds} s", [cpu], unit="%"),
    ]


async def _no_processes(server: Server) -> bool:
    return not server.sandbox_processes()


async def listing(bench: Bench) -> list[Figure]:
    """Ten thousand idle sessions, fifty to a page, from the newest to the oldest."""
    data = bench.folder("listing")
    await _fill(data, _LISTED)
    samples: list[float] = []
    pages = bench.times(_LISTED // _PAGE, 20)
    async with bench.server(data) as server:
        connection = await server.connect()
        cursor = ""
        for _ in range(pages):
            begun = time.perf_counter()
            page = await connection.ask("GET", f"/api/v1/sessions?limit={_PAGE}{cursor}")
            samples.append((time.perf_counter() - begun) * 1000)
            if len(page["data"]) != _PAGE:
                raise RuntimeError("the list is shorter than what was put in")
            cursor = f"&cursor={page['next_cursor']}"
        await connection.close()
    what = f"list {_LISTED:,} idle sessions, page of {_PAGE}"
    return [Figure(key="listing.10000", what=what, unit="ms", carrel=Summary.of(samples))]


async def _fill(data: Path, count: int) -> None:
    async with AsyncExitStack() as stack:
        store = SqliteStore(data / "carrel.db")
        await store.start(stack)
        for start in range(0, count, 1000):
            await store.write(lambda tx, start=start: _add(tx, range(start, min(start + 1000, count))))  # type: ignore[misc]


def _add(tx: abc.Transaction, numbers: range) -> None:
    for _ in numbers:
        now = utc_now()
        session = Session(
            id=new_id(),
            number=tx.sessions.next_number(),
            owner=ADMIN.user,
            status=SessionStatus.IDLE,
            title="one of many",
            spec={"model": "scripted"},
            metadata={"project": "benchmarks"},
            cost_usd=0.0,
            created_at=now,
            last_active_at=now,
        )
        tx.sessions.add(session)
        tx.events.append(session.id, [NewEvent.of(SessionCreated(title=session.title), at=now)])


def _figure(
    key: str, what: str, samples: list[float], bare: float | None = None, *, unit: str = "MB", note: str = ""
) -> Figure:
    return Figure(
        key=f"memory.{key}",
        what=what,
        unit=unit,
        carrel=Summary.of(samples),
        bare=None if bare is None else Summary.of([bare]),
        note=note,
    )


def _private(found: Memory) -> str:
    return f"private {found.private:.0f} MB"


MEASUREMENTS = {"live": live, "idle": idle, "listing": listing}
