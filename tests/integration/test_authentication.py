"""Ways in: keys made while the server runs, scopes, tickets, WebSockets as browsers open them, and streams that end."""

import asyncio
import contextlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from carrel.errors import InvalidSettings, OperatorError, UnsafeConfiguration
from carrel.model import utc_now

pytestmark = pytest.mark.requires("bubblewrap")

SECRET = "a-secret-that-is-long-enough-0123456789"
STATIC = "static-0123456789abcdef"


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def new_key(api: Any, **options: Any) -> Any:
    return await api.ask("POST", "/keys", 201, json={"user": "alice"} | options)


# --------------------------------------------------------------------------------------------------------------- keys


async def test_a_key_that_is_made_while_the_server_runs_opens_it_until_it_is_revoked(api: Any) -> None:
    made = await new_key(api, name="ci", expires_in_seconds=3600)
    assert made["key"].startswith(made["prefix"])
    assert (made["user_id"], made["name"], made["revoked_at"]) == ("alice", "ci", None)
    who = await api.ask("GET", "/me", headers=as_(made["key"]))
    assert (who["name"], who["user"]) == (f"key:{made['id']}", "alice")
    assert who["scopes"] == ["sessions:read", "sessions:write"]
    assert who["expires_at"] == made["expires_at"]
    listed = await api.ask("GET", "/keys", headers=as_(made["key"]))
    assert [key["id"] for key in listed["data"]] == [made["id"]]
    assert "key" not in listed["data"][0]
    assert "hash" not in listed["data"][0]

    async def used() -> Any:
        return (await api.ask("GET", f"/keys/{made['id']}"))["last_used_at"]

    assert await api.until("the last use is noted", used)
    await api.ask("DELETE", f"/keys/{made['id']}", 204)
    await api.ask("DELETE", f"/keys/{made['id']}", 204)
    await api.ask("GET", "/me", 401, headers=as_(made["key"]))
    assert (await api.ask("GET", f"/keys/{made['id']}"))["revoked_at"] is not None


async def test_nobody_gives_a_key_more_than_they_have(api: Any) -> None:
    reader = await new_key(api, scopes=["sessions:read"])
    writer = await new_key(api)
    problem = await api.ask("POST", "/keys", 403, json={"scopes": ["admin"]}, headers=as_(writer["key"]))
    assert (problem["code"], problem["scope"]) == ("missing_scope", "admin")
    await api.ask("POST", "/keys", 403, json={"user": "bob"}, headers=as_(writer["key"]))
    await api.ask("POST", "/keys", 403, json={}, headers=as_(reader["key"]))
    own = await api.ask("POST", "/keys", 201, json={"scopes": ["sessions:read"]}, headers=as_(writer["key"]))
    assert (own["user_id"], own["scopes"]) == ("alice", ["sessions:read"])
    half = await new_key(api, scopes=["sessions:write"])
    assert (await api.ask("POST", "/keys", 201, json={}, headers=as_(half["key"])))["scopes"] == ["sessions:write"]
    ends = await new_key(api, expires_in_seconds=60)
    after = await api.ask("POST", "/keys", 201, json={}, headers=as_(ends["key"]))
    assert after["expires_at"] == ends["expires_at"]


async def test_a_repeated_request_makes_one_key_and_does_not_show_it_again(api: Any) -> None:
    again = {"Idempotency-Key": "one key"}
    first = await api.ask("POST", "/keys", 201, json={"user": "alice"}, headers=again)
    second = await api.ask("POST", "/keys", 201, json={"user": "alice"}, headers=again)
    assert (first["id"], second["key"]) == (second["id"], None)
    assert len((await api.ask("GET", "/keys"))["data"]) == 1
    stored = b"".join(path.read_bytes() for path in api.server.data.glob("carrel.db*"))
    assert first["prefix"].encode() in stored
    assert first["key"].encode() not in stored


