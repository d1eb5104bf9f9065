"""One session, many subscribers: how many frames a second reach them, and how late."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench, Server, said, spawned, until

_GOAL_PER_SECOND = 30_000
_CROWDS = 2


@dataclass(frozen=True)
class _Load:
    """A count that the model says while all listen."""

    subscribers: int
    numbers: int
    per_second: int | None = None

    @property
    def crowd(self) -> str:
        return f"{self.subscribers:,} subscriber{'s' * (self.subscribers > 1)}"

    @property
    def prompt(self) -> str:
        pace = f" @{self.per_second}" if self.per_second else ""
        return f"[[count: {self.numbers}{pace}]]"


async def fanout(bench: Bench) -> list[Figure]:
    """To 1, 100 and 1,000 subscribers: as fast as it goes, at the goal's pace, and at a third of it."""
    figures = []
    async with bench.server() as server:
        session = await server.session()
        await server.run(session, "hello")
        for subscribers, numbers in ((1, 20_000), (100, 5_000), (1000, 600)):
            burst = _Load(subscribers, numbers // bench.times(1, 10))
            figures.append(
                _rate(f"burst_{subscribers}", "as fast as it goes", burst, await _run(server, session, burst))
            )
            # One subscriber gets no more than one agent says.
            paces = {"goal": _GOAL_PER_SECOND, "third": _GOAL_PER_SECOND // 3} if subscribers > 1 else {"calm": 1000}
            for name, pace in paces.items():
                rate = pace // subscribers
                load = _Load(subscribers, max(10, rate * bench.times(6, 1)), rate)
                figures += await _paced(bench, server, session, name, load)
    return figures


async def _paced(bench: Bench, server: Server, session: str, name: str, load: _Load) -> list[Figure]:
    await bench.model.trace(True)
    await bench.model.marks()
    told = await _run(server, session, load)
    numbers: dict[str, float] = {}
    for mark in await bench.model.marks():
        numbers |= mark["numbers"]
    await bench.model.trace(False)
    late = [
        (at - numbers[number]) * 1000
        for crowd in told
        for number, received in crowd["received"].items()
        for at in received
        if number in numbers
    ]
    asked = load.subscribers * (load.per_second or 0)
    achieved = _per_second(told)
    return [
        Figure(
            key=f"fanout.{name}_{load.subscribers}",
            what=f"{load.crowd}, {asked:,}/s asked: from the model to the subscriber",
            unit="ms",
            carrel=Summary.of(late),
            note=f"{achieved:,.0f}/s delivered",
        )
    ]


def _rate(key: str, how: str, load: _Load, told: list[dict[str, Any]]) -> Figure:
    frames = sum(crowd["frames"] for crowd in told)
    return Figure(
        key=f"fanout.{key}",
        what=f"{load.crowd}, {how}",
        unit="/s",
        carrel=Summary.of([_per_second(told)]),
        note=f"{frames:,} deliveries, of {load.numbers * load.subscribers:,} deltas said",
    )


def _per_second(told: list[dict[str, Any]]) -> float:
    frames = sum(crowd["frames"] for crowd in told)
    return float(frames / (max(crowd["last"] for crowd in told) - min(crowd["first"] for crowd in told)))


async def _at_rest(server: Server) -> None:
    """Wait until the gateway has done what a thousand new subscribers ask of it: each reads the store twice."""
    gateway = psutil.Process(server.process.pid)

    async def check() -> bool:
        used = sum(gateway.cpu_times()[:2])
        await asyncio.sleep(0.3)
        return sum(gateway.cpu_times()[:2]) - used < 0.03

    await until("the gateway is at rest", check)


async def _run(server: Server, session: str, load: _Load) -> list[dict[str, Any]]:
    """Have all subscribe, have the model count, and gather what they say."""
    seen = (await server.ask("GET", f"/sessions/{session}"))["last_seq"]
    crowds = min(_CROWDS, load.subscribers)
    async with AsyncExitStack() as stack:
        processes = []
        for _ in range(crowds):
            options = {
                "host": server.address.host,
                "port": server.address.port,
                "key": server.address.key,
                "path": f"/api/v1/sessions/{session}/events?after={seen - 1}&deltas=true",
                "count": load.subscribers // crowds,
                "traced": load.per_second is not None,
            }
            processes.append(await stack.enter_async_context(spawned("benchmarks.subscribers", json.dumps(options))))
        for process in processes:
            await said(process)
        await _at_rest(server)
        await server.ask("POST", f"/sessions/{session}/turns", {"prompt": load.prompt})
        told = list(await asyncio.gather(*(said(process) for process in processes)))
    if lost := sum(crowd["lost"] for crowd in told):
        raise RuntimeError(f"{lost} subscribers lost their connection")
    return told


MEASUREMENTS = {"fanout": fanout}
