"""Who may call a dialect, and whose sessions they are. No agent is started."""

from typing import Any

import httpx
import jwt
import pytest

from carrel.api.dialects import DialectAuth, DialectOptions, create_dialect
from carrel.errors import AuthenticationRequired
from carrel.model import ADMIN, Principal, Scope

pytestmark = pytest.mark.requires("bubblewrap")

READER = Principal.of_user("alice", frozenset({Scope.READ}))
BOUND = Principal.of_user("alice").model_copy(update={"session_id": "one"})
STATIC = Principal(name="static", user="static", scopes=frozenset({Scope.READ, Scope.WRITE}))
HOLDERS = {
    "alice": Principal.of_user("alice"),
    "bob": Principal.of_user("bob"),
    "admin": ADMIN,
    "reader": READER,
    "bound": BOUND,
    "static": STATIC,
}


async def authenticate(token: str | None, *, accept: frozenset[str]) -> Principal:
    if token is None or token not in HOLDERS:
        raise AuthenticationRequired
    return HOLDERS[token]


class Callers:
    """A dialect over a running server's services, and callers of many kinds."""

    def __init__(self, services: Any, name: str, tmp_path: Any) -> None:
        options = DialectOptions(auth=DialectAuth("keys", authenticate), users_dir=tmp_path / "people")
        self._app = create_dialect(name, services, options)

    async def ask(self, who: str | None, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        if who is not None:
            headers["Authorization"] = f"Bearer {who}"
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, json=body, headers=headers)


@pytest.fixture
async def agent_http_of(serve, tmp_path):
    return Callers((await serve()).services, "claude-agent-http", tmp_path)


@pytest.fixture
async def sdk_of(serve, tmp_path):
    return Callers((await serve()).services, "sdk-server", tmp_path)


async def created(callers, who, user):
    made = await callers.ask(who, "POST", "/api/v1/sessions", {"user_id": user})
    assert made.status_code == 201, made.text
    assert made.json()["user_id"] == user
    return made.json()["session_id"]


async def test_13_another_user_s_session_is_not_there(agent_http_of):
    session = await created(agent_http_of, "alice", "alice")
    chat = {"session_id": session, "message": "hello"}
    for who, status in (("bob", 404), (None, 401), ("nonsense", 401), ("bound", 403)):
        for method, path, body in [
            ("GET", f"/api/v1/sessions/{session}", None),
            ("POST", f"/api/v1/sessions/{session}/resume", None),
            ("POST", "/api/v1/chat", chat),
            ("DELETE", f"/api/v1/sessions/{session}", None),
        ]:
            answer = await agent_http_of.ask(who, method, path, body)
            assert (answer.status_code, list(answer.json())) == (status, ["detail"]), (who, method, path)
    streamed = await agent_http_of.ask("bob", "POST", "/api/v1/chat/stream", chat)
    assert '"error":"Session not found or expired"' in streamed.text
    assert (await agent_http_of.ask("bob", "GET", "/api/v1/sessions")).json() == []
    assert (await agent_http_of.ask("alice", "GET", "/api/v1/sessions")).json() == [session]


async def test_13_a_user_speaks_for_itself_alone(agent_http_of):
    refused = await agent_http_of.ask("bob", "POST", "/api/v1/sessions", {"user_id": "alice"})
    assert (refused.status_code, refused.json()["detail"]) == (403, "This key may use its own user's user_id only.")
    assert (await agent_http_of.ask("bob", "GET", "/api/v1/sessions?user_id=alice")).status_code == 403
    assert (await agent_http_of.ask("reader", "POST", "/api/v1/sessions", {"user_id": "alice"})).status_code == 403
    assert (await agent_http_of.ask("reader", "GET", "/api/v1/sessions")).json() == []


