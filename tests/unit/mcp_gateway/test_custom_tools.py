"""Tools that are addresses: how an agent finds and calls them, what is sent, and what may go wrong."""

import asyncio
import base64
import hmac
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from hashlib import sha256
from typing import Any

import httpx
import pytest
from mcp_types import CallToolResult
from starlette.applications import Starlette
from starlette.routing import Route

from carrel.errors import SecretMissing
from carrel.mcp_gateway.custom_tools import CustomTools, signature
from carrel.protocol.environments import EnvironmentSpec

PRICE = {
    "name": "price",
    "description": "What an article costs.",
    "input_schema": {"type": "object", "properties": {"article": {"type": "string"}}, "required": ["article"]},
    "url": "https://shop.example/tools/price",
    "signed_with": "SIGNING",
    "timeout_seconds": 5,
}
SLOW = {**PRICE, "name": "slow", "timeout_seconds": 0.05, "signed_with": None}
SPEC = EnvironmentSpec.model_validate({"secrets": [{"name": "SIGNING"}], "custom_tools": [PRICE, SLOW]})
ACCEPT = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
Answer = Callable[[httpx.Request], httpx.Response]


class Agent:
    """An agent's side; `answer` is the endpoint's."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.asked: list[httpx.Request] = []
        self.answer: Any = lambda request: httpx.Response(200, json={"cents": 42})
        self.values = {"SIGNING": "a secret of ours"}
        client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        stack.push_async_callback(client.aclose)
        self.tools = CustomTools(client, self.open)
        app = Starlette(routes=[Route("/mcp/custom", self._serve, methods=["GET", "POST", "DELETE"])])
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
        stack.push_async_callback(self.http.aclose)

    async def _serve(self, request: Any) -> Any:
        return self.tools.answering(SPEC, "the-session")

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def open(self, spec: EnvironmentSpec, names: Collection[str]) -> Mapping[str, str]:
        if not set(names) <= set(self.values):
            raise SecretMissing
        return {name: self.values[name] for name in names}

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = await self.http.post("/mcp/custom", json=message, headers=ACCEPT)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["result"])

    async def call(self, tool: str = "price", **arguments: Any) -> CallToolResult:
        return CallToolResult.model_validate(await self.ask("tools/call", name=tool, arguments=arguments))


def text_of(result: CallToolResult) -> str:
    (block,) = result.content
    return str(getattr(block, "text", ""))


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with AsyncExitStack() as stack:
        made = Agent(stack)
        await made.tools.start(stack)
        yield made


async def test_the_tools_are_listed_as_they_are_declared(agent: Agent) -> None:
    listed = (await agent.ask("tools/list"))["tools"]
    assert [(tool["name"], tool["description"], tool["inputSchema"]) for tool in listed] == [
        (tool["name"], tool["description"], tool["input_schema"]) for tool in (PRICE, SLOW)
    ]


async def test_a_call_is_a_signed_request_and_its_answer_the_result(agent: Agent) -> None:
    result = await agent.call(article="tea")
    assert (text_of(result), result.structured_content) == ('{"cents":42}', {"cents": 42})
    (request,) = agent.asked
    body = json.loads(request.content)
    assert (str(request.url), request.method) == (PRICE["url"], "POST")
    assert {name: body[name] for name in ("tool", "arguments", "session_id")} == {
        "tool": "price",
        "arguments": {"article": "tea"},
        "session_id": "the-session",
    }
    call_id, timestamp = request.headers["webhook-id"], request.headers["webhook-timestamp"]
    assert call_id == body["id"]
    signed = b".".join([call_id.encode(), timestamp.encode(), request.content])
    mac = hmac.new(b"a secret of ours", signed, sha256).digest()
    assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"


def test_a_signature_is_that_of_the_specification() -> None:
    # The example of the specification's own libraries.
    secret, call_id, timestamp = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330"
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature(secret, call_id, timestamp, b'{"test": 2432232314}') == expected


async def test_a_text_is_a_result_too(agent: Agent) -> None:
    agent.answer = lambda request: httpx.Response(200, text="forty-two")
    result = await agent.call(article="tea")
    assert (text_of(result), result.structured_content, result.is_error) == ("forty-two", None, False)


async def test_what_does_not_fit_its_schema_is_not_sent(agent: Agent) -> None:
    result = await agent.call(article=42)
    assert result.is_error
    assert "$.article: 42 is not of type 'string'" in text_of(result)
    assert text_of(await agent.call("cost")) == "There is no such tool."
    assert agent.asked == []


async def _never(request: httpx.Request) -> httpx.Response:
    await asyncio.sleep(60)
    raise AssertionError


def _refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("private_address")


def _away(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("unreachable")


def _broken(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset")


@pytest.mark.parametrize(
    ("tool", "answer", "words"),
    [
        ("slow", _never, "The tool did not answer within 0.05 seconds."),
        ("price", _refused, "The tool stands at an address that is not public."),
        ("price", _away, "The tool cannot be reached."),
        ("price", _broken, "The tool broke its answer off."),
        ("price", lambda _: httpx.Response(500, text="out of tea"), "The tool answered with status 500. out of tea"),
        (
            "price",
            lambda _: httpx.Response(302, headers={"location": "https://x"}),
            "The tool answered with status 302.",
        ),
        ("price", lambda _: httpx.Response(200, content=bytes(2**20 + 1)), "The tool answered with more than 1 MiB."),
    ],
)
async def test_what_goes_wrong_is_told_to_the_agent(agent: Agent, tool: str, answer: Answer, words: str) -> None:
    agent.answer = answer
    result = await agent.call(tool, article="tea")
    assert (result.is_error, text_of(result)) == (True, words)


async def test_without_its_secret_nothing_is_sent(agent: Agent) -> None:
    agent.values.clear()
    result = await agent.call(article="tea")
    assert (result.is_error, text_of(result)) == (True, SecretMissing().message)
    assert agent.asked == []
