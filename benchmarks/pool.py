"""New sessions from a warm pool, one after the other; and twenty at once that start cold."""

from __future__ import annotations

import asyncio
import time

from benchmarks.figures import Figure, Summary
from benchmarks.first_token import PROMPT, Trial
from benchmarks.harness import Bench, alternately, turn_frames

_WAIT_SECONDS = 1.5
"""A pool is filled while nobody is in a hurry: what is measured is not the filling."""


async def pool(bench: Bench) -> list[Figure]:
    """Create a session and get its first token, beside the first turn of a client that is connected already."""
    trial, cold = Trial(bench), 0
    async with bench.server(warm_pool=3) as server, bench.bare() as bare:
        connection = await server.connect()
        await asyncio.sleep(3 * _WAIT_SECONDS)

        async def of_carrel() -> None:
            nonlocal cold
            since = time.time()
            made = await connection.ask("POST", "/api/v1/sessions", {})
            cold += made["status"] != "ready"
            await trial.of_carrel(connection, str(made["id"]), since)
            await connection.ask("DELETE", f"/api/v1/sessions/{made['id']}")
            await asyncio.sleep(_WAIT_SECONDS)

        async def of_bare() -> None:
            await bench.model.marks()
            await bare.do("connect")
            await asyncio.sleep(_WAIT_SECONDS)
            await trial.of_bare(await bare.do("query", prompt=PROMPT))
            await bare.do("disconnect")

        await alternately(1, of_carrel, of_bare)
        trial.forget()
        cold = 0
        await alternately(bench.times(100, 3), of_carrel, of_bare)
        await connection.close()
    note = f"bare: the first query of a client that is connected; {cold} found the pool empty"
    return [trial.figure("first_token.pool", "create a session, first token, warm pool", note)]


async def at_once(bench: Bench) -> list[Figure]:
    """Twenty sessions at once, each with its first prompt, no pool."""
    samples: list[float] = []
    async with bench.server() as server:

        async def one() -> None:
            connection = await server.connect()
            begun = time.time()
            session = str((await connection.ask("POST", "/api/v1/sessions", {}))["id"])
            first = None
            async for frame in turn_frames(connection, session, PROMPT):
                if frame.event == "delta":
                    first = first or frame.at
            samples.append(((first or time.time()) - begun) * 1000)
            await connection.ask("DELETE", f"/api/v1/sessions/{session}")
            await connection.close()

        for _ in range(bench.times(3, 1)):
            await asyncio.gather(*(one() for _ in range(bench.times(20, 4))))
        left = len(server.sandbox_processes())
    note = f"{left} processes of sandboxes left"
    return [
        Figure(
            key="first_token.cold.20",
            what="create a session, first token, 20 at once cold",
            unit="ms",
            carrel=Summary.of(samples),
            note=note,
        )
    ]


MEASUREMENTS = {"pool": pool, "at_once": at_once}
