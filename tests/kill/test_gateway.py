"""The gateway dies at any instant, and nothing is lost, doubled or forgotten."""

import asyncio
import contextlib
import json
import random
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.timeout(180)]

Json = dict[str, Any]

FIRST = (
    "[[say: begin]] [[bash: echo first >> effects.txt]] [[count: 24 @40]] "
    "[[parallel: echo second >> effects.txt | echo third >> effects.txt]] [[say: end]]"
)
SECOND = "[[write: a.txt | text]] [[bash: cat a.txt; echo fourth >> effects.txt]]"

# What may differ between a run and its broken twin: the requests to the model and what the agent says of them; and when
# the client, which has to wait for a server, gets its prompts accepted.
_ASIDE = {
    "usage.recorded",
    "message.system",
    "message.assistant",
    "thinking",
    "error",
    "agent.initialised",
    "turn.queued",
}


def skeleton(events: list[Json]) -> list[Any]:
    """The events without ids, times and remade messages."""
    turns: dict[str, int] = {}
    found = []
    for event in events:
        if event["type"] in _ASIDE:
            continue
        turn = turns.setdefault(event["turn_id"], len(turns)) if event["turn_id"] else None
        data = dict(event["data"])
        for name in ("id", "message_id", "block", "usage", "cost_usd", "duration_ms", "num_turns"):
            data.pop(name, None)
        found.append((event["type"], turn, json.dumps(data, sort_keys=True)))
    return found


def said(events: list[Json]) -> str:
    return "".join(e["data"]["text"] for e in events if e["type"] == "message.assistant")


class Scenario:
    """Two turns, a viewer who stays as long as the server lets it, and whatever happens meanwhile."""

    def __init__(self, victim: Any) -> None:
        self.victim = victim
        self.session = ""
        self.turns: list[str] = []
        self.seen: list[Json] = []

    async def begin(self) -> None:
        async with await self.victim.client() as http:
            self.session = (await http.post("/sessions", json={}, headers={"Idempotency-Key": "s"})).json()["id"]

    async def ask(self) -> None:
        """Send both prompts, as often as it takes for both to be accepted."""
        for key, prompt in (("one", FIRST), ("two", SECOND)):
            while len(self.turns) < (1 if key == "one" else 2):
                with contextlib.suppress(httpx.HTTPError, ConnectionError):
                    async with await self.victim.client() as http:
                        answer = await http.post(
                            f"/sessions/{self.session}/turns",
                            json={"prompt": prompt},
                            headers={"Idempotency-Key": key},
                        )
                        assert answer.status_code == 202, answer.text
                        self.turns.append(answer.json()["id"])
                await asyncio.sleep(0.01)

    async def watch(self) -> None:
        """Follow the events to the end of the second turn, through every restart, from the last one seen."""
        while True:
            with contextlib.suppress(httpx.HTTPError, ConnectionError):
                async with await self.victim.client() as http:
                    headers = {"Accept": "text/event-stream"}
                    if self.seen:
                        headers["Last-Event-ID"] = str(self.seen[-1]["seq"])
                    url = f"/sessions/{self.session}/events?deltas=true"
                    async with http.stream("GET", url, headers=headers) as stream:
                        event = ""
                        async for line in stream.aiter_lines():
                            if line.startswith("event: "):
                                event = line[7:]
                            elif line.startswith("data: ") and event != "delta":
                                self.seen.append(json.loads(line[6:]))
                                if self._over():
                                    return
            await asyncio.sleep(0.01)

    def _over(self) -> bool:
        ended = [event for event in self.seen if event["type"] == "turn.completed"]
        return len(ended) == 2 and self.seen[-1]["type"] == "session.status_changed"

    async def keep_alive(self) -> None:
        """Start the server again whenever it has died."""
        while True:
            if self.victim.dead:
                self.victim.start()
            await asyncio.sleep(0.01)

    async def run(self, murder: Any = None) -> list[Json]:
        """Everything, to the end; answers the stored events."""
        await self.begin()
        tasks = [asyncio.create_task(self.keep_alive(), name="keep-alive")]
        if murder is not None:
            tasks.append(asyncio.create_task(murder, name="murder"))
        try:
            async with asyncio.timeout(100):
                await asyncio.gather(self.watch(), self.ask())
                # A murder that comes this late has nothing left to break; the server may be dead at this moment.
                for task in tasks[1:]:
                    task.cancel()
                while self.victim.dead:
                    await asyncio.sleep(0.01)
            async with await self.victim.client() as http:
                stored = (await http.get(f"/sessions/{self.session}/events?limit=1000")).json()["data"]
                effects = (await http.get(f"/sessions/{self.session}/files/effects.txt")).text
                again = await http.post(
                    f"/sessions/{self.session}/turns", json={"prompt": "do you remember?", "wait": True}
                )
        except TimeoutError:
            types = [(event["seq"], event["type"]) for event in self.seen]
            raise AssertionError(f"not over: {types}\n{self.victim.log()[-4000:]}") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(effects.split()) == ["first", "fourth", "second", "third"], effects
        assert "turn 3" in again.json()["text"], again.text
        assert [event["seq"] for event in stored] == list(range(1, len(stored) + 1))
        queued = [event["turn_id"] for event in stored if event["type"] == "turn.queued"]
        assert queued == self.turns
        assert self.seen == stored[: len(self.seen)]
        return stored


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    """Filled by the first test that needs it: the events of a run in which nothing dies."""
    return {}


