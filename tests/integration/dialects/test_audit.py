"""What is asked for in a dialect is on record like anything else: the same words, which objects, which dialect."""

import asyncio
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

ABSENT = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(params=["its own port", "/compat"])
async def client(request, serve, stack):
    """`await client(name, **settings)`: a server, a client of the dialect, and a reader of what is on record."""

    async def start(name: str, **settings: Any) -> tuple[httpx.AsyncClient, Any]:
        server = await serve(dialects={name: {"port": 0}}, **settings)
        url = server.listeners[name] if request.param == "its own port" else f"{server.url}/compat/{name}"
        headers = {"Authorization": f"Bearer {server.key}"}
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=headers, timeout=60))

        async def recorded(answer: httpx.Response) -> dict[str, Any]:
            """The one record of the request of this answer."""
            async with asyncio.timeout(10):
                while True:
                    page = (await http.get(f"{server.url}/api/v1/audit", params={"limit": 100})).json()["data"]
                    found = [one for one in page if one["request_id"] == answer.headers["x-request-id"]]
                    if found:
                        break
                    await asyncio.sleep(0.02)
            (record,) = found
            return record

        async def turns_of(session: str) -> list[str]:
            path = f"{server.url}/api/v1/sessions/{session}/turns"
            return [turn["id"] for turn in (await http.get(path)).json()["data"]]

        http.turns_of = turns_of  # type: ignore[attr-defined]
        return http, recorded

    return start


def told(record):
    return (record["action"], record["object_type"], record["object_id"], record["outcome"], record["details"])


async def test_of_claude_agent_http(client):
    http, recorded = await client("claude-agent-http", observability={"audit_prompts": True})
    of = {"dialect": "claude-agent-http"}
    made = await http.post("/api/v1/sessions", json={"user_id": "alice"})
    session = made.json()["session_id"]
    record = await recorded(made)
    assert told(record) == ("session.create", "session", session, 201, of)
    assert (record["principal"], record["address"]) == ("admin", "127.0.0.1")
    seen = []
    for path in ("/api/v1/chat", "/api/v1/chat/stream"):
        answer = await http.post(path, json={"session_id": session, "message": "hello"})
        (turn,) = set(await http.turns_of(session)) - set(seen)
        seen.append(turn)
        details = {"session_id": session, "prompt": "hello", **of}
        assert told(await recorded(answer)) == ("turn.create", "turn", turn, 200, details)
        # A stream tells in itself that there is no such session; on record is what came of it.
        answer = await http.post(path, json={"session_id": ABSENT, "message": "hello"})
        details = {"session_id": ABSENT, "prompt": "hello", **of}
        assert told(await recorded(answer)) == ("turn.create", "turn", None, 404, details)
    resumed = await http.post(f"/api/v1/sessions/{session}/resume")
    assert told(await recorded(resumed)) == ("session.resume", "session", session, 200, of)
    deleted = await http.delete(f"/api/v1/sessions/{session}")
    assert told(await recorded(deleted)) == ("session.delete", "session", session, 204, of)
    refused = await http.get(f"/api/v1/sessions/{session}", headers={"Authorization": "Bearer nonsense"})
    assert told(await recorded(refused)) == ("session.get", "session", session, 401, of)
    nowhere = await http.post("/api/v1/nowhere")
    assert (await recorded(nowhere))["action"] == "request.unmatched"


async def test_of_sdk_server(client):
    http, recorded = await client("sdk-server")
    of = {"dialect": "sdk-server"}
    made = await http.post("/session/start", json={"initial_prompt": "hello"})
    session = made.json()["session_id"]
    (first,) = await http.turns_of(session)
    assert told(await recorded(made)) == ("session.create", "session", session, 200, {"turn_id": first, **of})
    answer = await http.post(f"/session/{session}/query", json={"prompt": "hello"})
    (second,) = set(await http.turns_of(session)) - {first}
    assert told(await recorded(answer)) == ("turn.create", "turn", second, 200, {"session_id": session, **of})
    answer = await http.post(f"/session/{session}/interrupt")
    assert told(await recorded(answer)) == ("session.interrupt", "session", session, 200, of)
    answer = await http.delete(f"/session/{session}")
    assert told(await recorded(answer)) == ("session.delete", "session", session, 200, of)
    for stream in (False, True):
        answer = await http.post("/query", json={"prompt": "hello", "stream": stream})
        record = await recorded(answer)
        assert (record["action"], record["object_type"], record["outcome"]) == ("query.run", "session", 200)
        assert record["object_id"]
        assert record["details"].keys() == {"turn_id", "dialect"}