async def test_scopes_hold_before_any_object_is_looked_at(api: Any) -> None:
    reader = as_((await new_key(api, scopes=["sessions:read"]))["key"])
    session = await api.session()
    for path in ("/sessions/none/stop", f"/sessions/{session}/stop", "/sessions", "/nowhere"):
        problem = await api.ask("POST", path, 403, content=b"{", headers=reader)
        assert (problem["code"], problem["scope"]) == ("missing_scope", "sessions:write")
    await api.ask("GET", "/sessions", 200, headers=reader)
    writer = as_((await new_key(api, scopes=["sessions:write"]))["key"])
    await api.ask("GET", "/sessions", 403, headers=writer)
    await api.ask("POST", "/sessions", 201, json={}, headers=writer)
    admin = as_((await new_key(api, scopes=["admin"]))["key"])
    assert session in [one["id"] for one in (await api.ask("GET", "/sessions", headers=admin))["data"]]


# -------------------------------------------------------------------------------------------------------------- users


async def test_users(api: Any) -> None:
    made = await api.ask("POST", "/users", 201, json={"id": "alice", "daily_budget": {"max_usd": 2.5}})
    assert (made["daily_budget"], made["disabled"]) == ({"max_usd": 2.5, "max_tokens": None}, False)
    assert (await api.ask("POST", "/users", 409, json={"id": "alice"}))["code"] == "user_exists"
    await api.ask("POST", "/users", 422, json={"id": "../x"})
    for wrong in (
        {"max_sessions": "3"},
        {"max_sessions": -1},
        {"disabled": "true"},
        {"disabled": None},
        {"name": "x"},
        {"budget": {"max_usd": "1"}},
    ):
        await api.ask("PATCH", "/users/alice", 422, json=wrong)
    changed = await api.ask("PATCH", "/users/alice", 200, json={"max_sessions": 3, "daily_budget": None})
    assert (changed["max_sessions"], changed["daily_budget"]) == (3, None)
    assert (await api.ask("PATCH", "/users/alice", 200, json={}))["max_sessions"] == 3
    for method in ("GET", "PATCH", "DELETE"):
        body = {"json": {"disabled": True}} if method == "PATCH" else {}
        assert (await api.ask(method, "/users/nobody", 404, **body))["code"] == "user_not_found"
    key = as_((await new_key(api))["key"])
    await api.ask("GET", "/me", 200, headers=key)
    await api.ask("DELETE", "/users/alice", 204)
    await api.ask("GET", "/me", 401, headers=key)
    await api.ask("PATCH", "/users/alice", 200, json={"disabled": False})
    await api.ask("GET", "/me", 200, headers=key)
    assert [user["id"] for user in (await api.ask("GET", "/users"))["data"]] == ["alice"]


# ----------------------------------------------------------------------------------------------------- tokens at start


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"jwt": {"secret": "short"}}, OperatorError, "jwt.secret"),
        ({"jwt": {"secret": "abcabcabcabcabcabcabcabcabcabcabcabc"}}, UnsafeConfiguration, "jwt.secret"),
        ({"static_token": "short"}, OperatorError, "static_token"),
        ({"jwt": {"jwks_url": "http://id.example/keys"}}, UnsafeConfiguration, "https"),
        ({"jwt": {"secret": SECRET, "jwks_url": "https://id.example/keys"}}, InvalidSettings, "exclude"),
    ],
)
async def test_unsafe_settings_do_not_start(start: Any, settings: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=named) as caught:
        await start(**settings)
    assert isinstance(caught.value, OperatorError)


async def test_a_token_of_an_identity_provider_and_the_static_one(start: Any) -> None:
    api = await start(jwt={"secret": SECRET, "issuer": "https://id.example"}, static_token=STATIC)
    claims = {"sub": "carol", "iss": "https://id.example", "exp": int(time.time()) + 60}
    assert (await api.ask("GET", "/me", headers=as_(jwt.encode(claims, SECRET))))["user"] == "carol"
    assert (await api.ask("GET", "/me", headers=as_(STATIC)))["name"] == "static"
    await api.ask("GET", "/me", 401, headers=as_(jwt.encode({**claims, "iss": "x"}, SECRET)))


