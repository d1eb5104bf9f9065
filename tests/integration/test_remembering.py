"""Rules that people write, by themselves or by an answer; what would become of a call; plans to approve."""

import json

import pytest

from carrel.model import Principal

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


async def pending(api, session):
    async def check():
        path = f"/sessions/{session}/interactions"
        return (await api.ask("GET", path, params={"status": "pending"}))["data"]

    (asked,) = await api.until("it asks", check)
    return asked


async def reply(api, interaction, expected=200, **body):
    return await api.ask("POST", f"/interactions/{interaction['id']}/answer", expected, json=body)


async def ended(api, session, turn, status="succeeded"):
    event = await api.until_event(session, "turn.completed", turn)
    assert event["data"]["status"] == status, event
    return await api.ask("GET", f"/sessions/{session}/turns/{turn}")


async def check(api, session, command):
    return await api.ask(
        "POST", f"/sessions/{session}/permissions/check", 200, json={"tool": "Bash", "input": {"command": command}}
    )


async def test_an_answer_is_remembered_and_the_rule_revoked(api):
    session = await api.session(permission_mode="default")
    turn = await api.send(session, "[[bash: make one]]")
    asked = await pending(api, session)
    assert (await check(api, session, "make one"))["decision"] == "ask"
    assert asked["suggestions"] == ["Bash(make one)"]
    await reply(api, asked, 422, decision="allow", remember="workspace")
    answered = await reply(api, asked, decision="allow", remember="session")
    (rule,) = (await api.ask("GET", "/permissions/rules"))["data"]
    assert answered["answer"] == {"decision": "allow", "remember": "session", "rule_id": rule["id"]}
    assert (rule["scope"], rule["target"], rule["effect"], rule["rule"]) == (
        "session",
        session,
        "allow",
        "Bash(make one)",
    )
    await ended(api, session, turn)
    told = await check(api, session, "make one")
    assert (told["decision"], told["layer"], told["rule_id"]) == ("allow", "session", rule["id"])
    again = await api.run(session, "[[bash: make one]]")
    assert again["status"] == "succeeded"
    assert len((await api.ask("GET", f"/sessions/{session}/interactions"))["data"]) == 1, "nobody was asked again"
    await api.ask("DELETE", f"/permissions/rules/{rule['id']}", 204)
    await api.ask("DELETE", f"/permissions/rules/{rule['id']}", 404)
    assert (await check(api, session, "make one"))["decision"] == "ask"
    await api.send(session, "[[bash: make one]]")
    asked = await pending(api, session)
    await reply(api, asked, decision="deny")


async def test_rules_of_every_layer_hold_and_are_told_apart(api):
    environment = {"options": {"permission_mode": "default", "permissions": {"ask": ["Bash(env *)"]}}}
    await api.ask("PUT", "/environments/dev", 201, json=environment)
    shop = await api.ask("POST", "/workspaces", 201, json={"name": "shop"})
    where = {"workspace": {"type": "persistent", "name": "shop"}}
    session = await api.session(environment="dev", permissions={"allow": ["Bash(own *)"]}, **where)

    async def write(scope, effect, rule, target=None):
        body = {"scope": scope, "target": target, "effect": effect, "rule": rule}
        return await api.ask("POST", "/permissions/rules", 201, json=body)

    await write("user", "deny", "Bash(user *)")
    await write("workspace", "allow", "Bash(shop *)", shop["id"])
    await write("environment", "deny", "Bash(later *)", "dev")
    await write("session", "ask", "Bash(session *)", session)
    found = {
        word: await check(api, session, f"{word} x")
        for word in ["env", "own", "user", "shop", "later", "session", "other"]
    }
    assert {word: (told["decision"], told["layer"]) for word, told in found.items()} == {
        "env": ("ask", "environment"),
        "own": ("allow", "session"),
        "user": ("deny", "user"),
        "shop": ("allow", "workspace"),
        "later": ("deny", "environment"),
        "session": ("ask", "session"),
        "other": ("ask", None),
    }
    assert found["user"]["mode"] == "default"
    denied = await api.run(session, "[[bash: user x]]")
    assert "a deny rule: Bash(user *)" in json.dumps(denied["tool_calls"][0]["result"])
    rules = api.server.services.rules
    bob = Principal.of_user("bob")
    assert (await rules.page(bob, scope=None, target=None, cursor=None, limit=9)).items == []
    strict = {"options": {"permission_mode": "default", "allowed_tools": ["Read"]}}
    await api.ask("PUT", "/environments/strict", 201, json=strict)
    narrow = await api.session(environment="strict")
    body = {"scope": "session", "target": narrow, "effect": "allow", "rule": "Bash"}
    await api.ask("POST", "/permissions/rules", 403, json=body)
    await write("user", "allow", "Bash(x *)")
    assert (await check(api, session, "x y"))["decision"] == "allow"
    assert (await check(api, narrow, "x y"))["decision"] == "ask", "its environment names what is allowed"


@pytest.mark.parametrize("defer_after_seconds", [0, 60])
async def test_a_plan(api, defer_after_seconds):
    session = await api.session(permission_mode="plan", defer_after_seconds=defer_after_seconds)
    plan = json.dumps({"plan": "# Write a file\n\nand be done."})
    turn = await api.send(session, f"[[tool: ExitPlanMode | {plan}]]")
    asked = await pending(api, session)
    assert (asked["kind"], asked["title"]) == ("plan", "A plan to approve"), "there is no file of a plan"
    await reply(api, asked, decision="deny", message="Say more.")
    result = await ended(api, session, turn)
    assert "Say more." in json.dumps(result["tool_calls"][0]["result"])
    assert (await check(api, session, "make one"))["mode"] == "plan"
    write = "[[write: /workspace/plan.txt | planned]]"
    turn = await api.send(session, f"[[tool: ExitPlanMode | {plan}]] {write}")
    asked = await pending(api, session)
    approve = next(option["answer"] for option in asked["options"] if "acceptEdits" in json.dumps(option))
    await reply(api, asked, **approve)
    result = await ended(api, session, turn)
    assert [call["is_error"] for call in result["tool_calls"]] == [False, False], result["tool_calls"][0]["result"]
    assert (await api.http.get(f"/sessions/{session}/files/plan.txt")).text == "planned"
    assert (await api.ask("GET", f"/sessions/{session}"))["spec"]["permission_mode"] == "acceptEdits"
