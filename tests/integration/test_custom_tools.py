"""A tool that is an address, called by the real agent from behind its wall."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from carrel.mcp_gateway.custom_tools import signature

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
LOOPBACK = {"private_networks": ["127.0.0.0/8"]}


class Shop(ThreadingHTTPServer):
    """Tells prices to whoever signs for it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/price"


class _Handler(BaseHTTPRequestHandler):
    server: Shop

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(body)
        signed = signature("of the shop", asked["id"], self.headers["webhook-timestamp"], body)
        right = self.headers["webhook-signature"] == signed
        self.server.refused += not right
        self.send_response(200 if right else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"article": asked["arguments"]["article"], "cents": 42}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Shop() as server:
        thread = threading.Thread(target=server.serve_forever, name="shop")
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


async def test_the_real_agent_calls_a_tool_of_its_environment(start: Any, shop: Shop) -> None:
    api = await start(secrets_key=KEY, egress=LOOPBACK)
    await api.ask("PUT", "/secrets/SIGNING", 204, json={"value": "of the shop"})
    tool = {
        "name": "price",
        "description": "What an article costs.",
        "input_schema": {"type": "object", "properties": {"article": {"type": "string"}}, "required": ["article"]},
        "url": shop.url,
        "signed_with": "SIGNING",
    }
    declared = {"secrets": [{"name": "SIGNING"}], "custom_tools": [tool]}
    await api.ask("PUT", "/environments/shop", 201, json=declared)
    assert (await api.ask("GET", "/environments/shop/status"))["problems"] == []
    session = await api.session(environment="shop")
    result = await api.run(
        session, '[[tool: mcp__custom__price | {"article": "tea"}]] [[tool: mcp__custom__price | {"article": 42}]]'
    )
    price, wrong = (str(call["result"]) for call in result["tool_calls"])
    assert "42" in price
    assert "tea" in price
    assert "does not take this" in wrong
    assert shop.refused == 0
    other = await api.session()
    denied = await api.run(other, '[[tool: mcp__custom__price | {"article": "tea"}]]')
    assert "cents" not in str(denied["tool_calls"][0]["result"]), "sessions of other environments have no such tool"


async def test_its_status_says_what_does_not_answer(start: Any) -> None:
    api = await start()
    tool = {"name": "price", "description": "d", "input_schema": {"type": "object"}, "url": "http://127.0.0.1:9/price"}
    await api.ask("PUT", "/environments/shop", 201, json={"custom_tools": [tool]})
    (problem,) = (await api.ask("GET", "/environments/shop/status"))["problems"]
    assert problem["code"] == "mcp_server_unreachable"
    assert "custom.price" in problem["message"]