async def test_without_authentication_everybody_is_the_admin(start: Any) -> None:
    api = await start(auth="none")
    assert (await api.ask("GET", "/me", headers=as_("anything")))["name"] == "admin"


# ------------------------------------------------------------------------------------------------------------ tickets


async def test_a_ticket_opens_one_stream_of_one_session_once(api: Any) -> None:
    session, other = await api.session(), await api.session()
    stream = {"Accept": "text/event-stream"}
    async with httpx.AsyncClient(base_url=f"{api.server.url}/api/v1", timeout=20) as http:

        async def opens(path: str, headers: dict[str, str] = stream) -> int:
            ticket = (await api.ask("POST", "/auth/tickets", 201, json={"session_id": session}))["ticket"]
            statuses = []
            for _ in range(2):
                async with http.stream("GET", path, params={"ticket": ticket}, headers=headers) as response:
                    statuses.append(response.status_code)
            assert statuses[1] == 401
            return statuses[0]

        assert await opens(f"/sessions/{session}/events") == 200
        assert await opens(f"/sessions/{other}/events") == 404
        assert await opens(f"/sessions/{session}/events", {}) == 401
        for path in (f"/sessions/{session}", "/sessions", "/me", f"/sessions/{session}/export"):
            assert await opens(path) == 401
    await api.ask("POST", "/auth/tickets", 404, json={"session_id": "none"})
    await api.ask("POST", "/auth/tickets", 422, json={"session_id": session, "ttl_seconds": 31})
    await api.ask("POST", "/auth/tickets", 422, json={"session_id": session, "reusable": True, "ttl_seconds": 3601})


async def test_a_browsers_token_does_what_it_may_with_its_session_and_nothing_else(api: Any) -> None:
    key = as_((await new_key(api))["key"])
    session = (await api.ask("POST", "/sessions", 201, json={}, headers=key))["id"]
    other = (await api.ask("POST", "/sessions", 201, json={}, headers=key))["id"]
    body = {"session_id": session, "reusable": True, "ttl_seconds": 600}
    made = await api.ask("POST", "/auth/tickets", 201, json=body, headers=key)
    browser = as_(made["ticket"])
    assert (await api.ask("GET", "/me", headers=browser))["session_id"] == session
    assert [one["id"] for one in (await api.ask("GET", "/sessions", headers=browser))["data"]] == [session]
    await api.ask("PATCH", f"/sessions/{session}", 200, json={"title": "x"}, headers=browser)
    await api.ask("GET", f"/sessions/{other}", 404, headers=browser)
    for method, path, given in [
        ("POST", "/sessions", {}),
        ("POST", "/query", {"prompt": "x"}),
        ("POST", f"/sessions/{session}/fork", {}),
        ("POST", "/keys", {}),
        ("POST", "/auth/tickets", body),
    ]:
        assert (await api.ask(method, path, 403, json=given, headers=browser))["code"] == "bound_to_session"
    assert (await api.ask("GET", "/keys", 403, headers=browser))["code"] == "bound_to_session"
    await api.ask("POST", "/auth/tickets", 201, json={"session_id": session}, headers=browser)
    await api.ask("POST", "/auth/tickets", 404, json={"session_id": other}, headers=browser)
    reading = body | {"scopes": ["sessions:read"]}
    reader = as_((await api.ask("POST", "/auth/tickets", 201, json=reading, headers=key))["ticket"])
    await api.ask("GET", f"/sessions/{session}", 200, headers=reader)
    await api.ask("DELETE", f"/sessions/{session}", 403, headers=reader)


# ---------------------------------------------------------------------------------------------------------- WebSocket


def address(api: Any, session: str, query: str = "") -> str:
    return f"{api.server.url.replace('http', 'ws')}/api/v1/sessions/{session}/stream{query}"


