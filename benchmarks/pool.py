"""New sessions from a warm pool, one after the other; and twenty at once that start cold: as processes, and as containers."""

from __future__ import annotations

import asyncio
import time
from asyncio.subprocess import PIPE
from pathlib import Path

from benchmarks.figures import Figure, Summary
from benchmarks.first_token import PROMPT, Trial
from benchmarks.harness import Bench, alternately, turn_frames

_WAIT_SECONDS = 1.5
"""A pool is filled while nobody is in a hurry: what is measured is not the filling."""


async def pool(bench: Bench, runtime: str = "local") -> list[Figure]:
    """Create a session and get its first token, beside the first turn of a client that is connected already."""
    trial, cold = Trial(bench), 0
    data = bench.folder("data")
    async with bench.server(data, runtime=runtime, warm_pool=3) as server, bench.bare() as bare:
        await asyncio.sleep(3 * _WAIT_SECONDS)

        async def of_carrel() -> None:
            nonlocal cold
            connection = await server.connect()  # one that rests for seconds is closed by the server
            since = time.time()
            made = await connection.ask("POST", "/api/v1/sessions", {})
            cold += made["status"] != "ready"
            await trial.of_carrel(connection, str(made["id"]), since)
            await connection.ask("DELETE", f"/api/v1/sessions/{made['id']}")
            await connection.close()
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
    note = (
        f"bare: the first query of a client that is connected; {cold} found the pool empty{await _left(data, runtime)}"
    )
    what = f"create a session, first token, warm pool{_of(runtime)}"
    return [trial.figure(f"first_token.pool{_key(runtime)}", what, note)]


async def at_once(bench: Bench, runtime: str = "local") -> list[Figure]:
    """Twenty sessions at once, each with its first prompt, no pool."""
    samples: list[float] = []
    data = bench.folder("data")
    async with bench.server(data, runtime=runtime) as server:

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
    note = f"{left} processes of sandboxes left" + await _left(data, runtime)
    return [
        Figure(
            key=f"first_token.cold.20{_key(runtime)}",
            what=f"create a session, first token, 20 at once cold{_of(runtime)}",
            unit="ms",
            carrel=Summary.of(samples),
            note=note,
        )
    ]


async def docker_pool(bench: Bench) -> list[Figure]:
    """The same with a container for every session."""
    return await pool(bench, "docker")


async def docker_at_once(bench: Bench) -> list[Figure]:
    """The same with a container for every session."""
    return await at_once(bench, "docker")


def _key(runtime: str) -> str:
    return "" if runtime == "local" else f".{runtime}"


def _of(runtime: str) -> str:
    return "" if runtime == "local" else ", containers"


async def _left(data: Path, runtime: str) -> str:
    """How many containers there are when the server has ended."""
    if runtime != "docker":
        return ""
    label = f"label=carrel.installation={(data / 'installation').read_text().strip()}"
    listing = await asyncio.create_subprocess_exec("docker", "ps", "-aq", "--filter", label, stdout=PIPE)
    names = (await listing.communicate())[0].split()
    return f"; {len(names)} containers when the server has ended"


MEASUREMENTS = {"pool": pool, "at_once": at_once}
CONTAINERS = {"docker_pool": docker_pool, "docker_at_once": docker_at_once}
"""These want an engine with the images, and are asked for by name."""
