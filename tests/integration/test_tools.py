"""The tools: the eleven of agents, through the real CLI from inside a session; those of clients, by the official client."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from carrel.auth import make_key
from carrel.model import Scope, utc_now

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

Json = dict[str, Any]

ELEVEN = {
    "spawn_child",
    "send_to_child",
    "get_child_output",
    "get_child_result",
    "list_children",
    "stop_child",
    "interrupt_child",
    "get_child_workspace_path",
    "get_parent_context",
    "notify_user",
    "ask_user",
}


def call(tool: str, **arguments: Any) -> str:
    return f"[[tool: mcp__carrel__{tool} | {json.dumps(arguments)}]]"


def answers(result: Json) -> list[Json]:
    """What the tools of a turn have answered."""
    found = []
    for each in result["tool_calls"]:
        content = each["result"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        found.append(json.loads(text))
    return found


async def test_the_eleven_tools_through_the_real_cli(api: Any) -> None:
    root = await api.session(session_tools=True, permission_mode="default")
    (spawned,) = answers(
        await api.run(
            root, call("spawn_child", prompt="[[say: first]] [[say: second]]", context={"a": [1]}, task_type="t")
        )
    )
    child = spawned["child_session_id"]
    assert spawned == {"child_session_id": child, "status": "starting", "parent_session_id": root}
    initialised = await api.until_event(root, "agent.initialised")
    assert {f"mcp__carrel__{name}" for name in ELEVEN} <= set(initialised["data"]["tools"])
    assert {f"carrel:{name}" for name in ("delegate-task", "coordinate-children", "child-status")} <= set(
        initialised["data"]["skills"]
    )
    steps = [
        call("get_child_result", child_session_id=child),
        call("get_child_output", child_session_id=child),
        call("list_children"),
        call("get_child_workspace_path", child_session_id=child),
        call("send_to_child", child_session_id=child, prompt="[[say: third]]", wait_for_result=True),
        call("interrupt_child", child_session_id=child, message="[[say: fourth]]"),
        call("get_child_result", child_session_id=child),
        call("get_parent_context", key="a"),
        call("notify_user", message="done"),
        call("get_child_result", child_session_id=root),
        call("stop_child", child_session_id=child),
        call("list_children", include_completed=False),
    ]
    (result, output, listed, path, sent, redirected, fourth, orphan, told, stranger, stopped, none) = answers(
        await api.run(root, " ".join(steps))
    )
    assert {name: result[name] for name in ("child_session_id", "is_complete", "status", "type", "subtype")} == {
        "child_session_id": child,
        "is_complete": True,
        "status": "completed",
        "type": "result",
        "subtype": "success",
    }
    assert "first" in result["result"]
    assert set(result["usage"]) == {"input_tokens", "output_tokens"}
    assert set(output) == {"output", "is_complete", "status", "timestamp", "line_count"}
    assert (output["is_complete"], output["line_count"]) == (True, len(output["output"].splitlines()))
    assert listed["parent_session_id"] == root
    assert [each["session_id"] for each in listed["children"]] == [child]
    assert set(listed["children"][0]) >= {"session_id", "status", "created_at"}
    assert path["path"] == "/workspace"
    assert (sent["status"], sent["child_session_id"]) == ("completed", child)
    assert "third" in sent["result"]
    assert {name: redirected[name] for name in ("status", "session_id", "interrupt_type")} == {
        "status": "sent",
        "session_id": child,
        "interrupt_type": "redirect",
    }
    assert "fourth" in fourth["result"]
    for wrong in (orphan, told, stranger):
        assert wrong["error"] is True
        assert wrong["message"]
    assert stranger["code"] == "session_not_found"
    assert stopped == {"child_session_id": child, "status": "stopped"}
    assert none["children"] == []


async def test_a_child_reads_what_it_was_handed_and_cannot_leave_its_tree(api: Any) -> None:
    stranger = await api.session()
    root = await api.session(session_tools=True)
    prompt = " ".join(
        [
            call("get_parent_context", key="module"),
            call("get_parent_context"),
            call("stop_child", child_session_id=stranger),
            call("spawn_child", prompt="x", environment="nowhere"),
        ]
    )
    body = {"prompt": prompt, "context": {"module": "auth"}}
    child = (await api.ask("POST", f"/sessions/{root}/children", 201, json=body))["id"]
    result = await api.ask("GET", f"/sessions/{child}/result", params={"wait": True})
    one, everything, foreign, nowhere = answers(result["turn"])
    assert one == {"key": "module", "value": "auth", "found": True}
    assert everything == {"context": {"module": "auth"}, "parent_session_id": root}
    assert foreign["code"] == "session_not_found"
    assert nowhere["code"] == "environment_not_found"
    assert (await api.ask("GET", f"/sessions/{stranger}"))["status"] == "idle"


BY_HAND = """
import json, os, socket
body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call",
                   "params": {"name": "spawn_child", "arguments": {"prompt": "x"}}})
