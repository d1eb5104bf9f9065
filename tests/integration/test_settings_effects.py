"""Each setting of a whole server changes what it says; `tests/unit/settings/test_effects.py` knows where each is shown."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest
import sqlalchemy as sa
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from carrel.cli.server import running
from carrel.model_gateway.scripted import create_app
from carrel.runtimes.local.nursery import Nursery
from carrel.settings import load_settings

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


class Upstream:
    """The scripted model, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> Any:
        inner = create_app()

        async def recorded(scope: Any, receive: Any, send: Any) -> None:
            self.headers.append({name.decode(): value.decode() for name, value in scope.get("headers", [])})
            parts: list[bytes] = []

            async def listen() -> Any:
                message = await receive()
                parts.append(message.get("body", b""))
                if message["type"] == "http.request" and not message.get("more_body") and b"".join(parts):
                    self.bodies.append(json.loads(b"".join(parts)))
                return message

            await inner(scope, listen, send)

        return recorded

    @property
    def told(self) -> dict[str, Any]:
        """The last prompt's request."""
        return [body for body in self.bodies if body.get("tools")][-1]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    found = Upstream()
    config = uvicorn.Config(
        found.app(), host="127.0.0.1", port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(), name="scripted model")
    while not server.started:
        await asyncio.sleep(0.005)
    found.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield found
    server.should_exit = True
    await serving


async def initialised(api, session) -> dict:
    return [event["data"] for event in await api.events(session) if event["type"] == "agent.initialised"][-1]


# ------------------------------------------------------------------------------------------------------ the server's


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.2", 0))
        return int(held.getsockname()[1])


async def test_host_and_port(start):
    port = free_port()
    api = await start(host="127.0.0.2", port=port)
    assert api.server.url == f"http://127.0.0.2:{port}"
    await api.session()


async def test_data_and_the_databases_path(start, tmp_path):
    await start(data=tmp_path / "here")
    assert (tmp_path / "here/carrel.db").is_file()
    await start(data=tmp_path / "there", database={"path": tmp_path / "elsewhere/rows.db"})
    assert (tmp_path / "elsewhere/rows.db").is_file()
    assert not (tmp_path / "there/carrel.db").exists()


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
async def test_durability(start, durability, level):
    api = await start(durability=durability)
    store = api.server.services.store
    found = await store.write(lambda tx: tx.log._connection.exec_driver_sql("PRAGMA synchronous").scalar())
    assert found == level


async def logged(tmp_path, setting):
    """The log of a server that starts with this setting and ends."""
    arguments = ["--port", "0", "--model-upstream", "scripted", "--set", setting]
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "carrel", "--data", str(tmp_path / "data"), "serve", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        while not (tmp_path / "data/server.json").exists():
            assert server.returncode is None
            await asyncio.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        _, err = await server.communicate()
    return err.decode()


@pytest.mark.parametrize(("level", "said"), [("info", True), ("error", False)])
async def test_log_level(tmp_path, level, said):
    assert ("server.stopped" in await logged(tmp_path, f"log_level={level}")) is said


@pytest.mark.parametrize(("form", "begins"), [("json", "{"), ("console", "2")])
async def test_log_format(tmp_path, form, begins):
    lines = (await logged(tmp_path, f"observability.log_format={form}")).splitlines()
    (line,) = [line for line in lines if "server.stopped" in line]
    assert line.startswith(begins)


@pytest.mark.parametrize(("seconds", "status"), [(20, "succeeded"), (0, "interrupted")])
async def test_drain_seconds(tmp_path, start, seconds, status):
    given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": seconds}
    async with running(load_settings(overrides=given)) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", headers=headers, timeout=60) as http:
            session = (await http.post("/sessions", json={})).json()["id"]
            turn = (await http.post(f"/sessions/{session}/turns", json={"prompt": "[[count: 60 @20]]"})).json()["id"]
            while (await http.get(f"/sessions/{session}/turns/{turn}")).json()["status"] != "running":
                await asyncio.sleep(0.02)
    api = await start()
    assert (await api.ask("GET", f"/sessions/{session}/turns/{turn}"))["status"] == status


async def test_max_queued_turns(start):
    api = await start(max_queued_turns=1)
    session = await api.session()
    first = await api.send(session, "[[count: 10000 @20]]")
    await api.until_event(session, "turn.started", first)
    await api.send(session, "waits")
    assert (await api.ask("POST", f"/sessions/{session}/turns", 429, json={"prompt": "x"}))["code"] == "queue_full"


