"""What a whole server shows of itself: metrics, traces into the real CLI, and no planted secret anywhere."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from websockets.asyncio.client import connect

from carrel.cli.server import running
from carrel.model_gateway import scripted
from carrel.settings import load_settings

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_metrics_of_a_server_at_work(start):
    api = await start(rate_limits={"per_key": "1000/minute"})
    session = await api.session()
    await api.run(session, "[[count: 5]]")
    await api.run(session, "[[bash: echo hi]]")
    base = api.server.url
    async with httpx.AsyncClient(base_url=base) as anybody:
        assert (await anybody.get("/metrics")).status_code == 401
    page = await api.http.get(f"{base}/metrics")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain; version=")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0) + sample.value
    assert samples["carrel_turns_total"] == 2
    assert samples["carrel_turn_first_token_seconds_count"] == 2
    assert samples["carrel_tokens_total"] > 0
    assert samples["carrel_model_requests_total"] >= 3
    assert samples["carrel_sandbox_launch_seconds_count"] == 1
    assert samples["carrel_links"] == 1
    assert samples["process_resident_memory_bytes"] > 0
    assert session not in page.text


async def test_a_trace_reaches_the_agent_and_its_model_requests(tmp_path):
    exporter = InMemorySpanExporter()
    given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": 0}
    settings = load_settings(overrides=given | {"observability": {"tracing": True}})
    async with running(settings, span_exporter=exporter) as server:
        headers = {"Authorization": f"Bearer {server.key}", "traceparent": CALLER, "tracestate": "vendor=1"}
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", headers=headers, timeout=60) as http:
            session = (await http.post("/sessions", json={})).json()["id"]
            told = []
            for _ in range(2):
                body = {"prompt": "[[bash: echo parent=$TRACEPARENT state=$TRACESTATE]]", "wait": True}
                turn = (await http.post(f"/sessions/{session}/turns", json=body)).json()
                assert turn["status"] == "succeeded", turn
                events = (await http.get(f"/sessions/{session}/events", params={"limit": 1000})).json()["data"]
                (call,) = [e for e in events if e["type"] == "tool.finished" and e["turn_id"] == turn["id"]]
                told.append(str(call["data"]["result"]))
    spans: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    first, second = sorted(spans["turn"], key=lambda span: span.start_time)
    trace_id, caller_id = CALLER.split("-")[1:3]
    template = "POST /api/v1/sessions/{session_id}/turns"
    requests = {span.context.span_id: span for span in spans[template]}
    assert {first.parent.span_id, second.parent.span_id} == set(requests)
    assert {f"{span.parent.span_id:016x}" for span in requests.values()} == {caller_id}
    assert {f"{span.context.trace_id:032x}" for span in spans["turn"]} == {trace_id}
    (link,) = second.links
    assert link.context.span_id == first.context.span_id
    model = [span.parent.span_id for span in spans["model.request"]]
    assert set(model) == {first.context.span_id, second.context.span_id}
    assert [span.parent.span_id for span in spans["sandbox.start"]] == [first.context.span_id]
    assert {span.parent.span_id for span in spans["tool Bash"]} == {first.context.span_id, second.context.span_id}
    # The agent was started with the first turn's context, and keeps it: later turns are joined by links. What its
    # own tools are told is its own affair; it passes the trace on, in this trace or as it is.
    for text in told:
        assert trace_id in text, told
    assert "state=vendor=1" in told[0]


# ----------------------------------------------------------------------------------------------------------- secrets

MODEL_KEY = "sk-ant-api03-PLANTED-model-key-0123456789"
JWT_SECRET = "PLANTED-jwt-secret-of-more-than-thirty-two-bytes"
STATIC_TOKEN = "PLANTED-static-token-0123456789"
PROXY_SECRET = "PLANTED-mcp-header-0123456789"
GUESS = "carrel_PLANTEDguess0123456789abcdefghij"
TICKET = "PLANTED-ticket-0123456789"
PROMPT_WORD = "PLANTED-word-of-a-prompt"


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
        task = asyncio.create_task(server.serve(sockets=[sock]), name="a server of the test")
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def test_no_planted_secret_is_told_anywhere(tmp_path: Path):
    exported: list[bytes] = []

    async def collect(request: Request) -> Response:
        exported.append(await request.body())
        return Response(b"", media_type="application/x-protobuf")

    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    log_file = tmp_path / "server.log"
    async with (
        listening(scripted.create_app(None, api_key=MODEL_KEY)) as model,
        listening(Starlette(routes=[Route("/v1/traces", collect, methods=["POST"])])) as collector,
    ):
        config = {
            "jwt": {"secret": JWT_SECRET},
            "static_token": STATIC_TOKEN,
            "mcp_servers": {"x": {"type": "http", "url": "http://127.0.0.1:9/", "headers": {"X-Key": PROXY_SECRET}}},
            "observability": {"tracing": True, "log_format": "json", "audit_prompts": False},
            "log_level": "debug",
            "model_upstream": model,
            "drain_seconds": 0,
            "port": 0,
        }
        (data / "config.yaml").write_text(json.dumps(config))
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CARREL_", "ANTHROPIC_"))}
        env = own | {"ANTHROPIC_API_KEY": MODEL_KEY, "OTEL_EXPORTER_OTLP_ENDPOINT": collector}
        with log_file.open("wb") as log:
            server = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "carrel",
                "serve",
                "--data",
                str(data),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                env=env,
            )
        try:
            answers = await provoke(data)
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.send_signal(signal.SIGTERM)
            await asyncio.wait_for(server.wait(), 40)
    key = (data / "admin.key").read_text().strip()
    secrets = [MODEL_KEY, JWT_SECRET, STATIC_TOKEN, PROXY_SECRET, GUESS, TICKET, key]
    told = {"log": log_file.read_bytes(), "traces": b"".join(exported)} | answers
    assert b'"event": "request"' in told["log"]
    assert b"token=[redacted]" in told["log"]
    assert b"turn" in told["traces"]
    assert b"session.create" in told["audit"]
    assert b"carrel_turns_total" in told["metrics"]
    for place, text in told.items():
        for secret in secrets:
            assert secret.encode() not in text, f"{secret} is told by {place}"
    for place in ("log", "traces", "audit", "metrics"):
        assert PROMPT_WORD.encode() not in told[place], place


async def provoke(data: Path) -> dict[str, bytes]:
    """Do everything that might have it tell a secret; answers what it tells over HTTP."""
    deadline = time.monotonic() + 40
    while not (data / "server.json").exists():
        assert time.monotonic() < deadline, "the server did not start"
        await asyncio.sleep(0.02)
    url = json.loads((data / "server.json").read_text())["url"]
    key = (data / "admin.key").read_text().strip()
    errors = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as anybody:
        for guess in (GUESS, STATIC_TOKEN + "x", JWT_SECRET + "x", MODEL_KEY):
            headers = {"Authorization": f"Bearer {guess}", "X-Api-Key": guess, "X-Request-Id": f"id {guess}"}
            errors.append(await anybody.post("/api/v1/sessions", headers=headers, json={"title": "t"}))
            errors.append(await anybody.get("/metrics", headers=headers))
    with contextlib.suppress(Exception):
        async with connect(f"{url.replace('http', 'ws')}/api/v1/sessions/s1/stream?ticket={TICKET}") as stream:
            await stream.recv()
    async with httpx.AsyncClient(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as admin:
        session = (await admin.post("/api/v1/sessions", json={})).json()["id"]
        for prompt in (f"{PROMPT_WORD} [[bash: env]]", f"{PROMPT_WORD} [[error: 400]]"):
            body = {"prompt": prompt, "wait": True}
            answer = await admin.post(f"/api/v1/sessions/{session}/turns", json=body)
            assert answer.status_code == 200, answer.text
        await admin.put(f"/api/v1/sessions/{session}/files/a.txt", params={"token": TICKET}, content=b"x")
        errors.append(await admin.post("/api/v1/sessions", json={"model": {"secret": STATIC_TOKEN}}))
        errors.append(await admin.get("/api/v1/sessions", params={"api_key": TICKET, "limit": GUESS}))
        audit = await admin.get("/api/v1/audit", headers={"Accept": "application/x-ndjson"})
        metrics = await admin.get("/metrics")
        settled = [await admin.get("/health"), await admin.get("/openapi.json")]
    return {
        "audit": audit.content,
        "metrics": metrics.content,
        "errors": b"".join(answer.content + str(answer.headers).encode() for answer in [*errors, *settled]),
    }
