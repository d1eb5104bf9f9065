"""The gateway dies at each checkpoint of a container's launch, and in mid-turn: its next life finds what was begun, and the turn is had."""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images"), pytest.mark.timeout(120)]


def containers(data: Any) -> list[str]:
    label = f"label=carrel.installation={(data / 'installation').read_text().strip()}"
    command = ["docker", "ps", "-a", "--filter", label, "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("point", "begun"),
    [
        ("sandbox.stored", 0),  # nothing but its row
        ("sandbox.checkpoint:1", 0),  # its name is stored
        ("sandbox.checkpoint:2", 1),  # the container is made
        ("sandbox.checkpoint:3", 1),  # it runs, and has its bootstrap
        ("bind.sent", 1),  # its agent is being started
        ("tool.called", 1),  # its agent is at work, and goes on
    ],
)
async def test_killed_at_a_checkpoint_of_a_launch(victim: Any, point: str, begun: int) -> None:
    victim.start(runtime="docker", kill_at=point)
    async with await victim.client() as http:
        session = (await http.post("/sessions", json={})).json()["id"]
        turn = (await http.post(f"/sessions/{session}/turns", json={"prompt": "[[bash: echo x >> once]]"})).json()
    assert victim.process is not None
    await asyncio.to_thread(victim.process.wait, 30)
    assert len(await asyncio.to_thread(containers, victim.data)) == begun
    victim.start(runtime="docker")
    async with await victim.client() as http:
        for _ in range(600):
            found = (await http.get(f"/sessions/{session}/turns/{turn['id']}")).json()
            if found["status"] in ("succeeded", "failed"):
                break
            await asyncio.sleep(0.1)
        assert found["status"] == "succeeded", (found, victim.log()[-3000:])
        assert (victim.data / "sessions" / session / "workspace" / "once").read_text() == "x\n", "and it was done once"
        assert len(await asyncio.to_thread(containers, victim.data)) == 1
    assert await asyncio.to_thread(victim.stop) == 0
    assert await asyncio.to_thread(containers, victim.data) == []


async def until(what: str, check: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := await check():
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


async def over(victim: Any, http: Any, session: str, turn: str) -> Any:
    async def check() -> Any:
        found = (await http.get(f"/sessions/{session}/turns/{turn}")).json()
        return found if found["status"] in ("succeeded", "failed", "interrupted") else None

    return await until(f"the turn ends; {victim.log()[-2000:]}", check)


async def test_14_sessions_and_queued_turns_go_on_after_a_restart_of_everything(victim: Any) -> None:
    """Gateway, runner and agent are killed while a turn is at work and others wait: with all that holds them."""
    victim.start(runtime="docker")
    async with await victim.client() as http:
        session = (await http.post("/sessions", json={})).json()["id"]
        await http.post(f"/sessions/{session}/turns", json={"prompt": "[[bash: echo first > trail]]", "wait": True})
        prompts = [
            {"prompt": "[[bash: test -e begun || { touch begun; sleep 100; }]]", "on_sandbox_lost": "continue"},
            {"prompt": "[[bash: echo second >> trail]]"},
            {"prompt": "[[bash: echo third >> trail; cat trail]]"},
        ]
        turns = [(await http.post(f"/sessions/{session}/turns", json=body)).json()["id"] for body in prompts]

        async def begun() -> bool:
            return (victim.data / "sessions" / session / "workspace" / "begun").exists()

        await until("the tool is at work", begun)
    victim.kill()
    names = await asyncio.to_thread(containers, victim.data)
    await asyncio.to_thread(subprocess.run, ["docker", "kill", *names], check=True, capture_output=True)
    victim.start(runtime="docker")
    async with await victim.client() as http:
        found = [await over(victim, http, session, turn) for turn in turns]
        assert [turn["status"] for turn in found] == ["succeeded"] * 3, found
        assert found[2]["tool_calls"][0]["result"] == "first\nsecond\nthird"
        asked = {"prompt": "how many?", "wait": True}
        counted = (await http.post(f"/sessions/{session}/turns", json=asked)).json()
        assert "turn 5 of our conversation" in counted["text"]


async def ask_for_leave(victim: Any, http: Any) -> tuple[str, str, Any]:
    """A session in a container whose call waits for a person."""
    session = (await http.post("/sessions", json={"permission_mode": "default"})).json()["id"]
    prompt = {"prompt": "[[bash: echo once >> log]] [[say: done]]"}
    turn = (await http.post(f"/sessions/{session}/turns", json=prompt)).json()["id"]

    async def pending() -> Any:
        return (await http.get("/interactions", params={"status": "pending"})).json()["data"]

    (asked,) = await until("it asks", pending)
    return session, turn, asked


async def test_a_call_that_waits_for_a_person_outlives_the_gateway(victim: Any) -> None:
    victim.start(runtime="docker")
    async with await victim.client() as http:
        session, turn, asked = await ask_for_leave(victim, http)
    victim.kill()
    victim.start(runtime="docker")
    async with await victim.client() as http:
        assert (await http.get("/interactions", params={"status": "pending"})).json()["data"] == [asked]
        answered = await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
        assert answered.status_code == 200
        assert (await over(victim, http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "once\n"