async def test_heartbeat_seconds(start):
    api = await start(heartbeat_seconds=0.1)
    session = await api.session()
    seen = 0
    async with (
        asyncio.timeout(10),
        api.http.stream("GET", f"/sessions/{session}/events", headers={"Accept": "text/event-stream"}) as response,
    ):
        async for line in response.aiter_lines():
            seen += line.startswith(":")
            if seen >= 3:
                break
    assert seen == 3


# ------------------------------------------------------------------------------------------------------------ the door


@pytest.mark.parametrize(("name", "token", "status"), [("per_key", None, 200), ("per_address", "a guess", 401)])
async def test_rate_limits(start, name, token, status):
    api = await start(rate_limits={name: "5/minute"})
    headers = {"Authorization": f"Bearer {token or api.server.key}"}
    answers = [(await api.http.get("/me", headers=headers)).status_code for _ in range(6)]
    assert answers == [status] * 5 + [429]


async def test_cors_origins(start):
    page = "https://app.example.com"
    api = await start(cors_origins=[page])
    answer = await api.http.get("/me", headers={"Origin": page})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
    refused = await api.http.get("/me", headers={"Origin": "https://other.example.com"})
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)


@pytest.mark.parametrize(("trusted", "address"), [(["127.0.0.0/8"], "198.51.100.9"), ([], "127.0.0.1")])
async def test_trusted_proxies(start, trusted, address):
    api = await start(trusted_proxies=trusted)
    await api.ask("POST", "/sessions", 201, json={}, headers={"X-Forwarded-For": "198.51.100.9"})

    async def recorded() -> Any:
        return (await api.ask("GET", "/audit", params={"action": "session.create"}))["data"]

    (record,) = await api.until("it is on record", recorded)
    assert record["address"] == address


# ---------------------------------------------------------------------------------------------------- the road to the model


@pytest.mark.parametrize(
    ("given", "header", "value"),
    [
        ({"anthropic_api_key": "sk-one"}, "x-api-key", "sk-one"),
        ({"anthropic_auth_token": "two"}, "authorization", "Bearer two"),
        ({"claude_code_oauth_token": "sk-ant-oat01-three"}, "authorization", "Bearer sk-ant-oat01-three"),
    ],
)
async def test_the_credential_and_the_apis_address(start, upstream, given, header, value):
    api = await start(model_upstream="anthropic", anthropic_base_url=upstream.url, **given)
    await api.ask("GET", "/models")
    assert upstream.headers[-1][header] == value


async def test_model_upstream(start, upstream, tmp_path):
    script = tmp_path / "model.yaml"
    script.write_text("default:\n  - say: A script speaks.\n")
    api = await start(model_upstream=f"scripted:{script}")
    assert (await api.run(await api.session(), "hello"))["text"] == "A script speaks."
    api = await start(model_upstream=upstream.url, data=tmp_path / "other")
    await api.run(await api.session(), "hello")
    assert upstream.told["messages"]


# -------------------------------------------------------------------------------------------------------- sandboxes


@pytest.mark.requires("root")
async def test_first_sandbox_uid(start):
    api = await start(first_sandbox_uid=810_000)
    result = await api.run(await api.session(), "[[bash: id -u]]")
    assert 810_000 < int(result["tool_calls"][0]["result"]) < 810_100


async def test_launch_timeout_seconds(start, tmp_path):
    deaf = tmp_path / "claude"
    deaf.write_text("#!/bin/sh\nexec sleep 300\n")
    deaf.chmod(0o755)
    api = await start(cli_path=deaf, launch_timeout_seconds=0.5)
    result = await api.run(await api.session(), "hello")
    assert (result["status"], result["error"]["code"]) == ("failed", "sandbox_launch_failed")


async def test_what_a_runner_is_told(start, monkeypatch):
    # What it does with these is shown in tests/unit/runner.
    told = []
    fork = Nursery.fork

    async def listen(nursery: Nursery, bootstrap: Any) -> Any:
        told.append(bootstrap)
        return await fork(nursery, bootstrap)

    monkeypatch.setattr(Nursery, "fork", listen)
    given = {
        "reconnect_window_seconds": 33.0,
        "max_frame_bytes": 3 * 2**20,
        "outbox_memory_bytes": 1_234_567,
        "outbox_disk_bytes": 2_345_678,
    }
    api = await start(**given)
    assert (await api.run(await api.session(), "hello"))["status"] == "succeeded"
    assert {name: getattr(told[0], name) for name in given} == given


