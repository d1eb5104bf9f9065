"""What waits for a person outlives the gateway, whenever it is killed: the call runs once, with what was answered."""

import asyncio

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


async def begin(victim):
    """A session whose call waits for a person."""
    http = await victim.client()
    session = (await http.post("/sessions", json={"permission_mode": "default"})).json()["id"]
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
    with pytest.raises(Exception, match=r"disconnected|reset|closed"):
        await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "allow"})
    victim.process.wait(10)
    victim.start()
    await http.aclose()
    async with await victim.client() as http:
        assert (await result(http, session, turn))["status"] == "succeeded"
        assert (await http.get(f"/sessions/{session}/files/log")).text == "once\n"
        again = await http.post(f"/interactions/{asked['id']}/answer", json={"decision": "deny"})
        assert again.status_code == 409
