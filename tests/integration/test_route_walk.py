"""Every route of the OpenAPI document, and the WebSocket, by callers who must not see or change anything of Alice's.

A route that this file does not know fails it: whoever adds one says here whose things it touches.
"""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any

import httpx
import jwt
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from carrel.auth import make_key
from carrel.model import Interaction, InteractionKind, Sandbox, SandboxStatus, Scope, new_id, utc_now

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

API = "/api/v1"
SECRET = "a-secret-that-is-long-enough-0123456789"
STATIC = "static-0123456789abcdef"
NOBODY = "01890000-0000-7000-8000-000000000000"
MARK = "only-for-alice"

OPEN = {"/health", "/health/live", "/health/ready"}

# Whose things an operation without a path parameter touches: with these bodies, a stranger gets this.
WITHOUT_OBJECT: dict[str, tuple[Any, int]] = {
    "GET /me": (None, 200),
    "GET /sessions": (None, 200),
    "POST /sessions": ({"title": "mine"}, 201),
    "POST /query": ({"prompt": "Hello"}, 200),
    "GET /models": (None, 200),
    "GET /keys": (None, 200),
    "GET /usage": (None, 200),
    "GET /usage/budgets": (None, 200),
    "GET /workspaces": (None, 200),
    "GET /interactions": (None, 200),
    "GET /permissions/rules": (None, 200),
    "POST /permissions/rules": ({"scope": "session", "target": "SESSION", "effect": "allow", "rule": "Bash"}, 404),
    "GET /environments": (None, 200),
    "POST /workspaces": ({"name": "NEW"}, 201),
    "POST /keys": ({"user": "USER"}, 403),
    "POST /auth/tickets": ({"session_id": "SESSION"}, 404),
}
# For admins alone, whatever they name.
ADMINISTRATIVE = {
    "GET /users": None,
    "POST /users": {"id": "USER"},
    "GET /users/{user_id}": None,
    "PATCH /users/{user_id}": {"disabled": True},
    "DELETE /users/{user_id}": None,
    "GET /audit": None,
    "PUT /environments/{environment_id}": {},
    "GET /secrets": None,
    "PUT /secrets/{secret_id}": {"value": "stolen"},
    "DELETE /secrets/{secret_id}": None,
    "DELETE /environments/{environment_id}": None,
    "POST /environments/{environment_id}/start": None,
    "POST /environments/{environment_id}/stop": None,
    "GET /metrics": None,
}
# What an operation on somebody's object is sent, so that it would do something if it could.
BODIES: dict[str, Any] = {
    "PATCH /sessions/{session_id}": {"title": "stolen"},
    "POST /sessions/{session_id}/turns": {"prompt": "Hello"},
    "PUT /sessions/{session_id}/files/{path}": b"stolen",
    "PUT /sessions/{session_id}/archive": b"stolen",
    "POST /sessions/{session_id}/artifacts": {"path": "a.txt"},
    "POST /sessions/{session_id}/rewind": {"seq": 100},
    "POST /sessions/{session_id}/children": {"prompt": "Hello"},
    "POST /sessions/{session_id}/interrupt": {"prompt": "Hello"},
    "PATCH /workspaces/{workspace_id}": {"quota_mb": 1},
    "POST /interactions/{interaction_id}/answer": {"decision": "allow"},
    "POST /sessions/{session_id}/permissions/check": {"tool": "Bash", "input": {"command": "ls"}},
}
SPOOFED = {
    "X-Forwarded-User": "alice",
    "X-Remote-User": "admin",
    "Remote-User": "admin",
    "X-User": "alice",
    "X-Forwarded-For": "127.0.0.1",
    "X-Forwarded-Email": "alice@example.com",
    "X-Api-Key": "admin",
    "Forwarded": "for=127.0.0.1;by=127.0.0.1",
    "Cookie": "user=alice; session=admin",
}


@dataclass
class Operation:
    method: str
    path: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.path.removeprefix(API)}"

    @property
    def has_object(self) -> bool:
        return "{" in self.path

    def request(self, names: dict[str, str]) -> dict[str, Any]:
        """The request on these objects."""
        path = self.path
        for name, value in names.items():
            path = path.replace(f"{{{name}}}", value)
        assert "{" not in path, f"what is a stranger to put into {path}?"
        body: Any = BODIES.get(self.name, ADMINISTRATIVE.get(self.name, {}))
        if self.name in WITHOUT_OBJECT:
            body = WITHOUT_OBJECT[self.name][0]
        given: dict[str, Any] = {"method": self.method, "url": path}
        if isinstance(body, bytes):
            return given | {"content": body}
        if self.method in ("GET", "DELETE") or body is None:
            return given
        text = json.dumps(body).replace("SESSION", names["session_id"]).replace("USER", names["user_id"])
        text = text.replace("NEW", new_id())
        return given | {"content": text, "headers": {"Content-Type": "application/json"}}


