"""MCP servers that need a secret: the real agent uses one that the gateway adds the secret for, and never holds it."""

import asyncio
import base64
import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

KEY = base64.b64encode(b"k" * 32).decode()
VALUE = "tok_only-the-gateway-knows-0123456789"
LOOPBACK = {"private_networks": ["127.0.0.0/8"]}


@dataclass
class Site:
    """An MCP server of the official SDK that wants a bearer token, and what came to it."""

    port: int = 0
    came: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    status: int | None = None
    """What it answers whatever comes, if that is not what it should."""

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/mcp"

    def calls(self) -> set[str]:
        return {method for method, _, _ in self.came}


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def tools() -> MCPServer:
    server = MCPServer("shop")

    @server.tool()
    def price(article: str) -> str:
        """What an article costs."""
        return f"{article} costs 42"

    @server.tool()
    def echo_headers(context: Context) -> str:  # type: ignore[type-arg]
        """Tells what it was sent, as a careless server may."""
        return json.dumps(dict(context.headers or {}))

    @server.tool()
    async def slowly(context: Context) -> str:  # type: ignore[type-arg]
        """Tells of its progress first."""
        await context.report_progress(1, 2, "half")
        await asyncio.sleep(0)
        return "whole"

    return server


@pytest.fixture
def site() -> Iterator[Site]:
    """In a thread of its own: what the SDK leaves behind is not the gateway's."""
    made = Site()
    inner = tools().streamable_http_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        made.came.append((scope["method"], scope["path"], headers))
        status = made.status or (None if headers.get("authorization") == f"Bearer {VALUE}" else 401)
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"location", b"http://x/")]})
            await send({"type": "http.response.body", "body": b"no"})
            return
        await inner(scope, receive, send)

    config = uvicorn.Config(app, log_config=None, lifespan="on", ws="none", timeout_graceful_shutdown=1)
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made.port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="shop")
        thread.start()
        yield made  # whoever connects waits until it is up
        server.should_exit = True
        thread.join(10)


def shop(site: Site, **more: Any) -> dict[str, Any]:
    server = {"type": "http", "url": site.url, "headers": {"Authorization": "Bearer ${secret:SHOP}"}}
    return {"secrets": [{"name": "SHOP"}], "options": {"mcp_servers": {"shop": server}}, **more}


async def opened(start: Any, site: Site, *, value: str = VALUE, **settings: Any) -> Any:
    """A server with the environment `shop`."""
    api = await start(secrets_key=KEY, egress=LOOPBACK, **settings)
    await api.ask("PUT", "/secrets/SHOP", 204, json={"value": value})
    await api.ask("PUT", "/environments/shop", 201, json=shop(site))
    return api


async def servers_of(api: Any, session: str) -> dict[str, str]:
    said = await api.until_event(session, "agent.initialised")
    return {each["name"]: each["status"] for each in said["data"]["mcp_servers"]}


