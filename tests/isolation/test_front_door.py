"""Who may call: every route wants the key but the open ones, and without keys only pages of ours get in."""

import re
import stat

import httpx
import pytest
import websockets
from websockets.asyncio.client import connect

from carrel.cli.server import running
from carrel.errors import DataFolderInUse
from carrel.settings import load_settings

pytestmark = pytest.mark.requires("bubblewrap")

SOME_ID = "01890000-0000-7000-8000-000000000000"
OPEN = {"/health", "/health/live", "/health/ready", "/docs", "/openapi.json"}
WRONG = [
    {},
    {"Authorization": "Bearer carrel_admin_wrong"},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic YTpi"},
    {"Authorization": "KEY"},
    {"Authorization": "Token KEY"},
    {"Authorization": "Bearer KEYx"},
    {"Authorization": b"Bearer \xff\xfe"},
    {"X-Api-Key": "wrong"},
    {"Cookie": "key=KEY"},
]


@pytest.fixture
async def server(tmp_path):
    async with running(
        load_settings(overrides={"data": tmp_path / "data", "port": 0, "model_upstream": "scripted"})
    ) as up:
        yield up


@pytest.fixture
async def keyless(tmp_path):
    settings = load_settings(
        overrides={"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "auth": "none"}
    )
    async with running(settings) as up:
        yield up


async def test_the_key_is_what_opens_the_door(server):
    await every_documented_route_wants_the_key(server)
    await the_key_opens_the_door(server)
    await a_websocket_without_the_key_is_closed_with_4001(server)


async def every_documented_route_wants_the_key(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        document = (await client.get("/openapi.json")).json()
        routes = [(path, method.upper()) for path, item in document["paths"].items() for method in item]
        assert len(routes) > 20
        for path, method in routes:
            target = re.sub(r"\{\w+\}", SOME_ID, path)
            if path in OPEN:
                assert (await client.request(method, target)).status_code == 200, path
                continue
            for headers in WRONG:
                filled = {n: v.replace("KEY", server.key) if isinstance(v, str) else v for n, v in headers.items()}
                for body in ({}, {"json": {}}, {"content": b"{", "headers": {"content-type": "application/json"}}):
                    given = {**body, "headers": {**body.get("headers", {}), **filled}}
                    answer = await client.request(method, target, **given)
                    assert answer.status_code == 401, f"{method} {path} {headers} {body}: {answer.status_code}"
                    assert answer.json()["code"] == "authentication_required"
                    if method == "GET" or headers:
                        break


async def the_key_opens_the_door(server):
    async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}) as client:
        assert (await client.get("/api/v1/sessions")).status_code == 200
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/docs")).status_code == 200


async def a_websocket_without_the_key_is_closed_with_4001(server):
    address = server.url.replace("http", "ws") + f"/api/v1/sessions/{SOME_ID}/stream"
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        async with connect(address, additional_headers=headers) as socket:
            with pytest.raises(websockets.ConnectionClosed):
                await socket.recv()
            assert socket.close_code == 4001
    async with connect(address, additional_headers={"Authorization": f"Bearer {server.key}"}) as socket:
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 4004  # let in, and there is no such session


async def test_the_key_and_its_folder_are_private_and_the_folder_is_taken(server):
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700
    assert stat.S_IMODE((server.data / "admin.key").stat().st_mode) == 0o600
    assert (server.data / "admin.key").read_text() == server.key
    assert len(server.key) > 40
    with pytest.raises(DataFolderInUse):
        async with running(load_settings(overrides={"data": server.data, "port": 0, "model_upstream": "scripted"})):
            pass
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/health")).status_code == 200  # the first one was not disturbed


FOREIGN = [
    {"Host": "evil.example"},  # a name of the attacker's that leads to 127.0.0.1
    {"Host": "evil.example:PORT"},
    {"Host": "localhost.evil.example:PORT"},
    {"Host": "127.0.0.1.evil.example:PORT"},
    {"Host": "localhost@evil.example"},
    {"Host": "0.0.0.0:PORT"},
    {"Host": "["},
    {"Host": "[::1"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost.evil.example:PORT"},
    {"Origin": "http://[", "Host": "127.0.0.1:PORT"},
    {"Origin": "file://"},
    {"Origin": ""},
]


async def test_with_keys_no_foreign_page_gets_in_either(server):
    await no_foreign_page_gets_in(server, {"Authorization": f"Bearer {server.key}"})


async def test_without_keys_no_foreign_page_gets_in(keyless):
    await no_foreign_page_gets_in(keyless, {})


async def no_foreign_page_gets_in(keyless, key):
    port = keyless.url.rpartition(":")[2]
    stream = keyless.url.replace("http", "ws") + f"/api/v1/sessions/{SOME_ID}/stream"
    for headers in FOREIGN:
        filled = {name: value.replace("PORT", port) for name, value in headers.items()}
        async with httpx.AsyncClient(base_url=keyless.url, headers=filled | key) as client:
            for method in ("GET", "POST", "OPTIONS"):
                answer = await client.request(method, "/api/v1/sessions")
                assert answer.status_code == 403, (headers, method, answer.text)
                assert not [name for name in answer.headers if name.startswith("access-control")]
        if headers.get("Origin"):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with connect(stream, additional_headers=filled | key):
                    pass
            assert refused.value.response.status_code == 403, headers
    own = {"Host": f"localhost:{port}"}
    for headers in ({}, own, {"Origin": keyless.url}, own | {"Origin": f"http://localhost:{port}"}, {"Host": "[::1]"}):
        async with httpx.AsyncClient(base_url=keyless.url, headers=headers | key) as client:
            assert (await client.get("/api/v1/sessions")).status_code == 200, headers
