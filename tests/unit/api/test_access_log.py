"""Every request is one line with its ids; whoever logs meanwhile has them too; no secret of a query is among them."""

import asyncio

import pytest
import structlog
from structlog.testing import LogCapture

from carrel.model import ADMIN
from carrel.observability import Metrics


@pytest.fixture
def lines():
    before = structlog.get_config()
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture.entries
    structlog.configure(**before)


def requests(lines):
    return [line for line in lines if line["event"] == "request"]


async def test_one_line_a_request(build, lines):
    called = await build()
    async with called.client() as client:
        answer = await client.post("/api/v1/sessions", json={})
        session = answer.json()["id"]
        await client.get(f"/api/v1/sessions/{session}/events", params={"after": 0})
        await client.get("/nowhere")
        await client.get("/health")
    first, second, third, fourth = requests(lines)
    assert first["method"] == "POST"
    assert first["route"] == "/api/v1/sessions"
    assert first["status"] == 201
    assert first["ms"] >= 0
    assert first["principal"] == ADMIN.name
    assert first["address"] == "192.0.2.7"
    assert first["request_id"] == answer.headers["X-Request-Id"]
    assert second["route"] == "/api/v1/sessions/{session_id}/events"
    assert second["session_id"] == session
    assert second["query"] == "after=0"
    assert (third["route"], third["path"], third["status"]) == (None, "/nowhere", 404)
    assert (fourth["route"], fourth["log_level"]) == ("/health", "debug")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("abc-123", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("two words", False),
        ("x\ty", False),
        ("é", False),
        ("", False),
    ],
)
async def test_a_sane_request_id_is_taken_and_another_is_not(build, given, taken):
    called = await build()
    async with called.client() as client:
        told = (await client.get("/health", headers={"X-Request-Id": given.encode()})).headers["X-Request-Id"]
    assert (told == given) is taken
    assert len(told) <= 64


async def test_a_turn_s_line_names_the_turn(build, lines):
    called = await build()
    async with called.client() as client:
        session = (await client.post("/api/v1/sessions", json={})).json()["id"]
        turn = (await client.post(f"/api/v1/sessions/{session}/turns", json={"prompt": "hi", "wait": True})).json()[
            "id"
        ]
        await client.get(f"/api/v1/sessions/{session}/turns/{turn}")
    _, created, read = requests(lines)
    assert created["turn_id"] == read["turn_id"] == turn
    owner = [line for line in lines if line["event"] == "link.connected"]
    assert owner
    assert all(line["session"] == session for line in owner)


async def test_a_session_s_own_lines_do_not_bear_the_request_that_woke_it(build, lines):
    called = await build()
    called.gateway.host.scripts["crash"] = _die
    async with called.client() as client:
        session = (await client.post("/api/v1/sessions", json={})).json()["id"]
        turn = (await client.post(f"/api/v1/sessions/{session}/turns", json={"prompt": "crash", "wait": True})).json()
    assert turn["status"] == "failed"
    (lost,) = [line for line in lines if line["event"] == "sandbox.lost"]
    assert (lost["session_id"], lost["turn_id"]) == (session, turn["id"])
    assert "request_id" not in lost
    assert "principal" not in lost


async def _die(turn):
    turn.runner.kill()
    await asyncio.Event().wait()


async def test_secrets_in_a_query_are_not_told(build, lines):
    called = await build()
    async with called.client() as client:
        await client.get("/api/v1/sessions", params={"ticket": "tkt_very_secret", "api_key": "k1k2k3", "limit": "5"})
    (line,) = requests(lines)
    assert line["query"] == "ticket=[redacted]&api_key=[redacted]&limit=5"


async def test_metrics_are_counted_by_template(build):
    metrics = Metrics()
    called = await build(metrics=metrics)
    async with called.client() as client:
        for i in range(3):
            await client.get(f"/api/v1/sessions/s{i}")
            await client.get(f"/made-up/{i}")
            await client.request(f"MADEUP{i}", "/api/v1/sessions")
    value = metrics.registry.get_sample_value
    by = {"route": "/api/v1/sessions/{session_id}", "method": "GET", "status": "404"}
    assert value("carrel_http_requests_total", by) == 3
    assert value("carrel_http_requests_total", {"route": "unmatched", "method": "GET", "status": "404"}) == 3
    assert value("carrel_http_requests_total", {"route": "/api/v1/sessions", "method": "other", "status": "405"}) == 3
    assert value("carrel_http_request_seconds_count", {"route": by["route"], "method": "GET"}) == 3
    assert value("carrel_http_requests_open", {"kind": "http"}) == 0
