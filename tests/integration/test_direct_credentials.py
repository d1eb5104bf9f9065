"""`credentials: direct`: each agent holds the model's credential and asks the provider itself."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn

from carrel.errors import InvalidSettings
from carrel.model_gateway.scripted import create_app
from carrel.settings import load_settings

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


@pytest.fixture
async def provider() -> AsyncIterator[tuple[str, list[str]]]:
    """A model's API on a port, and the keys it was shown."""
    shown: list[str] = []
    scripted = create_app()

    async def app(scope, receive, send):
        if scope["type"] == "http":
            shown.append(dict(scope["headers"]).get(b"x-api-key", b"").decode())
        await scripted(scope, receive, send)

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", shown
    server.should_exit = True
    await task


def direct(url: str, **more: object) -> dict[str, object]:
    return {
        "credentials": "direct",
        "network": "host",
        "model_upstream": url,
        "anthropic_api_key": "sk-of-the-operator",
        **more,
    }


async def test_an_agent_asks_the_provider_with_the_operators_own_key(start, provider):
    url, shown = provider
    api = await start(**direct(url))
    session = await api.session()
    result = await api.run(session, "[[bash: echo $ANTHROPIC_API_KEY]] [[say: done]]")
    assert result["status"] == "succeeded"
    assert "done" in result["text"]
    assert set(shown) == {"sk-of-the-operator"}
    assert result["usage"]["output_tokens"] == 0, "nothing is metered, and none is made up"


async def test_variables_of_bedrock_and_vertex_reach_the_agent_and_no_others(start, provider, monkeypatch):
    monkeypatch.setenv("CLOUD_ML_REGION", "europe-west1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("UNRELATED_SECRET", "not for agents")
    url, _ = provider
    api = await start(**direct(url))
    session = await api.session()
    result = await api.run(session, "[[bash: env | grep -e REGION -e UNRELATED | sort]]")
    told = result["tool_calls"][0]["result"].splitlines()
    assert told == ["AWS_REGION=eu-central-1", "CLOUD_ML_REGION=europe-west1"]


async def test_no_budget_is_promised_that_could_not_hold(start, provider):
    api = await start(**direct(provider[0]))
    for path, body in (("/sessions", {}), ("/query", {"prompt": "x"})):
        refused = await api.ask("POST", path, 422, json={**body, "budget": {"max_usd": 1}})
        assert "none can hold" in refused["detail"]
    session = await api.session()
    await api.ask("PATCH", f"/sessions/{session}", 422, json={"budget": {"max_tokens": 1}})
    body = {"prompt": "x", "budget": {"max_tokens": 1}}
    await api.ask("POST", f"/sessions/{session}/turns", 422, json=body)


async def test_without_a_credential_a_turn_says_so(start):
    api = await start(credentials="direct", network="host", model_upstream="anthropic")
    session = await api.session()
    result = await api.run(session, "x")
    assert (result["status"], result["error"]["code"]) == ("failed", "missing_credential")


@pytest.mark.parametrize(
    ("more", "message"), [({}, "network: host"), ({"network": "host", "budgets": {"turn": {"max_usd": 1}}}, "budgets")]
)
def test_what_cannot_work_is_refused(more, message):
    with pytest.raises(InvalidSettings, match=message):
        load_settings(overrides={"credentials": "direct", **more})
