"""People who answer, on the real Claude Code: a call of a tool waits in a row until somebody says what becomes of it."""

import asyncio
import json

import pytest
from websockets.asyncio.client import connect

from carrel.errors import Forbidden, InteractionNotFound
from carrel.model import Principal, Scope

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

ASKED = {"permission_mode": "default"}
APPEND = "[[bash: echo once >> /workspace/log]]"


async def pending(api, session, count=1):
    async def check():
        path = f"/sessions/{session}/interactions"
        found = (await api.ask("GET", path, params={"status": "pending"}))["data"]
        return found if len(found) == count else None

    return await api.until(f"{count} pending", check)


async def reply(api, interaction, expected=200, **body):
    return await api.ask("POST", f"/interactions/{interaction['id']}/answer", expected, json=body)


async def ended(api, session, turn, status="succeeded"):
    event = await api.until_event(session, "turn.completed", turn)
    assert event["data"]["status"] == status, event
    return await api.ask("GET", f"/sessions/{session}/turns/{turn}")


async def log(api, session):
    answer = await api.http.get(f"/sessions/{session}/files/log")
    return answer.text if answer.status_code == 200 else None


@pytest.mark.on_both_engines
async def test_a_call_waits_and_an_answer_lets_it_go_on(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    assert (asked["kind"], asked["tool"], asked["turn_id"]) == ("permission", "Bash", turn)
    assert asked["input"]["command"] == "echo once >> /workspace/log"
    assert (await api.ask("GET", "/interactions"))["data"] == [asked]
    waiting = await api.ask("GET", f"/sessions/{session}")
    assert (waiting["status"], waiting["stop_reason"]) == ("waiting", "requires_action")
    assert (await api.ask("GET", f"/sessions/{session}/turns/{turn}"))["status"] == "waiting"
    assert await log(api, session) is None
    answered = await reply(api, asked, decision="allow")
    assert (answered["status"], answered["answered_by"], answered["answer"]) == (
        "answered",
        "admin",
        {"decision": "allow"},
    )
    await ended(api, session, turn)
    assert await log(api, session) == "once\n"
    assert await api.ask("GET", f"/interactions/{asked['id']}") == answered
    types = [event["type"] for event in await api.events(session)]
    assert types.index("interaction.requested") < types.index("interaction.resolved") < types.index("tool.finished")


async def test_a_denial_with_words_and_an_end(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    await reply(api, asked, decision="deny", message="Not on a Friday.")
    result = await ended(api, session, turn)
    assert "Not on a Friday." in json.dumps(result["tool_calls"][0]["result"])
    stopped = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    await reply(api, asked, decision="deny", stop=True)
    await ended(api, session, stopped, "interrupted")
    assert await log(api, session) is None


async def test_edited_input_is_what_runs(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    await reply(api, asked, decision="allow", updated_input={"command": "echo edited >> /workspace/log"})
    await ended(api, session, turn)
    assert await log(api, session) == "edited\n"
    (resolved,) = [event for event in await api.events(session) if event["type"] == "interaction.resolved"]
    assert resolved["data"]["answer"]["updated_input"] == {"command": "echo edited >> /workspace/log"}
    assert resolved["data"]["answered_by"] == "admin"


async def test_edited_input_is_held_to_deny_rules(api):
    session = await api.session(**ASKED, permissions={"deny": ["Bash(curl *)"]})
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    await reply(
        api, asked, decision="allow", updated_input={"command": "curl example.org; echo never >> /workspace/log"}
    )
    result = await ended(api, session, turn)
    assert "a deny rule: Bash(curl *)" in json.dumps(result["tool_calls"][0]["result"])
    assert await log(api, session) is None


async def test_of_two_answers_one_counts(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    path, body = f"/interactions/{asked['id']}/answer", {"decision": "allow"}
    answers = await asyncio.gather(*(api.http.post(path, json=body) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    assert {answer.json().get("code") for answer in answers if answer.status_code == 409} == {"interaction_resolved"}
    await ended(api, session, turn)
    assert await log(api, session) == "once\n"


async def test_parallel_calls_each_wait(api):
    session = await api.session(permissions={"ask": ["Bash(ls *)"]})
    turn = await api.send(session, "[[parallel: ls / | ls /usr]]")
    first, second = await pending(api, session, 2)
    await reply(api, first, decision="allow")
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "waiting", "one more waits"
    await reply(api, second, decision="deny")
    result = await ended(api, session, turn)
    assert sorted(call["is_error"] for call in result["tool_calls"]) == [False, True]


async def test_an_end_withdraws(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    await api.ask("POST", f"/sessions/{session}/interrupt")
    await ended(api, session, turn, "interrupted")
    assert (await api.ask("GET", f"/interactions/{asked['id']}"))["status"] == "withdrawn"
    refused = await reply(api, asked, 409, decision="allow")
    assert refused["code"] == "interaction_resolved"
    again = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    await api.ask("POST", f"/sessions/{session}/stop")
    await ended(api, session, again, "interrupted")
    assert (await api.ask("GET", f"/interactions/{asked['id']}"))["status"] == "withdrawn"
    assert await log(api, session) is None


async def test_nobody_answers_in_time(api):
    session = await api.session(**ASKED, ask_expires_seconds=1.5)
    turn = await api.send(session, APPEND)
    result = await ended(api, session, turn)
    assert "Nobody has answered in time" in json.dumps(result["tool_calls"][0]["result"])
    (asked,) = (await api.ask("GET", f"/sessions/{session}/interactions"))["data"]
    assert asked["status"] == "expired"
    late = await reply(api, asked, 410, decision="allow")
    assert late["code"] == "interaction_expired"


async def test_a_time_limit_of_the_turn_counts_while_it_waits(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND, timeout_seconds=2)
    await ended(api, session, turn, "failed")
    (asked,) = (await api.ask("GET", f"/sessions/{session}/interactions"))["data"]
    assert asked["status"] == "withdrawn"


async def test_prompts_queue_behind_it(api):
    session = await api.session(**ASKED)
    turn = await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    later = await api.send(session, "[[say: later]]")
    assert (await api.ask("GET", f"/sessions/{session}/turns/{later}"))["status"] == "queued"
    await reply(api, asked, decision="allow")
    await ended(api, session, turn)
    assert (await ended(api, session, later))["text"] == "later"


async def test_whoever_attaches_is_told_first_what_waits(api):
    session = await api.session(**ASKED)
    await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    last = (await api.ask("GET", f"/sessions/{session}"))["last_seq"]
    async with api.stream("GET", f"/sessions/{session}/events", params={"after": last}) as told:
        first = await anext(told)
        assert (first["event"], first["data"]["interaction"], "id" in first) == ("interaction.pending", asked, False)
        await reply(api, asked, decision="deny")
        assert (await anext(told))["event"] == "interaction.resolved"
    url = api.server.url.replace("http", "ws") + f"/api/v1/sessions/{session}/stream?after={last}&deltas=false"
    await api.until_status(session, "ready")
    await api.send(session, APPEND)
    (again,) = await pending(api, session)
    async with connect(url, additional_headers={"Authorization": f"Bearer {api.server.key}"}) as socket:
        first = json.loads(await asyncio.wait_for(socket.recv(), 20))
        assert first == {"type": "interaction.pending", "interaction": again}
    other = Principal.of_user("bob")
    with pytest.raises(InteractionNotFound):
        await api.server.services.interactions.answer(other, again["id"], allow=True)
    key = (await api.ask("POST", "/keys", 201, json={"user": "bob"}))["key"]
    refused = await api.http.post(
        f"/interactions/{again['id']}/answer",
        json={"decision": "allow"},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert refused.status_code == 404

    async def on_record():
        found = (await api.ask("GET", "/audit", params={"action": "interaction.answer", "user": "bob"}))["data"]
        return [(each["outcome"], each["object_id"]) for each in found]

    assert await api.until("it is on record", on_record) == [(404, again["id"])]
    changed = await reply(api, again, 409, decision="allow", input_digest="0" * 64)
    assert changed["code"] == "interaction_changed"
    await reply(api, again, decision="deny", input_digest=again["input_digest"])


async def test_people_are_reminded_and_it_goes_on_waiting(api):
    session = await api.session(**ASKED, ask_remind_seconds=1)
    await api.send(session, APPEND)
    (asked,) = await pending(api, session)

    async def twice():
        reminded = [event for event in await api.events(session) if event["type"] == "interaction.reminded"]
        return reminded if len(reminded) >= 2 else None

    reminded = await api.until("it reminds", twice)
    assert {event["data"]["interaction_id"] for event in reminded} == {asked["id"]}
    assert (await api.ask("GET", f"/interactions/{asked['id']}"))["status"] == "pending"
    await reply(api, asked, decision="deny")


async def test_a_question(api):
    question = {
        "question": "Which colour?",
        "header": "Colour",
        "multiSelect": False,
        "options": [{"label": "Red", "description": "warm"}, {"label": "Blue", "description": "cold"}],
    }
    session = await api.session(**ASKED)
    turn = await api.send(session, f"[[tool: AskUserQuestion | {json.dumps({'questions': [question]})}]]")
    (asked,) = await pending(api, session)
    assert asked["kind"] == "question"
    await reply(api, asked, 422, decision="allow")
    await reply(api, asked, decision="allow", answers={"Which colour?": "Blue"})
    result = await ended(api, session, turn)
    assert "Blue" in json.dumps(result["tool_calls"][0]["result"])


async def test_what_an_answer_may_not_be(api):
    session = await api.session(**ASKED)
    await api.send(session, APPEND)
    (asked,) = await pending(api, session)
    agent = Principal(name="sandbox:1", user="admin", scopes=frozenset({Scope.WRITE}), session_id=session)
    with pytest.raises(Forbidden):
        await api.server.services.interactions.answer(agent, asked["id"], allow=True)
    for body in (
        {},
        {"decision": "perhaps"},
        {"decision": "deny", "updated_input": {}},
        {"decision": "allow", "answers": {"a": "b"}},
        {"decision": "allow", "remember": "for ever"},
        {"decision": "allow", "remember": "session"},
        {"decision": "allow", "permission_mode": "plan"},
        {"decision": "allow", "input_digest": "x"},
    ):
        await reply(api, asked, 422, **body)
    await api.ask("GET", "/interactions/nothing", 404)
    await api.ask("POST", "/interactions/nothing/answer", 404, json={"decision": "allow"})
    assert len(await pending(api, session)) == 1
