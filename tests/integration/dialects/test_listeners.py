"""Several listeners of one server."""

import asyncio
import json
import socket

import httpx
import pytest

from carrel.api.dialects import Listeners
from carrel.errors import OperatorError

pytestmark = pytest.mark.requires("bubblewrap")


async def test_every_listener_has_its_own_pages_and_all_are_listed(serve):
    server = await serve(dialects={"claude-agent-http": {"port": 0, "auth": "none"}, "sdk-server": {"port": 0}})
    told = json.loads((server.data / "server.json").read_text())
    assert told["url"] == server.url
    assert told["listeners"] == server.listeners == {"api": server.url, **server.listeners}
    assert set(server.listeners) == {"api", "claude-agent-http", "sdk-server"}
    assert len(set(server.listeners.values())) == 3
    titles = {}
    async with httpx.AsyncClient() as http:
        for name, url in server.listeners.items():
            assert (await http.get(f"{url}/health")).json()["status"] == "healthy"
            document = (await http.get(f"{url}/openapi.json")).json()
            titles[name] = document["info"]["title"]
            assert "servers" not in document
            assert "'/openapi.json'" in (await http.get(f"{url}/docs")).text
            if name != "api":
                there = f"{server.url}/compat/{name}"
                mounted = (await http.get(f"{there}/openapi.json")).json()
                assert mounted["servers"] == [{"url": f"/compat/{name}"}]
                assert mounted["paths"] == document["paths"]
                assert f"/compat/{name}/openapi.json" in (await http.get(f"{there}/docs")).text
                # A dialect's port has the dialect alone.
                known = {"Authorization": f"Bearer {server.key}"}
                assert (await http.get(f"{url}/compat/{name}/health", headers=known)).status_code == 404
                assert (await http.get(f"{url}/api/v1/models", headers=known)).status_code == 404
    assert titles == {
        "api": "Carrel",
        "claude-agent-http": "Claude Agent HTTP API",
        "sdk-server": "Claude Agent SDK Server",
    }


async def test_dialects_that_are_not_switched_on_are_not_there(serve):
    server = await serve(dialects={"sdk-server": {}})
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {server.key}"}) as http:
        assert (await http.get(f"{server.url}/compat/sdk-server/sessions")).status_code == 200
        assert (await http.get(f"{server.url}/compat/claude-agent-http/api/v1/sessions")).status_code == 404
    assert set(server.listeners) == {"api"}


async def test_a_port_that_is_taken_stops_the_start_and_leaves_nothing_listening(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OperatorError, match=f"Cannot listen on 127.0.0.1:{port}"):
            await serve(dialects={"sdk-server": {"port": port}})


async def test_sessions_are_the_same_whichever_way_they_are_reached(serve):
    server = await serve(dialects={"sdk-server": {"port": 0}})
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {server.key}"}) as http:
        started = (await http.post(f"{server.listeners['sdk-server']}/session/start", json={})).json()
        native = (await http.get(f"{server.url}/api/v1/sessions/{started['session_id']}")).json()
        assert native["status"] == "idle"
        await http.delete(f"{server.url}/api/v1/sessions/{started['session_id']}")
        assert (await http.get(f"{server.url}/compat/sdk-server/sessions")).json()["count"] == 0


async def test_a_body_that_is_too_large_is_refused_on_every_listener(serve):
    server = await serve(dialects={"sdk-server": {"port": 0, "auth": "none"}})
    answer = await asyncio.to_thread(_declare, server.listeners["sdk-server"])
    assert b" 413 " in answer.split(b"\r\n")[0]


def _declare(url: str) -> bytes:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            f"POST /query HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {2**40}\r\n\r\n"
        )
        connection.sendall(head.encode())
        return connection.recv(4096)


@pytest.mark.parametrize("by", ["own port", "compat"])
async def test_what_stands_before_the_native_api_stands_before_dialects_too(serve, by):
    server = await serve(dialects={"sdk-server": {"port": 0}}, rate_limits={"per_key": "3/minute"})
    url = server.listeners["sdk-server"] if by == "own port" else f"{server.url}/compat/sdk-server"
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {server.key}"}) as http:
        made = await http.post(f"{url}/session/start", json={})
        assert made.headers["x-request-id"]
        answers = [await http.get(f"{url}/sessions") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert (int(answers[-1].headers["retry-after"]) > 0, "detail" in answers[-1].json()) == (True, True)

    async def audited(tx_limit=10):
        from carrel import abc

        page = await server.services.store.read(
            lambda tx: tx.audit.page(abc.AuditFilter(), cursor=None, limit=tx_limit)
        )
        return [record for record in page.items if record.request_id == made.headers["x-request-id"]]

    async with asyncio.timeout(10):
        while not (found := await audited()):
            await asyncio.sleep(0.02)
    assert [(record.principal, record.outcome) for record in found] == [("admin", 200)]


def test_a_dialect_s_own_listener_has_its_own_names():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["carrel.loopback"])

    async def call(loopback):
        front = Listeners(app, {3000: "sdk-server"}, loopback=loopback)
        front.up.set()
        await front({"type": "http", "path": "/", "server": ("10.0.0.1", 3000)}, None, None)

    asyncio.run(call([]))
    asyncio.run(call(["api", "sdk-server"]))
    assert seen == [False, True]