async def _unbroken(memory: dict[str, Any], victim: Any) -> list[Any]:
    if "skeleton" not in memory:
        victim.start()
        events = await Scenario(victim).run()
        memory["skeleton"] = skeleton(events)
        memory["said"] = said(events)
        await asyncio.to_thread(victim.stop)
        victim.forget()
    found: list[Any] = memory["skeleton"]
    return found


POINTS = [
    "turn.stored",
    "sandbox.stored",
    "sandbox.forked",
    "bind.sent",
    "turn.started",
    "frames.received:3",
    "frames.stored:4",
    "frames.acked:5",
    "delta.published:10",
    "tool.called",
    "tool.finished",
    "usage.reserved:2",
    "usage.recorded:2",
]


@pytest.mark.on_both_engines
@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_a_named_point(victim, unbroken, point):
    expected = await _unbroken(unbroken, victim)
    victim.start(kill_at=point)
    events = await Scenario(victim).run()
    assert victim.lives >= 2, "the point was never reached"
    assert skeleton(events) == expected
    assert "end" in said(events)


@pytest.mark.parametrize(
    ("engine", "seed"),
    [("sqlite", seed) for seed in range(25)] + [("postgres", seed) for seed in range(100, 108)],
    indirect=["engine"],
)
async def test_killed_at_a_random_instant(victim, unbroken, seed):
    expected = await _unbroken(unbroken, victim)
    chance = random.Random(seed)

    async def murder() -> None:
        for _ in range(chance.choice([1, 1, 2])):
            await asyncio.sleep(chance.uniform(0.0, 3.0))
            if not victim.dead:
                victim.kill()

    victim.start()
    events = await Scenario(victim).run(murder())
    assert skeleton(events) == expected
    assert "end" in said(events)


@pytest.mark.on_both_engines
@pytest.mark.parametrize("point", ["evict.marked"])
async def test_killed_while_a_session_is_put_to_sleep(victim, point):
    victim.start(kill_at=point, idle_timeout_seconds=0.5)
    async with await victim.client() as http:
        session = (await http.post("/sessions", json={})).json()["id"]
        await http.post(f"/sessions/{session}/turns", json={"prompt": "hello", "wait": True})
    while not victim.dead:
        await asyncio.sleep(0.02)
    victim.start()
    async with await victim.client() as http:
        result = await http.post(f"/sessions/{session}/turns", json={"prompt": "hello", "wait": True})
        assert "turn 2" in result.json()["text"]


@pytest.mark.on_both_engines
@pytest.mark.parametrize("point", ["delete.marked", "delete.files_gone"])
async def test_killed_in_the_middle_of_a_deletion(victim, point):
    victim.start(kill_at=point)
    async with await victim.client() as http:
        session = (await http.post("/sessions", json={})).json()["id"]
        await http.post(f"/sessions/{session}/turns", json={"prompt": "[[write: a | b]]", "wait": True})
        with contextlib.suppress(httpx.HTTPError):
            await http.delete(f"/sessions/{session}")
    assert victim.process.wait(10) != 0
    victim.start()
    async with await victim.client() as http:
        assert (await http.get(f"/sessions/{session}")).status_code == 404
        folder = victim.data / "sessions" / session
        async with asyncio.timeout(20):
            while folder.exists() or any(path.is_dir() for path in (victim.data / "sandboxes").iterdir()):
                await asyncio.sleep(0.02)


@pytest.mark.on_both_engines
@pytest.mark.parametrize("point", ["pool.stored:2", "sandbox.stored", "sandbox.forked", "bind.sent:2", "pool.taken"])
async def test_killed_while_a_pool_is_filled_or_taken_from(victim, point):
    """Nothing is left of the pool that was, and a session is somebody's or is not."""
    victim.start(kill_at=point, warm_pool=2)
    made = []
    with contextlib.suppress(httpx.HTTPError, ConnectionError):
        async with await victim.client() as http:
            while not victim.dead and len(made) < 50:
                await asyncio.sleep(0.1)
                if len(list((victim.data / "sandboxes").glob("*/lock"))) >= 2 or point == "pool.taken":
                    made.append((await http.post("/sessions", json={"title": "mine"})).json()["id"])
    victim.stop() if not victim.dead else None
    victim.start(warm_pool=1)
    async with await victim.client() as http:
        listed = (await http.get("/sessions?limit=100")).json()["data"]
        assert {session["id"] for session in listed} >= set(made)
        assert all(session["title"] == "mine" for session in listed), "nothing is half taken"
        for session in listed[:2]:
            result = await http.post(f"/sessions/{session['id']}/turns", json={"prompt": "hello", "wait": True})
            assert "turn 1" in result.json()["text"]
        for session in listed:
            assert (await http.delete(f"/sessions/{session['id']}")).status_code == 204
        async with asyncio.timeout(60):
            # The one that waits now, and nothing else: no folder, no sandbox.
            while any(len([p for p in (victim.data / name).glob("*") if p.is_dir()]) != 1 for name in _FOLDERS):
                await asyncio.sleep(0.05)


_FOLDERS = ("sessions", "sandboxes")