async def test_the_real_agent_uses_the_server_and_holds_no_secret(
    start: Any, site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    api = await opened(start, site)
    session = await api.session(environment="shop")
    call = (
        '[[tool: mcp__shop__price | {"article": "tea"}]] [[tool: mcp__shop__slowly]] [[tool: mcp__shop__echo_headers]]'
    )
    result = await api.run(session, call)
    price, slow, echoed = (str(each["result"]) for each in result["tool_calls"])
    assert "tea costs 42" in price
    assert "whole" in slow
    assert "[hidden by Carrel]" in echoed
    assert await servers_of(api, session) == {"shop": "connected"}
    assert all(headers["authorization"] == f"Bearer {VALUE}" for _, _, headers in site.came)
    # In the agent's environment, files and processes, as it can look itself.
    looked = await api.run(
        session,
        "[[bash: env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; grep -rs tok_only / "
        "--include=* -l --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr; echo looked]]",
    )
    said = str(looked["tool_calls"][0]["result"])
    assert "looked" in said
    assert "CARREL_AGENT_TOKEN" in said, "what it was told of: its own token"
    everything = str(await api.events(session)) + str(await api.ask("GET", "/audit"))
    everything += str(await api.ask("GET", "/environments/shop")) + str(await api.ask("GET", f"/sessions/{session}"))
    assert VALUE not in everything
    data = api.server.data
    found = [path for path in data.rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()]
    assert found == []
    logged = capfd.readouterr()
    assert VALUE not in logged.out + logged.err
    await api.ask("POST", f"/sessions/{session}/stop")


@pytest.mark.parametrize("network", ["open", {"allow": ["example.com"]}])
async def test_whatever_the_network_of_its_sandboxes(start: Any, site: Site, network: Any) -> None:
    api = await opened(start, site)
    await api.ask("PUT", "/environments/shop", 201, json=shop(site, sandbox={"network": network}))
    session = await api.session(environment="shop")
    result = await api.run(session, '[[tool: mcp__shop__price | {"article": "tea"}]]')
    assert "tea costs 42" in str(result["tool_calls"][0]["result"])


@pytest.mark.requires("docker", "images")
async def test_in_a_container_too(start: Any, site: Site) -> None:
    api = await opened(start, site, runtime="docker")
    session = await api.session(environment="shop")
    result = await api.run(session, '[[tool: mcp__shop__price | {"article": "tea"}]] [[bash: env]]')
    price, environment = (str(each["result"]) for each in result["tool_calls"])
    assert "tea costs 42" in price
    assert VALUE not in environment


async def test_without_a_wall_too(start: Any, site: Site) -> None:
    api = await opened(start, site, isolation="none")
    session = await api.session(environment="shop", permission_mode="dontAsk", allowed_tools=["mcp__shop__price"])
    result = await api.run(session, '[[tool: mcp__shop__price | {"article": "tea"}]]')
    assert "tea costs 42" in str(result["tool_calls"][0]["result"])


async def test_a_sandbox_reaches_the_servers_of_its_own_environment_alone(start: Any, site: Site) -> None:
    api = await opened(start, site)
    within, outside = await api.session(environment="shop"), await api.session()
    ask = (
        "curl -s -o /dev/null -w '%{http_code} ' --unix-socket /run/carrel/gateway.sock "
        "-H \"Authorization: Bearer $ANTHROPIC_API_KEY\" -H 'Accept: application/json, text/event-stream' "
        "-H 'Content-Type: application/json' -d '{}' http://gateway/mcp/"
    )
    nobody = ask.replace("$ANTHROPIC_API_KEY", "cak-of-nobody")
    command = f"{ask}shop; {ask}other; {ask}shop/../../v1/models; {nobody}shop"
    said = str((await api.run(within, f"[[bash: {command}]]"))["tool_calls"][0]["result"]).split()
    assert said[0] not in ("401", "404", "502")
    assert said[1:] == ["404", "404", "401"]
    said = str((await api.run(outside, f"[[bash: {ask}shop]]"))["tool_calls"][0]["result"]).split()
    assert said == ["404"]
    assert {path for _, path, _ in site.came} == {"/mcp"}


async def test_status_tells_what_is_wrong(start: Any, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    api = await opened(start, site)

    async def problems() -> list[str]:
        status = await api.ask("POST", "/environments/shop/start")
        return [each["code"] for each in status["problems"]]

    assert await problems() == []
    assert site.calls() == {"POST", "DELETE"}, "the session that was opened to ask is closed"
    await api.ask("PUT", "/secrets/SHOP", 204, json={"value": "wrong-value-0123456789"})
    assert await problems() == ["mcp_server_refused"]
    session = await api.session(environment="shop")
    result = await api.run(session, "[[say: works without]]")
    assert result["status"] == "succeeded"
    assert (await servers_of(api, session))["shop"] == "failed"
    site.status = 302
    assert await problems() == ["mcp_server_unreachable"], "a secret follows no redirect"
    site.status = 500
    assert await problems() == ["mcp_server_unreachable"]
    assert "wrong-value-0123456789" not in "".join(capfd.readouterr())


async def test_an_address_that_is_not_public_is_not_connected_to(start: Any, site: Site) -> None:
    api = await start(secrets_key=KEY)
    await api.ask("PUT", "/secrets/SHOP", 204, json={"value": VALUE})
    await api.ask("PUT", "/environments/shop", 201, json=shop(site))
    status = await api.ask("GET", "/environments/shop/status")
    assert [each["code"] for each in status["problems"]] == ["mcp_server_forbidden"]
    session = await api.session(environment="shop")
    await api.run(session, "[[say: works without]]")
    assert (await servers_of(api, session))["shop"] == "failed"
    assert site.came == []


@pytest.fixture
def short() -> Iterator[str]:
    """A data folder with a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="carrel-", dir="/tmp") as folder:
        yield folder


async def test_a_token_ends_with_its_sandbox(short: str, start: Any, site: Site) -> None:
    api = await opened(start, site, data=short)
    session = await api.session(environment="shop")
    said = await api.run(session, "[[bash: printf %s $CARREL_AGENT_TOKEN]]")
    headers = {"Authorization": f"Bearer {said['tool_calls'][0]['result']}", "Accept": "text/event-stream"}
    road = httpx.AsyncHTTPTransport(uds=f"{short}/run/sandbox/gateway.sock")
    async with httpx.AsyncClient(transport=road, base_url="http://gateway") as client:
        assert (await client.post("/mcp/shop", json={}, headers=headers)).status_code not in (401, 404, 502)
        await api.ask("POST", f"/sessions/{session}/stop")
        assert (await client.post("/mcp/shop", json={}, headers=headers)).status_code == 401
