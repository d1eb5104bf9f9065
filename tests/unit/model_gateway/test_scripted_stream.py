"""Streams over a real server: golden files per block type, cuts, pauses, speed, and the official client."""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
import uvicorn

from carrel.model_gateway.scripted import create_app, messages

pytestmark = pytest.mark.slow  # each test has a server of its own

GOLDEN = Path(__file__).parents[2] / "golden" / "scripted"
UPDATE = "CARREL_UPDATE_GOLDEN" in os.environ
TOOLS: list[Any] = [{"name": "Bash", "description": "Runs", "input_schema": {"type": "object"}}]


@pytest.fixture
async def socket(tmp_path: Path) -> AsyncIterator[str]:
    path = str(tmp_path / "m.sock")
    config = uvicorn.Config(create_app(), uds=path, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(), name="scripted model")
    while not server.started:
        await asyncio.sleep(0.005)
    yield path
    server.should_exit = True
    await serving


@pytest.fixture
async def client(socket: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=socket)
    async with httpx.AsyncClient(transport=transport, base_url="http://model", timeout=20) as client:
        yield client


@pytest.fixture
async def official(socket: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    http = anthropic.DefaultAsyncHttpxClient(transport=httpx2.AsyncHTTPTransport(uds=socket))
    async with anthropic.AsyncAnthropic(
        api_key="sk-nothing", base_url="http://model", http_client=http, max_retries=0
    ) as client:
        yield client


def ask(prompt: str) -> dict[str, Any]:
    return {
        "model": "scripted",
        "max_tokens": 1000,
        "stream": True,
        "messages": [{"role": "user", "content": prompt}],
        "tools": TOOLS,
    }


async def stream(client: httpx.AsyncClient, prompt: str) -> AsyncIterator[bytes]:
    async with client.stream("POST", "/v1/messages?beta=true", json=ask(prompt)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for chunk in response.aiter_bytes():
            yield chunk


async def collect(client: httpx.AsyncClient, prompt: str) -> tuple[str, bool]:
    """The text of a stream, and whether it was cut."""
    data = b""
    try:
        async for chunk in stream(client, prompt):
            data += chunk
    except httpx.RemoteProtocolError:
        return data.decode(), True
    return data.decode(), False


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def spoken(text: str) -> str:
    deltas = (event["delta"] for event in events(text) if event["type"] == "content_block_delta")
    return "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("text", "[[say: Hello, world: «é», 😀 and a second\nline of it.]]"),
        ("count", "[[count: 3]]"),
        ("thinking", "[[think: Let me think about this for a while.]] [[say: Done.]]"),
        (
            "tool_use",
            '[[say: Looking.]] [[tool: Bash | {"command": "ls -la \\"a b\\"", "description": "Lists files"}]]',
        ),
        ("parallel_tool_use", "[[parallel: echo a | echo b]]"),
        ("error", "[[say: So far.]] [[error: 529]]"),
        ("drop", "[[say: Whole.]] [[say: Broken.]] [[drop]]"),
        ("malformed", "[[say: So far.]] [[malformed]]"),
        ("friendly", "hello"),
    ],
)
async def test_a_stream_is_as_on_file(client: httpx.AsyncClient, name: str, prompt: str) -> None:
    text, cut = await collect(client, prompt)
    assert cut == (name == "drop")
    normal = re.sub(r"\b(msg|toolu|req)_[0-9a-f]{24}\b", r"\1_0", text)
    path = GOLDEN / f"{name}.sse"
    if UPDATE:
        path.write_text(normal, encoding="utf-8")
    assert normal == path.read_text(encoding="utf-8")


async def test_a_drop_cuts_the_connection_once(client: httpx.AsyncClient) -> None:
    prompt = "[[say: before]] [[drop]] [[say: after]]"
    text, cut = await collect(client, prompt)
    assert cut
    assert spoken(text) == "before"
    assert "message_stop" not in text
    text, cut = await collect(client, prompt)
    assert not cut
    assert spoken(text) == "beforeafter"
    assert "message_stop" in text


async def test_a_drop_at_the_start_cuts_after_some_text(client: httpx.AsyncClient) -> None:
    text, cut = await collect(client, "[[drop]] [[bash: ls]]")
    assert cut
    assert spoken(text) == messages.BROKEN_OFF


async def test_a_request_without_streaming_goes_on_past_a_drop_and_can_be_dropped(client: httpx.AsyncClient) -> None:
    body = ask("[[drop]] [[say: after]]")
    await collect(client, "[[drop]] [[say: after]]")
    whole = await client.post("/v1/messages", json={**body, "stream": False})
    assert whole.json()["content"] == [{"type": "text", "text": "after"}]
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/v1/messages", json={**body, "stream": False})