@pytest.mark.parametrize("trusted", ["admin", "static"])
async def test_a_back_end_speaks_for_every_user(agent_http_of, trusted):
    of_alice = await created(agent_http_of, trusted, "alice")
    of_bob = await created(agent_http_of, trusted, "bob")
    own = await created(agent_http_of, trusted, HOLDERS[trusted].user)
    assert (await agent_http_of.ask(trusted, "GET", "/api/v1/sessions?user_id=alice")).json() == [of_alice]
    assert (await agent_http_of.ask(trusted, "GET", f"/api/v1/sessions?user_id={HOLDERS[trusted].user}")).json() == [
        own
    ]
    assert (await agent_http_of.ask(trusted, "GET", "/api/v1/sessions")).json() == [own, of_bob, of_alice]
    # What it made for a user is that user's own.
    assert (await agent_http_of.ask("bob", "GET", f"/api/v1/sessions/{of_bob}")).status_code == 200
    assert (await agent_http_of.ask(trusted, "DELETE", f"/api/v1/sessions/{of_alice}")).status_code == 204


@pytest.mark.parametrize("who", ["alice", "admin"])
async def test_13_sdk_server_shows_everybody_their_own(sdk_of, who):
    session = (await sdk_of.ask("bob", "POST", "/session/start", {})).json()["session_id"]
    for method, path, body in [
        ("GET", f"/session/{session}", None),
        ("POST", f"/session/{session}/query", {"prompt": "x"}),
        ("POST", f"/session/{session}/interrupt", None),
        ("DELETE", f"/session/{session}", None),
    ]:
        answer = await sdk_of.ask(who, method, path, body)
        assert (answer.status_code, answer.json()) == (404, {"detail": f"Session {session} not found"})
        assert (await sdk_of.ask(None, method, path, body)).status_code == 401
    assert (await sdk_of.ask(who, "GET", "/sessions")).json() == {"active_sessions": [], "count": 0}
    assert (await sdk_of.ask("bob", "GET", "/sessions")).json()["active_sessions"] == [session]


async def test_13_who_has_no_key_is_told_so_before_the_body_is_read(serve):
    server = await serve(dialects={"claude-agent-http": {"port": 0}, "sdk-server": {}})
    unsigned = jwt.encode({"sub": "alice"}, None, algorithm="none")
    spoofed = {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-User": "admin", "X-User-Id": "admin"}
    async with httpx.AsyncClient() as http:
        for base in (
            f"{server.listeners['claude-agent-http']}/api/v1/sessions",
            f"{server.url}/compat/claude-agent-http/api/v1/sessions",
            f"{server.url}/compat/sdk-server/session/start",
        ):
            for headers in ({}, spoofed, {"Authorization": f"Bearer {unsigned}"}, {"Authorization": "Basic x"}):
                answer = await http.post(base, content=b"{", headers=headers)
                assert answer.status_code == 401, (base, headers)
                assert list(answer.json()) == ["detail"]
                assert answer.headers["www-authenticate"] == "Bearer"
            good = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
            assert (await http.post(base, content=b"{", headers=good)).status_code == 422


async def test_16_the_static_token_opens_its_dialect_alone(serve):
    token = "a-static-token-of-thirty-bytes"
    dialects = {"claude-agent-http": {"auth": "static-token"}, "sdk-server": {"auth": "keys"}}
    server = await serve(dialects=dialects, static_token=token)
    async with httpx.AsyncClient(base_url=f"{server.url}/compat", headers={"Authorization": f"Bearer {token}"}) as http:
        made = await http.post("/claude-agent-http/api/v1/sessions", json={"user_id": "alice"})
        assert (made.status_code, made.json()["user_id"]) == (201, "alice")
        assert (await http.get("/sdk-server/sessions")).status_code == 401


async def test_without_auth_pages_of_others_are_refused(serve):
    server = await serve(dialects={"sdk-server": {"port": 0, "auth": "none"}})
    async with httpx.AsyncClient() as http:
        for base in (server.listeners["sdk-server"], f"{server.url}/compat/sdk-server"):
            assert (await http.get(f"{base}/sessions")).status_code == 200
            for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
                refused = await http.post(f"{base}/session/start", json={}, headers=headers)
                assert (refused.status_code, "detail" in refused.json()) == (403, True)
