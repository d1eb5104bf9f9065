"""PostgreSQL goes away in the middle of turns: nothing is lost, and all goes on by itself."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from carrel.testing.postgres import PostgresServer, postgres_programs

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap", "postgres"), pytest.mark.slow]

PROMPT = "[[say: begin]] [[bash: echo effect >> effects.txt]] [[count: 120 @50]] [[bash: cat effects.txt]] [[say: end]]"


@pytest.fixture
def breakable() -> Iterator[PostgresServer]:
    programs = postgres_programs()
    assert programs is not None
    server = PostgresServer(programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()


async def ask_through(api: Any, session: str, over: asyncio.Event) -> list[tuple[int, str | None, float]]:
    """Ask for the session again and again: each answer's status, Retry-After, and how long it took."""
    found = []
    while not over.is_set():
        begun = time.monotonic()
        answer = await api.http.get(f"/sessions/{session}")
        found.append((answer.status_code, answer.headers.get("retry-after"), time.monotonic() - begun))
        await asyncio.sleep(0.1)
    return found


async def watch(api: Any, session: str, turn: str) -> list[int]:
    """Follow the events to the turn's end over one connection; every `seq` in the order it came."""
    seqs: list[int] = []
    async with api.stream("GET", f"/sessions/{session}/events", params={"deltas": "true"}) as stream:
        async for frame in stream:
            if "id" in frame:
                seqs.append(int(frame["id"]))
                data = frame["data"]
                if data["type"] == "turn.completed" and data["turn_id"] == turn:
                    break
    return seqs


async def break_in_mid_turn(start: Any, server: PostgresServer, how: str, seconds: float, **settings: Any) -> Any:
    """Three turns at work, the database away for so long; all must end well. Answers how requests fared meanwhile."""
    api = await start(database={"url": await asyncio.to_thread(server.database)} | settings)
    sessions = [await api.session() for _ in range(3)]
    waiting = asyncio.create_task(api.run(sessions[0], PROMPT))
    turns = [await api.send(session, PROMPT) for session in sessions[1:]]
    later = await api.send(sessions[1], "do you remember?")
    viewers = [asyncio.create_task(watch(api, *pair)) for pair in zip(sessions[1:], turns, strict=True)]
    for session, turn in zip(sessions[1:], turns, strict=True):
        await api.until_event(session, "tool.finished", turn)
    over = asyncio.Event()
    if how == "frozen":
        await asyncio.to_thread(server.freeze)
    else:
        await asyncio.to_thread(server.stop, how)
    asking = [asyncio.create_task(ask_through(api, session, over)) for session in sessions]
    making = asyncio.create_task(made(api, over))
    await asyncio.sleep(seconds)
    if how == "frozen":
        await asyncio.to_thread(server.thaw)
    else:
        await asyncio.to_thread(server.start)
    results = [await waiting]
    for session, turn in [*zip(sessions[1:], turns, strict=True), (sessions[1], later)]:
        await api.until_event(session, "turn.completed", turn, seconds=60)
        results.append(await api.ask("GET", f"/sessions/{session}/turns/{turn}"))
    over.set()
    assert [result["status"] for result in results] == ["succeeded"] * 4
    for result in results[:3]:
        assert result["text"] == "begin" + " ".join(str(n) for n in range(1, 121)) + " endResult: effect"
    assert "turn 2" in results[3]["text"]
    for session, viewer in zip(sessions[1:], viewers, strict=True):
        seen, stored = await viewer, [event["seq"] for event in await api.events(session)]
        assert seen == list(range(1, len(seen) + 1)), "the viewer saw each event once, in order"
        assert stored == list(range(1, len(stored) + 1))
    for session in sessions:
        effects = await api.http.get(f"/sessions/{session}/files/effects.txt")
        assert effects.text == "effect\n", "no tool ran twice"
    assert await making == 1
    return [answer for answers in await asyncio.gather(*asking) for answer in answers]


async def made(api: Any, over: asyncio.Event) -> int:
    """Create a session with one key until that is answered; how many there are of it."""
    while True:
        answer = await api.http.post("/sessions", json={"title": "made once"}, headers={"Idempotency-Key": "once"})
        if answer.status_code == 201:
            break
        assert answer.status_code in (409, 503), answer.text
        assert answer.headers.get("retry-after")
        await asyncio.sleep(0.1)
    listed = (await api.ask("GET", "/sessions"))["data"]
    return sum(session["title"] == "made once" for session in listed)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["fast", "immediate", "frozen"])
async def test_ten_seconds_without_a_database_are_waited_out(start, breakable, how):
    answers = await break_in_mid_turn(start, breakable, how, 10.0)
    assert {status for status, _, _ in answers} == {200}, "every request waited"
    assert max(seconds for _, _, seconds in answers) > 5.0, "the database was away"


@pytest.mark.timeout(180)
async def test_a_longer_outage_is_answered_503_and_over_by_itself(start, breakable):
    answers = await break_in_mid_turn(start, breakable, "kill", 4.0, outage_seconds=0.5)
    assert {(status, retry) for status, retry, _ in answers} == {(200, None), (503, "5")}


async def test_health_says_that_the_database_is_away(start, breakable):
    api = await start(database={"url": await asyncio.to_thread(breakable.database), "outage_seconds": 0.2})
    root = str(api.server.url)
    async with httpx.AsyncClient(base_url=root, timeout=30) as http:
        assert (await http.get("/health/ready")).status_code == 200
        await asyncio.to_thread(breakable.stop)
        assert (await http.get("/health/ready")).status_code == 503
        assert (await http.get("/health/live")).status_code == 200
        await asyncio.to_thread(breakable.start)
        assert (await http.get("/health/ready")).status_code == 200