async def test_a_wait_starts_the_message_first_and_pings(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "PING_SECONDS", 0.05)
    begin = time.perf_counter()
    arrived = [
        (time.perf_counter() - begin, chunk.decode()) async for chunk in stream(client, "[[wait: 0.3]] [[say: x]]")
    ]
    assert "message_start" in arrived[0][1]
    assert arrived[0][0] < 0.25
    assert arrived[-1][0] >= 0.3
    assert sum(chunk.count("event: ping") for _, chunk in arrived) >= 4


async def test_a_rate_is_kept(client: httpx.AsyncClient) -> None:
    begin = time.perf_counter()
    arrivals: list[float] = []
    text = ""
    async for chunk in stream(client, "[[count: 21 @50]]"):
        text += chunk.decode()
        arrivals.append(time.perf_counter() - begin)
    assert spoken(text) == "".join(f"{n} " for n in range(1, 22))
    assert 0.38 < arrivals[-1] < 2
    assert len(arrivals) > 10


async def test_a_client_that_leaves_ends_the_work(client: httpx.AsyncClient) -> None:
    before = len(asyncio.all_tasks())
    for prompt in ("[[wait: 600]]", "[[count: 100000 @1]]"):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await collect(client, prompt)
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post("/v1/messages", json={**ask("[[wait: 600]]"), "stream": False}, timeout=0.1)
    async with asyncio.timeout(3):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)


async def test_every_byte_of_a_repetition_arrives_in_moderate_deltas(client: httpx.AsyncClient) -> None:
    text, _ = await collect(client, "[[repeat: añ😀 | 1000003]]")
    assert spoken(text) == "añ😀" * (1000003 // 7) + "añ"
    assert max(len(line) for line in text.splitlines()) < 80_000


async def test_each_event_of_a_fast_stream_is_whole(client: httpx.AsyncClient) -> None:
    async for chunk in stream(client, "[[count: 2000]]"):
        assert chunk
    text, _ = await collect(client, "[[count: 2000]]")
    assert text.count("event: content_block_delta\n") == 2000
    assert all(block.startswith("event: ") for block in text.strip().split("\n\n"))


async def test_deltas_are_made_faster_than_thirty_thousand_a_second() -> None:
    app = create_app()
    body = json.dumps(ask("[[count: 60000]]")).encode()
    sent = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal sent
        sent += message.get("body", b"").count(b"event: content_block_delta")

    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST"}
    scope |= {"path": "/v1/messages", "raw_path": b"/v1/messages", "query_string": b"", "headers": []}
    begin = time.perf_counter()
    await app(scope, receive, send)
    assert sent == 60_000
    assert sent / (time.perf_counter() - begin) > 30_000


async def test_the_official_client_streams(official: anthropic.AsyncAnthropic) -> None:
    user: Any = {"role": "user", "content": "[[think: hm]] [[say: one]] [[parallel: ls | pwd]] [[say: two]]"}
    async with official.messages.stream(model="scripted", max_tokens=100, messages=[user], tools=TOOLS) as events:
        message = await events.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens > 1
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "r"}
        for block in message.content
        if block.type == "tool_use"
    ]
    talk: Any = [user, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    whole = await official.messages.create(model="scripted", max_tokens=100, messages=talk, tools=TOOLS)
    assert [block.text for block in whole.content if block.type == "text"] == ["two", "Result: r\nResult: r"]
    assert whole.stop_reason == "end_turn"


async def test_the_official_client_knows_the_errors(official: anthropic.AsyncAnthropic) -> None:
    async def create(prompt: str, **more: Any) -> None:
        talk: Any = [{"role": "user", "content": prompt}]
        answer = await official.messages.create(model="scripted", max_tokens=100, messages=talk, **more)
        async for _ in answer:
            pass

    for status, kind in [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
    ]:
        with pytest.raises(kind) as caught:
            await create(f"[[error: {status}]]")
        assert caught.value.request_id
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        await create("[[say: x]] [[error: 529]]", stream=True)


async def test_the_official_client_retries_and_lists(official: anthropic.AsyncAnthropic) -> None:
    talk: Any = [{"role": "user", "content": "[[error: 529 x2]] [[say: through]]"}]
    patient = official.with_options(max_retries=2)
    message = await patient.messages.create(model="scripted", max_tokens=100, messages=talk)
    assert message.content[0].type == "text"
    assert "scripted" in [model.id async for model in official.models.list()]
    assert (await official.models.retrieve("scripted")).display_name
    assert (await official.messages.count_tokens(model="scripted", messages=talk)).input_tokens > 1
