"""Time to the first token: of a session that is ready, of a new one, of one that has to be woken."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from benchmarks.figures import Figure, Summary
from benchmarks.harness import Bare, Bench, alternately, turn_frames
from benchmarks.wire import Connection

# Paced, as a model is: the answer's beginning and its end do not come in one piece.
PROMPT = "[[count: 5 @100]]"
_IDLE_SECONDS = 0.2

Json = dict[str, Any]


class Trial:
    """Pairs of samples, and how long each hop of each took."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.carrel: list[float] = []
        self.bare: list[float] = []
        self.hops: dict[str, list[float]] = {}
        self.bare_hops: dict[str, list[float]] = {}

    async def of_carrel(self, connection: Connection, session: str, since: float | None = None) -> None:
        """A turn; counted from `since` or from when it is sent."""
        await self._bench.model.marks()
        sent = time.time()
        seen = await _watch(connection, session)
        begun = since or sent
        self.carrel.append((seen["first"] - begun) * 1000)
        mark = await self._mark(seen["first"])
        stamps = {
            "session made": sent,
            "accepted": seen["turn.queued"],
            "taken up": seen["turn.started"],
            "handed to the agent, on to the model": mark["arrived"],
            "the model's own": mark["first"],
            "back to the client": seen["first"],
        }
        _add(self.hops, begun, stamps)

    def forget(self) -> None:
        """Drop what was counted: the first of everything pays for caches that are filled once."""
        for counted in (self.carrel, self.bare, self.hops, self.bare_hops):
            counted.clear()

    async def of_bare(self, told: Json, since: float | None = None) -> None:
        """The same, done and told by the bare SDK."""
        begun = since or told["sent"]
        self.bare.append((told["first"] - begun) * 1000)
        mark = await self._mark(told["first"])
        stamps = {
            "handed to the agent, on to the model": mark["arrived"],
            "the model's own": mark["first"],
            "back to the client": told["first"],
        }
        _add(self.bare_hops, begun, stamps)

    async def _mark(self, before: float) -> Json:
        """The model request whose answer was seen first."""
        marks = [mark for mark in await self._bench.model.marks() if mark["first"] and mark["first"] <= before]
        return marks[-1]

    def figure(self, key: str, what: str, note: str = "") -> Figure:
        """All of it."""
        return Figure(
            key=key,
            what=what,
            unit="ms",
            carrel=Summary.of(self.carrel),
            bare=Summary.of(self.bare),
            note=note,
            parts=_medians("Carrel", self.hops) | _medians("bare", self.bare_hops),
        )


async def warm(bench: Bench) -> list[Figure]:
    """The next turn of a session whose agent is connected."""
    trial = Trial(bench)
    async with bench.server() as server, bench.bare() as bare:
        session, connection = await server.session(), await server.connect()
        await server.run(session, PROMPT)
        await bare.do("cold", prompt=PROMPT)

        async def of_carrel() -> None:
            await _pause()
            await trial.of_carrel(connection, session)

        async def of_bare() -> None:
            await _pause()
            await bench.model.marks()
            await trial.of_bare(await bare.do("query", prompt=PROMPT))

        await alternately(bench.times(50, 5), of_carrel, of_bare)
        await connection.close()
    return [trial.figure("first_token.warm", "first token, session ready")]


async def cold(bench: Bench) -> list[Figure]:
    """A new session's first turn, beside a new client's."""
    trial = Trial(bench)
    async with bench.server() as server, bench.bare() as bare:
        connection = await server.connect()

        async def of_carrel() -> None:
            since = time.time()
            session = str((await connection.ask("POST", "/api/v1/sessions", {}))["id"])
            await trial.of_carrel(connection, session, since)
            await connection.ask("DELETE", f"/api/v1/sessions/{session}")

        await _alternate(bench, trial, of_carrel, _connecting(bench, bare, trial))
        await connection.close()
    return [trial.figure("first_token.cold", "create a session, first token, cold", "bare: connect, then query")]


async def waking(bench: Bench) -> list[Figure]:
    """The next turn of a session whose process was freed, beside connecting with `resume`."""
    trial = Trial(bench)
    async with bench.server(idle_timeout_seconds=_IDLE_SECONDS) as server, bench.bare() as bare:
        session, connection = await server.session(), await server.connect()
        await server.run(session, PROMPT)
        resume = str((await bare.do("cold", prompt=PROMPT))["session"])
        await bare.do("disconnect")

        async def of_carrel() -> None:
            await server.until_status(session, "idle")
            await trial.of_carrel(connection, session)

        await _alternate(bench, trial, of_carrel, _connecting(bench, bare, trial, resume))
        await connection.close()
    return [trial.figure("first_token.waking", "first token, idle session", "bare: connect with resume, then query")]


async def _alternate(bench: Bench, trial: Trial, *both: Callable[[], Awaitable[None]]) -> None:
    await alternately(1, *both)
    trial.forget()
    await alternately(bench.times(15, 2), *both)


def _connecting(bench: Bench, bare: Bare, trial: Trial, resume: str | None = None) -> Callable[[], Awaitable[None]]:
    async def of_bare() -> None:
        await bench.model.marks()
        told = await bare.do("cold", prompt=PROMPT, resume=resume)
        await trial.of_bare(told)
        await bare.do("disconnect")

    return of_bare


async def _watch(connection: Connection, session: str) -> dict[str, float]:
    """When each event of a turn was made (by its own word), and when the first delta was here."""
    seen: dict[str, float] = {}
    async for frame in turn_frames(connection, session, PROMPT):
        if frame.event == "delta":
            seen.setdefault("first", frame.at)
        else:
            seen.setdefault(frame.event, datetime.fromisoformat(json.loads(frame.data)["at"]).timestamp())
    return seen


def _add(hops: dict[str, list[float]], begun: float, stamps: dict[str, float]) -> None:
    for name, stamp in stamps.items():
        hops.setdefault(name, []).append((stamp - begun) * 1000)
        begun = stamp


def _medians(side: str, hops: dict[str, list[float]]) -> dict[str, float]:
    found = {f"{side}: {name}": statistics.median(samples) for name, samples in hops.items()}
    return {name: value for name, value in found.items() if value}


async def _pause() -> None:
    """What a turn leaves to be done after its end is not the next one's business."""

    await asyncio.sleep(0.2)


MEASUREMENTS = {"warm": warm, "cold": cold, "waking": waking}
