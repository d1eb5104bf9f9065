"""The endpoints without streaming: shapes, errors, token counts."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from carrel.model_gateway.scripted import app, create_app, parse_script

BODY: dict[str, Any] = {"model": "claude-opus-5-5", "max_tokens": 1000}


def ask(prompt: str, **more: Any) -> dict[str, Any]:
    return {**BODY, "messages": [{"role": "user", "content": prompt}], **more}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        yield client


async def say(client: httpx.AsyncClient, prompt: str, **more: Any) -> Any:
    response = await client.post("/v1/messages?beta=true", json=ask(prompt, **more))
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_whole_message(client: httpx.AsyncClient) -> None:
    message = await say(
        client, "[[think: hm]] [[say: é😀]] [[count: 3]] [[repeat: añ | 8]] [[bash: ls]] [[say: later]]"
    )
    thinking, *texts, call = message["content"]
    assert thinking["type"] == "thinking"
    assert thinking["signature"]
    assert [block["text"] for block in texts] == ["é😀", "1 2 3 ", "añaña"]
    assert call["name"] == "Bash"
    assert call["input"]["command"] == "ls"
    assert message["stop_reason"] == "tool_use"
    assert message["model"] == "claude-opus-5-5"
    assert message["id"].startswith("msg_")
    assert call["id"].startswith("toolu_")


async def test_ids_are_unique(client: httpx.AsyncClient) -> None:
    messages = [await say(client, "[[parallel: a | b]]") for _ in range(3)]
    assert len({message["id"] for message in messages}) == 3
    assert len({block["id"] for message in messages for block in message["content"]}) == 6


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (529, "overloaded_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_strikes_as_often_as_told_and_once_more_for_the_same_words_again(
    client: httpx.AsyncClient, status: int, kind: str, stream: bool
) -> None:
    prompt = f"[[error: {status} x2]] [[say: through]]"
    for _ in range(2):
        answers = [await client.post("/v1/messages", json=ask(prompt, stream=stream)) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [status, status, 200]
        body = answers[0].json()
        assert body["type"] == "error"
        assert body["error"]["type"] == kind
        assert body["request_id"] == answers[0].headers["request-id"]
        assert ("retry-after" in answers[0].headers) == (status == 429)


async def test_sessions_with_the_same_words_have_their_own_errors(client: httpx.AsyncClient) -> None:
    def ask_as(user: str) -> dict[str, Any]:
        return ask("[[error: 529]] [[say: a]]", metadata={"user_id": user})

    statuses = [(await client.post("/v1/messages", json=ask_as(user))).status_code for user in "abab"]
    assert statuses == [529, 529, 200, 200]


async def test_an_error_after_a_pause_or_a_text_is_an_error_too_when_not_streaming(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/messages", json=ask("[[say: a]] [[wait: 0.01]] [[error: 500]]"))
    assert response.status_code == 500


async def test_a_malformed_answer_is_no_json(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/messages", json=ask("[[malformed]] [[say: a]]"))
    with pytest.raises(ValueError, match="Expecting value"):
        response.json()
    assert (await say(client, "[[malformed]] [[say: a]]"))["content"][0]["text"] == "a"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "model"),
        (b'{"model":"m"}', "messages: Field required"),
        (b'{"model":"m","messages":[]}', "at least one"),
        (b'{"model":"m","messages":[3]}', "messages.0"),
        (b'{"model":"m","messages":[{"role":"tool","content":""}]}', "messages.0.role"),
        (b'{"model":"m","messages":[{"role":"user"}]}', "messages.0.content"),
        (b'{"model":"m","messages":[{"role":"user","content":[{"type":"text"}]}]}', "messages.0.content.0.text"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}]}', "max_tokens"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":0}', "max_tokens"),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}],"max_tokens":1}', "surrogate"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
async def test_a_bad_request_is_told_so(client: httpx.AsyncClient, content: bytes, problem: str) -> None:
    response = await client.post("/v1/messages", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert problem in response.json()["error"]["message"]


async def test_a_request_beyond_the_limit_is_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_REQUEST_BYTES", 1000)
    response = await client.post("/v1/messages", json=ask("x" * 1000))
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/v1/nothing"), ("POST", "/"), ("GET", "/v1/models/x")]
)
async def test_what_is_not_there_is_not_found(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
    assert response.json()["request_id"].startswith("req_")


async def test_other_methods(client: httpx.AsyncClient) -> None:
    assert (await client.head("/")).status_code == 404
    response = await client.get("/v1/messages")
    assert response.status_code == 405
    assert response.json()["type"] == "error"


async def test_models(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["has_more"] is False
    first = models["data"][0]
    assert (await client.get(f"/v1/models/{first['id']}")).json() == first


async def test_with_a_key_no_other_is_let_in() -> None:
    transport = httpx.ASGITransport(create_app(api_key="sk-right"))
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        for headers, status in [
            ({}, 401),
            ({"x-api-key": "sk-wrong"}, 401),
            ({"x-api-key": "sk-right"}, 200),
            ({"authorization": "Bearer sk-right"}, 200),
        ]:
            for answer in (
                await client.post("/v1/messages", json=ask("hi"), headers=headers),
                await client.post("/v1/messages/count_tokens", json=ask("hi"), headers=headers),
                await client.get("/v1/models", headers=headers),
            ):
                assert answer.status_code == status


async def test_a_script_answers() -> None:
    script = parse_script("rules: [{pattern: ping, steps: [say: pong]}]\ndefault: [say: 'what?']")
    transport = httpx.ASGITransport(create_app(script))
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        assert (await say(client, "ping"))["content"][0]["text"] == "pong"
        assert (await say(client, "[[say: marks are off]]"))["content"][0]["text"] == "what?"


def _cached(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]


async def test_usage_follows_the_sizes_and_the_cache_marks(client: httpx.AsyncClient) -> None:
    small = (await say(client, "x"))["usage"]
    large = (await say(client, "x" * 4000))["usage"]
    assert large["input_tokens"] - small["input_tokens"] == pytest.approx(1000, abs=2)
    assert small["cache_read_input_tokens"] == small["cache_creation_input_tokens"] == 0

    system = _cached("s" * 4000)
    first = (await say(client, "hi", system=system))["usage"]
    assert first["cache_creation_input_tokens"] == pytest.approx(1000, abs=30)
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": _cached("y" * 400)},
    ]
    second = (await say(client, "", system=system, messages=turns))["usage"]
    assert second["cache_read_input_tokens"] == pytest.approx(1000, abs=40)
    assert second["cache_creation_input_tokens"] == pytest.approx(110, abs=40)
    assert second["cache_creation"]["ephemeral_5m_input_tokens"] == second["cache_creation_input_tokens"]


async def test_output_tokens_follow_what_was_said(client: httpx.AsyncClient) -> None:
    for prompt, size in [
        ("[[count: 1000]]", len("".join(f"{n} " for n in range(1, 1001)))),
        ("[[repeat: é | 999]]", 999),
    ]:
        assert (await say(client, prompt))["usage"]["output_tokens"] == -(-size // 4)


async def test_counting_tokens_agrees_with_usage(client: httpx.AsyncClient) -> None:
    body = ask("[[say: x]]", system=_cached("s" * 400), tools=[{"name": "Bash", "input_schema": {}}])
    counted = (await client.post("/v1/messages/count_tokens?beta=true", json=body)).json()
    usage = (await client.post("/v1/messages", content=json.dumps(body))).json()["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    assert abs(counted["input_tokens"] - total) <= 1