@dataclass
class House:
    """A running server with Alice's things in it."""

    api: Any
    http: httpx.AsyncClient
    operations: list[Operation]
    alice: dict[str, str]
    nobody: dict[str, str]
    alices_key: str
    secrets: list[str] = field(default_factory=list)

    async def ask(self, request: dict[str, Any], token: str | None, **more: Any) -> httpx.Response:
        headers = {**request.get("headers", {}), **more.pop("headers", {})}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return await self.http.request(**{**request, "headers": headers}, **more)

    async def key(self, user: str, **columns: Any) -> str:
        """A key straight in the store, as no call would make it."""
        key, secret = make_key(user, scopes=[Scope.READ, Scope.WRITE], now=utc_now())

        def work(tx: Any) -> None:
            tx.users.ensure(user, utc_now())
            tx.keys.add(key.model_copy(update=columns))

        await self.api.server.services.store.write(work)
        self.secrets.append(secret)
        return secret

    async def state(self) -> Any:
        """Everything of Alice's, as she sees it."""
        session = f"/sessions/{self.alice['session_id']}"
        found = []
        for path in (
            session,
            f"{session}/turns",
            f"{session}/events",
            f"{session}/files",
            "/keys",
            "/workspaces",
            "/interactions",
            "/permissions/rules",
            "/environments",
            f"{session}/artifacts",
        ):
            response = await self.http.get(API + path, headers={"Authorization": f"Bearer {self.alices_key}"})
            assert response.status_code == 200
            found.append([{**item, "last_used_at": 0} for item in response.json().get("data", [response.json()])])
        return found


@pytest.fixture
async def house(start: Any) -> Any:
    api = await start(jwt={"secret": SECRET, "audience": "carrel"}, static_token=STATIC)
    made = await api.ask("POST", "/keys", 201, json={"user": "alice"})
    as_alice = {"Authorization": f"Bearer {made['key']}"}
    session = (await api.ask("POST", "/sessions", 201, json={"title": MARK}, headers=as_alice))["id"]
    body = {"prompt": "Hello", "wait": True}
    turn = (await api.ask("POST", f"/sessions/{session}/turns", 200, json=body, headers=as_alice))["id"]
    await api.ask("PUT", f"/sessions/{session}/files/a.txt", 200, content=MARK.encode(), headers=as_alice)
    async with httpx.AsyncClient(base_url=api.server.url, timeout=60) as http:
        document = (await http.get("/openapi.json")).json()
        operations = [
            Operation(method.upper(), path)
            for path, item in document["paths"].items()
            for method in item
            if path not in OPEN
        ]
        shop = await api.ask("POST", "/workspaces", 201, json={"name": MARK}, headers=as_alice)
        asked = Interaction(
            id=new_id(),
            session_id=session,
            owner="alice",
            turn_id=None,
            kind=InteractionKind.PERMISSION,
            tool="Bash",
            input={"command": MARK},
            input_digest="0" * 64,
            created_at=utc_now(),
        )
        await api.server.services.store.write(lambda tx: tx.interactions.add(asked))
        rule = {"scope": "user", "effect": "deny", "rule": f"Bash({MARK})"}
        written = await api.ask("POST", "/permissions/rules", 201, json=rule, headers=as_alice)
        environment = {"description": MARK, "allowed_roles": ["user:alice"]}
        await api.ask("PUT", "/environments/alices", 201, json=environment)
        kept = await api.ask("POST", f"/sessions/{session}/snapshots", 201, headers=as_alice)
        path = {"path": "a.txt"}
        published = await api.ask("POST", f"/sessions/{session}/artifacts", 201, json=path, headers=as_alice)
        alice = {
            "environment_id": "alices",
            "secret_id": "ALICES",
            "session_id": session,
            "turn_id": turn,
            "snapshot_id": kept["id"],
            "artifact_id": published["id"],
            "workspace_id": shop["id"],
            "interaction_id": asked.id,
            "rule_id": written["id"],
            "path": "a.txt",
            "key_id": made["id"],
            "user_id": "alice",
        }
        nobody = {**dict.fromkeys(alice, NOBODY), "path": "a.txt", "user_id": "nobody"}
        yield House(api, http, operations, alice, nobody, made["key"], [made["key"], api.server.key, STATIC, SECRET])


