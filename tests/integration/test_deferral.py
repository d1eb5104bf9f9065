"""A call that waits for a person costs no process where it can do without one, and happens once when it is answered."""

import asyncio
import json

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

AT_ONCE = {"permission_mode": "default", "defer_after_seconds": 0}
APPEND = "[[bash: echo once >> /workspace/log]] [[say: done]]"


async def deferred(api, session):
    """The one interaction of a session that waits without a process."""

    async def check():
        path = f"/sessions/{session}/interactions"
        found = (await api.ask("GET", path, params={"status": "pending"}))["data"]
        gone = await api.server.services.store.read(lambda tx: tx.sandboxes.current(session) is None)
        return found if len(found) == 1 and gone else None

    (asked,) = await api.until("it waits without a process", check)
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "waiting"
    return asked


async def reply(api, interaction, expected=200, **body):
    return await api.ask("POST", f"/interactions/{interaction['id']}/answer", expected, json=body)


async def ended(api, session, turn, status="succeeded"):
    event = await api.until_event(session, "turn.completed", turn)
    assert event["data"]["status"] == status, event
    return await api.ask("GET", f"/sessions/{session}/turns/{turn}")


async def log(api, session):
    answer = await api.http.get(f"/sessions/{session}/files/log")
    return answer.text if answer.status_code == 200 else None


def statuses(events):
    return [event["data"]["status"] for event in events if event["type"] == "session.status_changed"]


@pytest.mark.on_both_engines
async def test_the_answer_wakes_it_and_the_call_happens_once(api):
    session = await api.session(**AT_ONCE)
    turn = await api.send(session, APPEND)
    asked = await deferred(api, session)
    later = await api.send(session, "[[say: later]]")
    assert (await api.ask("GET", f"/sessions/{session}/turns/{later}"))["status"] == "queued"
    assert await log(api, session) is None
    await reply(api, asked, decision="allow")
    result = await ended(api, session, turn)
    assert await log(api, session) == "once\n"
    assert result["text"].startswith("done")
    assert [call["is_error"] for call in result["tool_calls"]] == [False]
    assert (await ended(api, session, later))["text"] == "later"
    events = await api.events(session)
    waits = ["starting", "ready", "running", "waiting", "starting", "ready", "running"]
    assert statuses(events)[: len(waits)] == waits
    assert [event["type"] for event in events].count("turn.started") == 2, "one for each turn"


async def test_edited_input_is_what_runs(api):
    session = await api.session(**AT_ONCE)
    turn = await api.send(session, APPEND)
    asked = await deferred(api, session)
    await reply(api, asked, decision="allow", updated_input={"command": "echo edited >> /workspace/log"})
    await ended(api, session, turn)
    assert await log(api, session) == "edited\n"


async def test_a_denial_and_an_expiry_wake_it_too(api):
    session = await api.session(**AT_ONCE)
    turn = await api.send(session, APPEND)
    asked = await deferred(api, session)
    await reply(api, asked, decision="deny", message="Not on a Friday.")
    assert "Not on a Friday." in json.dumps((await ended(api, session, turn))["tool_calls"][0]["result"])
    brief = await api.session(**AT_ONCE, ask_expires_seconds=3)
    turn = await api.send(brief, APPEND)
    await deferred(api, brief)
    assert "Nobody has answered in time" in json.dumps((await ended(api, brief, turn))["tool_calls"][0]["result"])
    assert await log(api, session) is None
    assert await log(api, brief) is None


async def test_a_question_is_put_off(api):
    question = {"question": "Which colour?", "header": "Colour", "multiSelect": False}
    question["options"] = [{"label": "Red", "description": "warm"}, {"label": "Blue", "description": "cold"}]
    session = await api.session(**AT_ONCE)
    turn = await api.send(session, f"[[tool: AskUserQuestion | {json.dumps({'questions': [question]})}]]")
    asked = await deferred(api, session)
    assert asked["title"] == "Which colour?"
    assert [option["label"] for option in asked["options"]] == ["Red", "Blue"]
    await reply(api, asked, **asked["options"][1]["answer"])
    assert "Blue" in json.dumps((await ended(api, session, turn))["tool_calls"][0]["result"])


async def test_an_end_needs_no_process(api):
    session = await api.session(**AT_ONCE)
    for number, (path, status) in enumerate((("interrupt", "interrupted"), ("stop", "interrupted"))):
        turn = await api.send(session, APPEND)
        asked = await deferred(api, session)
        await api.ask("POST", f"/sessions/{session}/{path}")
        await ended(api, session, turn, status)
        assert (await api.ask("GET", f"/interactions/{asked['id']}"))["status"] == "withdrawn"
        await reply(api, asked, 409, decision="allow")
        if path == "stop":
            await api.ask("POST", f"/sessions/{session}/resume")
        after = await api.run(session, f"[[say: alive {number}]]")
        assert (after["status"], after["text"]) == ("succeeded", f"alive {number}")
    stopped = await api.send(session, APPEND)
    asked = await deferred(api, session)
    await reply(api, asked, decision="deny", stop=True)
    await ended(api, session, stopped, "interrupted")
    timed = await api.send(session, APPEND, timeout_seconds=3)
    await deferred(api, session)
    result = await ended(api, session, timed, "failed")
    assert result["error"]["code"] == "turn_timed_out"
    assert await log(api, session) is None
    assert (await api.run(session, "[[say: at last]]"))["text"] == "at last"