# --------------------------------------------------------------------------------------------- users and how much there is


async def test_users_base_dir(start, tmp_path):
    api = await start(users={"base_dir": tmp_path / "people"})
    session = await api.session(workspace={"type": "user", "subdir": "app"})
    await api.run(session, "[[write: a | b]]")
    assert (tmp_path / "people/admin/app/a").read_text() == "b"


async def test_users_auto_create_dir(start):
    api = await start(users={"auto_create_dir": False})
    answer = await api.http.post("/sessions", json={"workspace": {"type": "user", "subdir": "app"}})
    assert answer.json()["code"] == "workspace_missing"


@pytest.mark.parametrize("name", ["max_sessions", "max_sessions_per_user"])
async def test_limits_of_sessions(start, name):
    api = await start(limits={name: 2})
    for _ in range(2):
        await api.session()
    assert (await api.ask("POST", "/sessions", 429, json={}))["code"] == "session_limit_reached"


async def test_limits_of_trees(start):
    api = await start(limits={"max_depth": 2, "max_children": 3, "max_tree": 4, "max_concurrent_turns": 1})

    async def begin(parent, expected=201):
        return await api.ask("POST", f"/sessions/{parent}/children", expected, json={"prompt": "hello"})

    root = await api.session()
    first, second = (await begin(root))["id"], (await begin(root))["id"]
    below = (await begin(first))["id"]
    assert (await begin(below, 403))["code"] == "too_deep"
    third = (await begin(root))["id"]
    assert (await begin(root, 429))["limit"] == 3
    assert (await begin(second, 429))["limit"] == 4
    await api.ask("POST", f"/sessions/{third}/stop")
    await begin(second)


async def test_limits_of_turns(start):
    api = await start(limits={"max_concurrent_turns": 1, "max_waiting_turns": 1})
    first, second = await api.session(), await api.session()
    at_work = await api.send(first, "[[count: 10000 @20]]")
    await api.until_event(first, "turn.started", at_work)
    waits = await api.send(second, "hello")
    assert (await api.ask("POST", f"/sessions/{second}/turns", 429, json={"prompt": "x"}))["code"] == "queue_full"
    await api.ask("POST", f"/sessions/{first}/interrupt", 202)
    ended = await api.until_event(first, "turn.completed", at_work)
    assert (await api.until_event(second, "turn.started", waits))["at"] >= ended["at"]
    await api.until_event(second, "turn.completed", waits)


# --------------------------------------------------------------------------------------------------- sessions' defaults


async def test_defaults_reach_the_model(start, upstream):
    api = await start(
        model_upstream=upstream.url,
        anthropic_model="claude-haiku-5-5",
        defaults={"system_prompt": "You are PERIWINKLE.", "model": "claude-sonnet-5", "setting_sources": ["project"]},
    )
    session = await api.session()
    await api.http.put(f"/sessions/{session}/files/CLAUDE.md", content="Always say MARIGOLD.")
    await api.run(session, "hello")
    assert "You are PERIWINKLE." in json.dumps(upstream.told["system"])
    assert upstream.told["model"] == "claude-sonnet-5"
    assert "MARIGOLD" in json.dumps(upstream.told["messages"])
    spec = (await api.ask("GET", f"/sessions/{session}"))["spec"]
    assert spec["system_prompt"] == "You are PERIWINKLE."
    # What the caller names wins, and null goes back to the default.
    await api.ask("PATCH", f"/sessions/{session}", json={"model": "claude-opus-5-5"})
    await api.run(session, "hello")
    assert upstream.told["model"] == "claude-opus-5-5"
    changed = await api.ask("PATCH", f"/sessions/{session}", json={"model": None})
    assert changed["spec"]["model"] == "claude-sonnet-5"
    await api.run(session, "hello")
    assert upstream.told["model"] == "claude-sonnet-5"


