"""Creating sessions: one after the other, and twenty at once."""

from __future__ import annotations

import time

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench, gather_bounded
from benchmarks.wire import Connection

_AT_ONCE = 20


async def create(bench: Bench) -> list[Figure]:
    """POST /sessions. The bare SDK has nothing like it: its counterpart is the client's connect."""
    samples: list[float] = []

    async def one(connection: Connection) -> None:
        begun = time.perf_counter()
        await connection.ask("POST", "/api/v1/sessions", {"title": "a session"})
        samples.append((time.perf_counter() - begun) * 1000)

    async with bench.server() as server, bench.bare() as bare:
        await bench.model.marks()
        await gather_bounded(20, 1, one, server)
        samples.clear()
        await gather_bounded(bench.times(300, 20), 1, one, server)
        alone = Summary.of(samples)
        samples.clear()
        begun = time.perf_counter()
        total = bench.times(2000, 100)
        await gather_bounded(total, _AT_ONCE, one, server)
        per_second = total / (time.perf_counter() - begun)
        requests, processes = len(await bench.model.marks()), len(server.sandbox_processes())
        connects = []
        for _ in range(bench.times(5, 1)):
            told = await bare.do("connect")
            connects.append((told["connected"] - told["sent"]) * 1000)
            await bare.do("disconnect")
    return [
        Figure(
            key="create.alone",
            what="create a session",
            unit="ms",
            carrel=alone,
            bare=Summary.of(connects),
            note="bare: connect",
        ),
        Figure(key="create.20", what="create a session, 20 at once", unit="ms", carrel=Summary.of(samples)),
        Figure(key="create.rate", what="sessions created, 20 at once", unit="/s", carrel=Summary.of([per_second])),
        Figure(
            key="create.model_requests",
            what="model requests by all of these",
            unit="",
            carrel=Summary.of([requests]),
            note=f"and {processes} processes of sandboxes",
        ),
    ]


MEASUREMENTS = {"create": create}