def test_what_is_said_of_routes_is_of_routes_there_are() -> None:
    assert not set(WITHOUT_OBJECT) & set(ADMINISTRATIVE)
    assert all("{" not in name for name in WITHOUT_OBJECT)


# ---------------------------------------------------------------------------------------------------------- strangers


async def strangers(house: House) -> Iterator[tuple[str, str]]:
    """Callers who are let in and are not Alice, by every way in; the first may do all that a user may."""
    bob = await house.key("bob")
    response = await house.ask({"method": "POST", "url": f"{API}/sessions", "json": {}}, bob)
    session = response.json()["id"]
    ticket = await house.ask(
        {"method": "POST", "url": f"{API}/auth/tickets", "json": {"session_id": session, "reusable": True}}, bob
    )
    agent = "cak-of-an-agent-of-bobs"
    sandbox = Sandbox(
        id=new_id(),
        session_id=session,
        generation=1,
        status=SandboxStatus.ENDING,
        runtime="local",
        link_token_hash="l",
        agent_token_hash=sha256(agent.encode()).hexdigest(),
        created_at=utc_now(),
    )
    await house.api.server.services.store.write(lambda tx: tx.sandboxes.add(sandbox))
    claims = {"sub": "bob", "aud": "carrel", "exp": int(time.time()) + 600}
    found = {
        "key": bob,
        "jwt": jwt.encode(claims, SECRET, "HS256"),
        "static": STATIC,
        "browser": ticket.json()["ticket"],
        "agent": agent,
    }
    house.secrets += found.values()
    return iter(found.items())


async def test_nobody_sees_or_changes_what_is_not_theirs(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    before = await house.state()
    assert len(house.operations) > 30
    for kind, token in await strangers(house):
        for operation in house.operations:
            where = f"{operation.name} by {kind}"
            answer = await house.ask(operation.request(house.alice), token)
            to_nobody = await house.ask(operation.request(house.nobody), token)
            tells = [word for word in (MARK, *house.alice.values()) if len(word) > 5 and word in said(answer)]
            assert not tells, f"{where} tells {tells}"
            if operation.name in ADMINISTRATIVE:
                assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope"), where
            elif operation.has_object:
                expected = (404,) if kind in ("key", "jwt", "static") else (403, 404)
                assert answer.status_code in expected, f"{where}: {answer.status_code} {answer.text}"
            else:
                assert operation.name in WITHOUT_OBJECT, f"{operation.name} is not known here: whose things are it?"
                told = WITHOUT_OBJECT[operation.name][1]
                allowed = (told,) if kind in ("key", "jwt", "static") else (told, 403)
                assert answer.status_code in allowed, f"{where}: {answer.status_code} {answer.text}"
            if operation.has_object or answer.status_code >= 400:
                assert alike(answer) == alike(to_nobody), f"{where} tells whether there is one"
    assert await house.state() == before
    logged = capfd.readouterr()
    assert not [secret for secret in house.secrets if secret in logged.out + logged.err]


def said(answer: httpx.Response) -> str:
    if not answer.headers.get("content-type", "").startswith("application/problem+json"):
        return answer.text
    problem = answer.json()
    del problem["instance"]  # what the caller itself has asked for
    return json.dumps(problem)


def alike(answer: httpx.Response) -> Any:
    try:
        body = answer.json()
    except ValueError:
        body = answer.text
    if isinstance(body, dict):
        body.pop("instance", None)
    return answer.status_code, body


async def test_lists_have_ones_own_things_alone(house: House) -> None:
    bob = await house.key("bob")
    for path in ("/sessions", "/keys?user=alice", "/sessions?status=idle"):
        listed = await house.ask({"method": "GET", "url": API + path}, bob)
        assert (listed.status_code, listed.json()["data"]) == (200, []), path
    own = await house.ask({"method": "GET", "url": f"{API}/keys"}, bob)
    assert [key["user_id"] for key in own.json()["data"]] == ["bob"]


async def test_an_idempotency_key_of_somebody_else_is_another_key(house: House) -> None:
    bob = await house.key("bob")
    request = {"method": "POST", "url": f"{API}/sessions", "json": {}, "headers": {"Idempotency-Key": "the same"}}
    hers = await house.ask(request, house.alices_key)
    his = await house.ask(request, bob)
    again = await house.ask(request, house.alices_key)
    assert hers.json()["id"] == again.json()["id"] != his.json()["id"]


async def test_a_websocket_of_somebody_elses_is_not_there(house: House) -> None:
    for kind, token in await strangers(house):
        closed = [await closing(house, house.alice["session_id"], token), await closing(house, NOBODY, token)]
        assert closed == [(4004, "session_not_found")] * 2, kind
    assert await closing(house, NOBODY, house.api.server.key) == (4004, "session_not_found")


async def closing(
    house: House, session: str, token: str | None, query: str = "", headers: dict[str, str] | None = None
) -> tuple[int, str]:
    address = house.api.server.url.replace("http", "ws") + f"{API}/sessions/{session}/stream{query}"
    given = dict(headers or {})
    if token is not None:
        given["Authorization"] = f"Bearer {token}"
    async with connect(address, additional_headers=given) as socket:
        with contextlib.suppress(ConnectionClosed):
            if token is None:
                await socket.send('{"type":"ping"}')
            while True:
                await asyncio.wait_for(socket.recv(), 20)
    return int(socket.close_code), str(socket.close_reason)


# ---------------------------------------------------------------------------------------------------- nobody is let in


def unsigned(claims: dict[str, Any]) -> str:
    parts = [json.dumps({"alg": "none", "typ": "JWT"}).encode(), json.dumps(claims).encode()]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts) + "."