@pytest.fixture
async def free_server():
    """The port of a server that reads what comes and says nothing."""

    async def read(reader, writer):
        while await reader.read(2**20):
            pass
        writer.close()

    server = await asyncio.start_server(read, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_bounds_of_the_egress_proxy(start, free_server):
    """One connection at once, ended after a silence, and cut off after a megabyte."""
    egress = {"private_networks": ["127.0.0.0/8"], "max_connections": 1, "idle_seconds": 0.5, "max_mb": 1}
    api = await start(egress=egress, network={"allow": [f"localhost:{free_server}"]})
    session = await api.session()
    script = f"""
import socket
def tunnel():
    connection = socket.create_connection(("127.0.0.1", 3128), timeout=20)
    connection.sendall(b"CONNECT localhost:{free_server} HTTP/1.1\\r\\n\\r\\n")
    return connection, connection.recv(100).split()[1].decode()
first, status = tunnel()
print(status, tunnel()[1], first.recv(1))
second, status = tunnel()
sent = 0
try:
    while sent < 64 * 2**20:
        sent += second.send(b"x" * 65536)
except OSError:
    pass
print(status, sent < 32 * 2**20)
"""
    await api.ask("PUT", f"/sessions/{session}/files/bounds.py", content=script.encode())
    turn = await api.run(session, "[[bash: python3 bounds.py]]")
    assert turn["tool_calls"][0]["result"].splitlines() == ["200 429 b''", "200 True"]


async def test_what_the_caller_names_wins(start, upstream):
    api = await start(
        model_upstream=upstream.url, defaults={"system_prompt": "You are PERIWINKLE.", "setting_sources": ["project"]}
    )
    session = await api.session(append_system_prompt="Be MARIGOLD.", setting_sources=[])
    await api.http.put(f"/sessions/{session}/files/CLAUDE.md", content="Always say FREESIA.")
    await api.run(session, "hello")
    assert "PERIWINKLE" not in json.dumps(upstream.told)
    assert "MARIGOLD" in json.dumps(upstream.told["system"])
    assert "FREESIA" not in json.dumps(upstream.told["messages"])


async def test_defaults_of_tools_and_permissions(start):
    api = await start(
        defaults={"permission_mode": "default", "allowed_tools": ["Write"], "disallowed_tools": ["WebSearch"]}
    )
    session = await api.session(ask_expires_seconds=0)
    result = await api.run(session, "[[write: a | b]] [[bash: rm a]]")
    assert [call["is_error"] for call in result["tool_calls"]] == [False, True]
    known = await initialised(api, session)
    assert known["permission_mode"] == "default"
    assert "WebSearch" not in known["tools"]


async def test_default_of_turns_and_time(start):
    api = await start(defaults={"max_turns": 2, "ttl_seconds": 1234})
    session = await api.session()
    result = await api.run(session, "[[bash: echo 1]] [[bash: echo 2]] [[bash: echo 3]]")
    assert (result["stop_reason"], len(result["tool_calls"])) == ("max_turns", 2)
    assert (await api.ask("GET", f"/sessions/{session}"))["ttl_seconds"] == 1234
    assert (await api.ask("GET", f"/sessions/{await api.session(ttl_seconds=99)}"))["ttl_seconds"] == 99


@pytest.mark.parametrize(("sources", "read"), [(None, True), ([], False), (["user"], False), (["project"], True)])
async def test_setting_sources_say_which_files_of_the_project_are_read(start, upstream, sources, read):
    api = await start(model_upstream=upstream.url)
    session = await api.session(**({} if sources is None else {"setting_sources": sources}))
    for path, content in {
        "CLAUDE.md": "Always say FREESIA.",
        ".mcp.json": json.dumps({"mcpServers": {"mute": {"command": "/bin/true"}}}),
        ".claude/settings.json": json.dumps({"permissions": {"deny": ["WebFetch"]}}),
    }.items():
        await api.http.put(f"/sessions/{session}/files/{path}", content=content)
    await api.run(session, "hello")
    known = await initialised(api, session)
    assert ("FREESIA" in json.dumps(upstream.told["messages"])) is read
    assert ("mute" in [server["name"] for server in known["mcp_servers"]]) is read
    assert ("WebFetch" not in known["tools"]) is read


# ------------------------------------------------------------------------------------- tokens, database, what is seen

_SECRET = "a-secret-of-32-bytes-that-is-not-in-any-list"


def _bearer(**claims):
    token = jwt.encode({"exp": int(time.time()) + 60, **claims}, _SECRET)
    return {"Authorization": f"Bearer {token}"}


async def test_who_vouches_for_tokens(start):
    """secret, audience, leeway_seconds, user_claim, scope_claim; issuer is shown with the identity provider."""
    api = await start(
        jwt={
            "secret": _SECRET,
            "audience": "carrel",
            "leeway_seconds": 120,
            "user_claim": "email_name",
            "scope_claim": "rights",
        }
    )
    known = {"email_name": "carol", "sub": "somebody-else", "aud": "carrel", "rights": "sessions:read"}
    me = await api.ask("GET", "/me", headers=_bearer(**known))
    assert (me["user"], me["scopes"]) == ("carol", ["sessions:read"])
    await api.ask("GET", "/me", headers=_bearer(**known | {"exp": int(time.time()) - 60}))
    await api.ask("GET", "/me", 401, headers=_bearer(**known | {"exp": int(time.time()) - 180}))
    await api.ask("GET", "/me", 401, headers=_bearer(**known | {"aud": "another"}))
    await api.ask("GET", "/me", 401, headers=_bearer(sub="carol", aud="carrel"))


async def test_where_the_keys_of_tokens_are(start):
    """jwks_url: its keys count, and those of nobody else."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key())) | {"kid": "k1", "alg": "ES256", "use": "sig"}

    async def keys(request):
        return JSONResponse({"keys": [public]})

    config = uvicorn.Config(Starlette(routes=[Route("/keys", keys)]), host="127.0.0.1", port=0, log_level="critical")
    provider = uvicorn.Server(config)
    task = asyncio.create_task(provider.serve())
    while not provider.started:
        await asyncio.sleep(0.01)
    try:
        port = provider.servers[0].sockets[0].getsockname()[1]
        api = await start(jwt={"jwks_url": f"http://127.0.0.1:{port}/keys"})
        claims = {"sub": "dora", "exp": int(time.time()) + 60}
        token = jwt.encode(claims, private, algorithm="ES256", headers={"kid": "k1"})
        assert (await api.ask("GET", "/me", headers={"Authorization": f"Bearer {token}"}))["user"] == "dora"
        other = jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", headers={"kid": "k1"})
        await api.ask("GET", "/me", 401, headers={"Authorization": f"Bearer {other}"})
    finally:
        provider.should_exit = True
        await task


@pytest.mark.requires("postgres")
async def test_the_database_and_its_connections(start, postgres):
    """url, pool_size, statement_timeout_seconds."""
    url = await asyncio.to_thread(postgres)
    database = {"url": url, "pool_size": 2, "statement_timeout_seconds": 7}
    api = await start(database=database)
    await asyncio.gather(*(api.session() for _ in range(20)))
    assert not (api.server.data / "carrel.db").exists()

    def look(tx):
        count = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        return (
            tx._connection.execute(sa.text("SHOW statement_timeout")).scalar_one(),
            tx._connection.execute(count).scalar_one(),
            tx.counts.sessions(),
        )

    store = api.server.services.store
    timeout, connections, sessions = await store.read(look)
    assert (timeout, sessions) == ("7s", 20)
    assert 1 <= connections <= 2 + 1, "the pool, and one that is kept for locks"


async def test_a_dialects_listener_and_who_may_call_it(start):
    """host, port and auth of every dialect."""
    api = await start(
        dialects={
            "claude-agent-http": {"port": 0, "host": "127.0.0.1", "auth": "none"},
            "claudecode-api": {"port": 0, "host": "::1"},
            "sdk-server": {"port": 0, "host": "::1", "auth": "static-token"},
        },
        static_token="a-token-of-16-bytes",
    )
    listeners = api.server.listeners
    assert listeners["claude-agent-http"].startswith("http://127.0.0.1:")
    assert listeners["sdk-server"].startswith("http://[::1]:")
    async with httpx.AsyncClient() as http:
        url = f"{listeners['claude-agent-http']}/api/v1/sessions"
        assert (await http.get(url, params={"user_id": "u"})).json() == []
        url = f"{listeners['sdk-server']}/sessions"
        assert (await http.get(url)).status_code == 401
        shown = {"Authorization": "Bearer a-token-of-16-bytes"}
        assert (await http.get(url, headers=shown)).json() == {"active_sessions": [], "count": 0}
        # Its own default is the token.
        assert listeners["claudecode-api"].startswith("http://[::1]:")
        url = f"{listeners['claudecode-api']}/api/sessions/dev"
        assert (await http.get(url)).status_code == 401
        assert (await http.get(url, headers=shown)).json() == []