talk = socket.socket(socket.AF_UNIX)
talk.connect(os.environ["ANTHROPIC_UNIX_SOCKET"])
head = ["POST /mcp HTTP/1.1", "host: x", "content-type: application/json", "connection: close",
        "accept: application/json, text/event-stream", "mcp-protocol-version: 2025-06-18",
        "authorization: Bearer " + os.environ["ANTHROPIC_API_KEY"], "content-length: " + str(len(body)), "", ""]
talk.sendall((chr(13) + chr(10)).join(head).encode() + body.encode())
print(talk.makefile().read())
"""


async def test_without_the_option_there_are_no_tools(api: Any) -> None:
    session = await api.session()
    result = await api.run(session, call("list_children"))
    initialised = await api.until_event(session, "agent.initialised")
    assert not [name for name in initialised["data"]["tools"] if name.startswith("mcp__carrel")]
    assert result["tool_calls"][0]["is_error"]
    by_hand = await api.run(session, f"[[bash: python3 -c '{BY_HAND}']]")
    assert "was not given these tools" in str(by_hand["tool_calls"][0]["result"]), by_hand
    assert (await api.ask("GET", f"/sessions/{session}/children"))["data"] == []


async def test_a_question_waits_for_a_person(api: Any) -> None:
    session = await api.session(session_tools=True)
    turn = await api.send(session, call("ask_user", question="Which one?", options=["red", "blue"]))
    asked = await api.until_event(session, "interaction.requested")
    (pending,) = (await api.ask("GET", f"/sessions/{session}/interactions", params={"status": "pending"}))["data"]
    assert (pending["kind"], pending["id"]) == ("question", asked["data"]["interaction_id"])
    answer = {"decision": "allow", "answers": {"Which one?": "blue"}}
    await api.ask("POST", f"/interactions/{pending['id']}/answer", json=answer)
    await api.until_event(session, "turn.completed", turn)
    (told,) = answers(await api.ask("GET", f"/sessions/{session}/turns/{turn}"))
    assert told == {"interaction_id": pending["id"], "status": "answered", "response": "blue", "timed_out": False}


# ------------------------------------------------------------------------------------------------------------- clients


async def ask(client: Any, tool: str, **arguments: Any) -> Json:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error
    found: Json = result.structured_content
    assert json.loads(result.content[0].text) == found
    return found


async def test_the_official_client_leads_a_session_from_start_to_end(api: Any) -> None:
    headers = {"Authorization": f"Bearer {api.server.key}"}
    async with connected(api, headers) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert names == {
            "create_session",
            "send_prompt",
            "wait_for_session",
            "get_events",
            "answer_interaction",
            "stop_session",
        }
        made = await ask(client, "create_session", title="by MCP", options={"permission_mode": "default"})
        session = made["session_id"]
        sent = await ask(client, "send_prompt", session_id=session, prompt="[[bash: touch made]] [[bash: sleep 1]]")
        waited = await ask(client, "wait_for_session", session_id=session)
        assert not waited["is_complete"]
        while not waited["is_complete"]:
            (asked,) = waited["interactions"]
            await ask(client, "answer_interaction", interaction_id=asked["id"], decision="allow")
            waited = await ask(client, "wait_for_session", session_id=session, timeout_seconds=60)
        assert (waited["turn"]["id"], waited["turn"]["status"]) == (sent["turn_id"], "succeeded")
        events = await ask(client, "get_events", session_id=session, limit=1000)
        assert [event["seq"] for event in events["events"]] == list(range(1, len(events["events"]) + 1))
        assert await ask(client, "stop_session", session_id=session) == {"session_id": session, "status": "stopped"}
        wrong = await ask(client, "send_prompt", session_id=session, prompt="hello")
        assert (wrong["error"], wrong["code"]) == (True, "session_stopped")
        nothing = await ask(client, "create_session", options={"titel": "x"})
        assert (nothing["error"], nothing["code"]) == (True, "validation_failed")


async def test_each_caller_finds_its_own_and_needs_a_key(api: Any) -> None:
    session = await api.session()
    key, secret = make_key("bob", scopes=[Scope.READ], now=utc_now())

    def work(tx: Any) -> None:
        tx.users.ensure("bob", utc_now())
        tx.keys.add(key)

    await api.server.services.store.write(work)
    async with connected(api, {"Authorization": f"Bearer {secret}"}) as client:
        assert (await ask(client, "get_events", session_id=session))["code"] == "session_not_found"
        assert (await ask(client, "create_session"))["code"] == "missing_scope"
    async with httpx.AsyncClient(base_url=api.server.url) as http:
        for headers in ({}, {"Authorization": "Bearer cak-wrong"}, {"Authorization": "Bearer wrong"}):
            assert (await http.post("/mcp", json={}, headers=headers)).status_code == 401
        assert (await http.get("/mcp", headers={"Authorization": f"Bearer {api.server.key}"})).status_code == 405


@asynccontextmanager
async def connected(api: Any, headers: dict[str, str]) -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(f"{api.server.url}/mcp", http_client=http)) as client,
    ):
        yield client