async def outsiders(house: House) -> dict[str, tuple[str | None, dict[str, str], dict[str, str]]]:
    """Callers who must not be let in: a token, headers, a query."""
    await house.key("carol")
    await house.api.ask("PATCH", "/users/carol", 200, json={"disabled": True})
    good = {"sub": "alice", "aud": "carrel", "exp": int(time.time()) + 600, "scope": "admin"}
    ticket = await house.api.ask("POST", "/auth/tickets", 201, json={"session_id": house.alice["session_id"]})
    house.secrets.append(ticket["ticket"])
    tokens = {
        "wrong": "carrel_sk_" + "x" * 43,
        "expired": await house.key("alice", expires_at=utc_now() - timedelta(seconds=1)),
        "revoked": await house.key("alice", revoked_at=utc_now()),
        "disabled": await house.key("carol"),
        "alg none": unsigned(good),
        "another secret": jwt.encode(good, SECRET[::-1], "HS256"),
        "wrong audience": jwt.encode({**good, "aud": "another"}, SECRET, "HS256"),
        "no audience": jwt.encode({"sub": "alice", "exp": good["exp"]}, SECRET, "HS256"),
        "expired jwt": jwt.encode({**good, "exp": int(time.time()) - 3600}, SECRET, "HS256"),
        "no expiry": jwt.encode({"sub": "alice", "aud": "carrel"}, SECRET, "HS256"),
        "single-use ticket as a token": ticket["ticket"],
        "the digest of a key": sha256(house.alices_key.encode()).hexdigest(),
    }
    in_address = dict.fromkeys(("token", "access_token", "api_key", "key", "ticket"), house.api.server.key)
    return {
        "no key": (None, {}, {}),
        "spoofed headers": (None, SPOOFED, {}),
        "a key in the address": (None, {}, in_address),
        **{kind: (token, {}, {}) for kind, token in tokens.items()},
    }


async def test_without_a_good_key_nothing_is_told(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    came = await outsiders(house)
    before = await house.state()
    for kind, (token, headers, query) in came.items():
        for operation in house.operations:
            answer = await house.ask(operation.request(house.alice), token, headers=headers, params=query or None)
            assert answer.status_code == 401, f"{operation.name} with {kind}: {answer.status_code} {answer.text}"
            problem = answer.json()
            assert problem.pop("instance") == answer.request.url.path
            assert problem == EVERY_401, kind
            assert answer.headers["www-authenticate"] == "Bearer"
    assert await house.state() == before
    logged = capfd.readouterr()
    assert not [secret for secret in house.secrets if secret in logged.out + logged.err]


EVERY_401 = {
    "type": "about:blank",
    "title": "Unauthorized",
    "status": 401,
    "detail": "A valid key is required: send it as `Authorization: Bearer <key>`. The first key is in DATA/admin.key.",
    "code": "authentication_required",
}


async def test_without_a_good_key_no_websocket_opens(house: House) -> None:
    for kind, (token, headers, query) in (await outsiders(house)).items():
        address = "?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else ""
        for session in (house.alice["session_id"], NOBODY):
            closed = await closing(house, session, token, address, headers)
            assert closed == (4001, "authentication_required"), kind


async def test_the_open_routes_are_open(house: House) -> None:
    for path in (*OPEN, "/docs", "/openapi.json"):
        assert (await house.http.get(path)).status_code == 200