async def closing(socket: Any) -> int:
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await socket.recv()
    return int(socket.close_code)


async def test_a_websocket_opens_in_every_way_that_a_browser_has(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    session = await api.session()
    key = (await new_key(api, scopes=["admin"]))["key"]
    capfd.readouterr()

    async def first(socket: Any) -> str:
        return str(json.loads(await asyncio.wait_for(socket.recv(), 20))["type"])

    async with connect(address(api, session), additional_headers=as_(key)) as socket:
        assert await first(socket) == "session.created"
    async with connect(address(api, session), subprotocols=["carrel.v1", f"bearer.{key}"]) as socket:
        assert socket.subprotocol == "carrel.v1"
        assert key not in str(socket.response.headers)
        assert await first(socket) == "session.created"
    async with connect(address(api, session), subprotocols=[f"bearer.{key}"]) as socket:
        assert socket.subprotocol is None
        assert await first(socket) == "session.created"
    async with connect(address(api, session)) as socket:
        await socket.send(json.dumps({"type": "auth", "token": key}))
        assert await first(socket) == "session.created"
    ticket = (await api.ask("POST", "/auth/tickets", 201, json={"session_id": session}))["ticket"]
    async with connect(address(api, session, f"?ticket={ticket}")) as socket:
        assert await first(socket) == "session.created"
    async with connect(address(api, session, f"?ticket={ticket}")) as socket:
        assert await closing(socket) == 4001
    for name in ("token", "key", "access_token", "Authorization"):
        async with connect(address(api, session, f"?{name}={key}"), additional_headers=as_(key)) as socket:
            assert await closing(socket) == 4001
    async with connect(address(api, session, f"?ticket={key}")) as socket:
        assert await closing(socket) == 4001
    async with connect(address(api, session), subprotocols=["carrel.v1", "bearer.wrong"]) as socket:
        assert await closing(socket) == 4001
    for message in ('{"type":"auth","token":"wrong"}', '{"type":"auth"}', '{"type":"ping"}', "nonsense", b"\x00"):
        async with connect(address(api, session)) as socket:
            await socket.send(message)
            assert await closing(socket) == 4001
    logged = capfd.readouterr()
    assert not [secret for secret in (key, ticket) if secret in logged.out + logged.err]


async def test_a_websocket_goes_by_the_scopes_of_its_key(api: Any) -> None:
    session = await api.session()
    reader = (await new_key(api, scopes=["sessions:read"]))["key"]
    writer = (await new_key(api, scopes=["sessions:write"]))["key"]
    own = (await api.ask("POST", "/sessions", 201, json={}, headers=as_(writer)))["id"]
    async with connect(address(api, own), additional_headers=as_(writer)) as socket:
        assert await closing(socket) == 4003
    async with connect(address(api, session), additional_headers=as_(reader)) as socket:
        assert await closing(socket) == 4004
    async with connect(address(api, own, "?after=1"), additional_headers=as_(reader)) as socket:
        await socket.send('{"type":"prompt","prompt":"Hello"}')
        told = json.loads(await asyncio.wait_for(socket.recv(), 20))
        assert (told["type"], told["code"]) == ("problem", "missing_scope")
    assert (await api.ask("GET", f"/sessions/{own}"))["turn_count"] == 0


# ---------------------------------------------------------------------------------------------------- streams that end


@pytest.fixture
async def quick(start: Any) -> Any:
    """A server that looks its callers up again often."""
    api = await start(heartbeat_seconds=0.1)
    object.__setattr__(api.server.services, "recheck_seconds", 0.1)
    return api


async def test_streams_end_with_the_key_they_were_opened_with(quick: Any) -> None:
    for end in ("expires", "is revoked", "user is disabled"):
        made = await new_key(quick, user="dave", **({"expires_in_seconds": 2} if end == "expires" else {}))
        key = as_(made["key"])
        session = (await quick.ask("POST", "/sessions", 201, json={}, headers=key))["id"]

        async def follow(session: str = session, key: dict[str, str] = key) -> int:
            events = 0
            async with quick.stream("GET", f"/sessions/{session}/events", headers=key) as frames:
                async for _ in frames:
                    events += 1
            return events

        async with connect(address(quick, session), additional_headers=key) as socket, asyncio.timeout(30):
            following = asyncio.create_task(follow())
            assert json.loads(await socket.recv())["type"] == "session.created"
            if end == "is revoked":
                await quick.ask("DELETE", f"/keys/{made['id']}", 204)
            elif end == "user is disabled":
                await quick.ask("DELETE", "/users/dave", 204)
            assert await closing(socket) == 4001, end
            assert await following == 1, end


async def test_what_a_bound_agent_may_not_change(api: Any) -> None:
    from hashlib import sha256

    from carrel.model import Sandbox, SandboxStatus, new_id

    session = await api.session()
    sandbox = Sandbox(
        id=new_id(),
        session_id=session,
        generation=1,
        status=SandboxStatus.ENDING,
        runtime="local",
        link_token_hash="l",
        agent_token_hash=sha256(b"cak-agent").hexdigest(),
        created_at=utc_now() - timedelta(seconds=1),
    )
    await api.server.services.store.write(lambda tx: tx.sandboxes.add(sandbox))
    agent = as_("cak-agent")
    who = await api.ask("GET", "/me", headers=agent)
    assert (who["name"], who["user"], who["session_id"]) == (f"sandbox:{sandbox.id}", "admin", session)
    await api.ask("GET", f"/sessions/{session}", 200, headers=agent)
    await api.ask("PATCH", f"/sessions/{session}", 403, json={"permission_mode": "default"}, headers=agent)


# ------------------------------------------------------------------------------------------------------- command line


async def carrel(data: Path, *arguments: str) -> str:
    """A command of its own: the server's log is not among what it says."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CARREL_", "ANTHROPIC_"))}
    command = (sys.executable, "-m", "carrel", *arguments, "--data", str(data))
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    ran = await asyncio.create_subprocess_exec(*command, env=own, **pipes)  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        out, err = await ran.communicate()
    assert ran.returncode == 0, err.decode()
    return out.decode()


async def test_the_command_line_goes_through_the_running_server_and_then_without(start: Any, tmp_path: Any) -> None:
    data = tmp_path / "data"
    # Before the first start, straight in the database.
    before = json.loads(await carrel(data, "keys", "create", "--user", "alice", "--json"))
    assert set(before) >= {"id", "key", "user_id", "scopes", "expires_at"}
    api = await start()
    assert (await api.ask("GET", "/me", headers=as_(before["key"])))["user"] == "alice"
    # While it runs, through it.
    command = (
        "keys",
        "create",
        "--user",
        "bob",
        "--scope",
        "sessions:read",
        "--expires",
        "90d",
        "--name",
        "n",
        "--json",
    )
    made = json.loads(await carrel(data, *command))
    assert (made["user_id"], made["scopes"], made["name"]) == ("bob", ["sessions:read"], "n")
    assert (await api.ask("GET", "/me", headers=as_(made["key"])))["scopes"] == ["sessions:read"]
    listed = await carrel(data, "keys", "list")
    assert made["id"] in listed
    assert made["key"] not in listed
    assert "bob" in await carrel(data, "users", "list")
    assert await carrel(data, "keys", "revoke", made["id"]) == f"{made['id']}  revoked\n"
    await api.ask("GET", "/me", 401, headers=as_(made["key"]))
    assert await carrel(data, "users", "disable", "alice") == "alice  disabled\n"
    await api.ask("GET", "/me", 401, headers=as_(before["key"]))
    assert await carrel(data, "users", "enable", "alice") == "alice  enabled\n"
    await api.ask("GET", "/me", 200, headers=as_(before["key"]))
