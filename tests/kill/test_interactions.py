"""What waits for a person outlives the gateway, whenever it is killed: the call runs once, with what was answered."""

import asyncio
import os
import signal
from contextlib import suppress

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

PROMPT = "[[bash: echo once >> log]] [[say: done]]"


async def pending(http):
    return (await http.get("/interactions", params={"status": "pending"})).json()["data"]


async def until(what, check):
    for _ in range(1500):
        if found := await check():
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"never: {what}")


async def begin(victim, **options):
    """A session whose call waits for a person."""
    http = await victim.client()
    session = (await http.post("/sessions", json={"permission_mode": "default", **options})).json()["id"]
    turn = (await http.post(f"/sessions/{session}/turns", json={"prompt": PROMPT})).json()["id"]
    (asked,) = await until("it asks", lambda: pending(http))
    return http, session, turn, asked


async def result(http, session, turn):
    async def ended():
        found = (await http.get(f"/sessions/{session}/turns/{turn}")).json()
        return found if found["status"] in ("succeeded", "failed", "interrupted") else None

    return await until("the turn ends", ended)


@pytest.mark.on_both_engines
async def test_killed_while_it_waits(victim):
    victim.start()
    http, session, turn, asked = await begin(victim)
    victim.kill()
    victim.start()
    await http.aclose()
    async with await victim.client() as http:
        assert await pending(http) == [asked]
        answered = await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
        assert answered.status_code == 200
        assert (await result(http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "once\n"


async def test_killed_between_the_answer_and_the_agent(victim):
    victim.start(kill_at="interaction.answered")
    http, session, turn, asked = await begin(victim)
    with pytest.raises(Exception, match=r"[Dd]isconnected|reset|closed"):
        await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
    victim.process.wait(10)
    victim.start()
    await http.aclose()
    async with await victim.client() as http:
        assert (await result(http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "once\n"
        again = await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "deny"})
        assert again.status_code == 409


def end(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_all(victim):
    """The gateway, the runner and the agent, all at once."""
    victim.kill()
    for pid in victim.processes():
        end(pid)


@pytest.mark.on_both_engines
async def test_everything_is_killed_while_it_is_held(victim):
    victim.start()
    http, session, turn, asked = await begin(victim)
    kill_all(victim)
    victim.start()
    await http.aclose()
    async with await victim.client() as http:
        assert await pending(http) == [asked]
        edited = {"command": "echo edited >> log"}
        answer = {"decision": "allow", "updated_input": edited, "input_digest": asked["input_digest"]}
        assert (await http.post(f"/interactions/{asked['id']}/answer", json=answer)).status_code == 200
        assert (await result(http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "edited\n"
        called = (await http.get(f"/sessions/{session}/turns/{turn}")).json()["tool_calls"]
        assert [call["id"] for call in called] == [asked["tool_use_id"]], "the very call that was shown"


@pytest.mark.on_both_engines
async def test_everything_is_killed_while_it_waits_without_a_process(victim):
    victim.start(kill_at="interaction.deferred")
    http = await victim.client()
    options = {"permission_mode": "default", "defer_after_seconds": 0}
    session = (await http.post("/sessions", json=options)).json()["id"]
    turn = (await http.post(f"/sessions/{session}/turns", json={"prompt": PROMPT})).json()["id"]
    await until("it is killed", _dead(victim))
    for pid in victim.processes():
        end(pid)
    victim.start(kill_at="interaction.answered")
    await http.aclose()
    http = await victim.client()
    (asked,) = await pending(http)
    assert (await http.get(f"/sessions/{session}")).json()["status"] == "waiting"
    with pytest.raises(Exception, match=r"[Dd]isconnected|reset|closed"):
        await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
    await until("it is killed again", _dead(victim))
    await http.aclose()
    for point in ("sandbox.forked", "bind.sent"):
        victim.start(kill_at=point)
        await until(f"it is killed at {point}", _dead(victim))
        for pid in victim.processes():
            end(pid)
    victim.start(kill_at="interaction.taken")
    await until("it is killed once more", _dead(victim))
    victim.start()
    async with await victim.client() as http:
        assert (await result(http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "once\n"


def _dead(victim):
    async def check():
        return victim.dead

    return check


async def test_what_may_have_begun_is_not_begun_again(victim):
    victim.start(kill_at="interaction.taken")
    http, session, turn, asked = await begin(victim)
    await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
    await until("it is killed", _dead(victim))
    for pid in victim.processes():
        end(pid)
    victim.start()
    await http.aclose()
    async with await victim.client() as http:
        ended = await result(http, session, turn)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "sandbox_lost")
        assert (await http.get(f"/sessions/{session}/files/log")).status_code == 404


async def test_an_orderly_end_leaves_the_question(victim):
    victim.start()
    http, session, turn, asked = await begin(victim)
    assert await asyncio.to_thread(victim.stop) == 0
    assert victim.processes() == []
    victim.start()
    await http.aclose()
    async with await victim.client() as http:
        assert await pending(http) == [asked]
        assert (await http.get(f"/sessions/{session}")).json()["status"] == "waiting"
        await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
        assert (await result(http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "once\n"