async def test_calls_side_by_side_keep_their_process_and_are_denied_for_now(start):
    api = await start(live_hold_seconds=1)
    session = await api.session(permissions={"ask": ["Bash(ls *)"]}, defer_after_seconds=0)
    turn = await api.send(session, "[[parallel: ls / | ls /usr]] [[bash: ls /]] [[say: done]]")

    async def both():
        found = (await api.ask("GET", f"/sessions/{session}/interactions"))["data"]
        return found if len(found) == 2 else None

    first, second = await api.until("both ask", both)
    await api.until("the first asks again, alone", lambda: _waits_without(api, session))
    still = {each["id"]: each["status"] for each in (await api.ask("GET", f"/sessions/{session}/interactions"))["data"]}
    assert still == {first["id"]: "pending", second["id"]: "pending"}, "no third one: the same call, the same row"
    wanted = next(each for each in (first, second) if each["input"]["command"] == "ls /")
    await reply(api, wanted, decision="allow")
    result = await ended(api, session, turn)
    told = [json.dumps(call["result"]) for call in result["tool_calls"]]
    assert [call["is_error"] for call in result["tool_calls"]] == [True, True, False]
    assert all("make the same call again, alone" in text for text in told[:2])
    other = second if wanted is first else first
    assert (await api.ask("GET", f"/interactions/{other['id']}"))["status"] == "pending", "its answer is still good"
    await reply(api, other, decision="allow")
    result = await api.run(session, "[[bash: ls /usr]]")
    assert [call["is_error"] for call in result["tool_calls"]] == [False]
    assert len((await api.ask("GET", f"/sessions/{session}/interactions"))["data"]) == 2, "nobody was asked again"
    asking = await api.send(session, "[[bash: ls /usr]]")
    await deferred(api, session)
    await api.ask("POST", f"/sessions/{session}/interrupt")
    await ended(api, session, asking, "interrupted")


async def _waits_without(api, session):
    return await api.server.services.store.read(lambda tx: tx.sandboxes.current(session) is None)


async def test_a_sub_agents_call_keeps_its_process(api):
    agents = {"worker": {"description": "works", "prompt": "You work."}}
    session = await api.session(**AT_ONCE, agents=agents, permissions={"allow": ["Agent"]})
    call = {"subagent_type": "worker", "description": "d", "prompt": APPEND, "run_in_background": False}
    turn = await api.send(session, f"[[tool: Agent | {json.dumps(call)}]]")

    async def check():
        return (await api.ask("GET", f"/sessions/{session}/interactions", params={"status": "pending"}))["data"]

    (asked,) = await api.until("it asks", check)
    row = await api.server.services.store.read(lambda tx: tx.interactions.get(asked["id"]))
    assert not row.lone
    assert not await _waits_without(api, session)
    await reply(api, asked, decision="allow")
    await ended(api, session, turn)
    assert await log(api, session) == "once\n"


async def test_it_holds_no_place_and_no_process(start):
    api = await start(limits={"max_concurrent_turns": 1})
    waiting = [await api.session(**AT_ONCE) for _ in range(3)]
    turns = [await api.send(session, APPEND) for session in waiting]
    asked = [await deferred(api, session) for session in waiting]
    assert (await api.run(await api.session(), "[[say: there is a place]]"))["text"] == "there is a place"
    await asyncio.gather(*(reply(api, each, decision="allow") for each in asked))
    for session, turn in zip(waiting, turns, strict=True):
        await ended(api, session, turn)
        assert await log(api, session) == "once\n"


async def test_an_agent_in_the_background_may_ask_after_its_turn(api):
    agents = {"worker": {"description": "works", "prompt": "You work."}}
    session = await api.session(**AT_ONCE, agents=agents, permissions={"allow": ["Agent"]})
    call = {"subagent_type": "worker", "description": "d", "prompt": APPEND, "run_in_background": True}
    turn = await api.send(session, f"[[tool: Agent | {json.dumps(call)}]]")
    await ended(api, session, turn)

    async def check():
        return (await api.ask("GET", f"/sessions/{session}/interactions", params={"status": "pending"}))["data"]

    (asked,) = await api.until("it asks", check)
    await reply(api, asked, decision="allow")
    await api.until("it has happened", lambda: log(api, session))
    assert await log(api, session) == "once\n"


async def test_what_the_settings_say_of_waiting(start):
    api = await start(defer_after_seconds=0)
    session = await api.session(permission_mode="default")
    await api.send(session, APPEND)
    await deferred(api, session)
