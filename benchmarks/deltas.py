"""How many deltas a second pass through one stream, while the model speaks as fast as it can."""

from __future__ import annotations

import time

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bench, alternately
from benchmarks.wire import Connection

_MARK = b"event: delta\n"


async def deltas(bench: Bench) -> list[Figure]:
    """From the first delta to the last, beside the bare SDK's stream events."""
    wanted = bench.times(20_000, 2_000)
    prompt = f"[[count: {wanted}]]"
    carrel: list[float] = []
    bare_rates: list[float] = []
    received: list[int] = []
    async with bench.server() as server, bench.bare() as bare:
        connection, session = await server.connect(), await server.session()
        await server.run(session, "hello")
        await bare.do("cold", prompt="hello")

        async def of_carrel() -> None:
            pieces, seconds = await _receive(connection, session, prompt)
            received.append(pieces)
            carrel.append(pieces / seconds)

        async def of_bare() -> None:
            told = await bare.do("query", prompt=prompt)
            bare_rates.append(told["pieces"] / (told["last"] - told["first"]))

        await alternately(bench.times(5, 1), of_carrel, of_bare)
        await connection.close()
    return [
        Figure(
            key="deltas.one_stream",
            what="deltas through one stream",
            unit="/s",
            carrel=Summary.of(carrel),
            bare=Summary.of(bare_rates),
            note=f"{min(received):,} of {wanted:,} came one by one",
        )
    ]


async def _receive(connection: Connection, session: str, prompt: str) -> tuple[int, float]:
    pieces, first, last = 0, 0.0, 0.0
    async for chunk in connection.stream("POST", f"/api/v1/sessions/{session}/turns", {"prompt": prompt}):
        if here := chunk.count(_MARK):
            last = time.perf_counter()
            first = first or last
            pieces += here
    return pieces, last - first


MEASUREMENTS = {"deltas": deltas}
