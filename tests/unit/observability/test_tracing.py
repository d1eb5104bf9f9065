"""Spans of a request, its turn and what works for it, made from what was committed."""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from carrel.errors import OperatorError
from carrel.observability import Tracing, start_tracing
from carrel.protocol.events import ToolCalled, ToolFinished
from carrel.sessions.service import ServiceOptions
from carrel.testing import FakeGateway, FakeHost, FakeTurn

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A gateway whose spans can be read once it has ended."""

    def __init__(self, gateway: FakeGateway, tracing: Tracing, host: FakeHost, spans: Callable[[], Any]) -> None:
        self.gateway = gateway
        self.tracing = tracing
        self.host = host
        self.ended = spans

    async def asked(self, session_id: str, prompt: str, **headers: str) -> Any:
        with self.tracing.request(headers, "POST"):
            return await self.gateway.run(session_id, prompt)


@pytest.fixture
async def traced(tmp_path) -> AsyncIterator[Traced]:
    exporter = InMemorySpanExporter()
    stack, tracing_stack = AsyncExitStack(), AsyncExitStack()
    async with tracing_stack, FakeHost() as host:
        tracing = await start_tracing(tracing_stack, exporter=exporter)
        gateway = FakeGateway(host, tmp_path, observer=tracing, service_options=ServiceOptions(trace=tracing.accept))
        async with gateway, stack:
            await tracing.start(stack, gateway.store)

            async def spans() -> dict[str, list[ReadableSpan]]:
                await stack.aclose()
                await tracing_stack.aclose()
                found: dict[str, list[ReadableSpan]] = {}
                for span in exporter.get_finished_spans():
                    found.setdefault(span.name, []).append(span)
                return found

            yield Traced(gateway, tracing, host, spans)


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


async def test_a_turn_is_a_part_of_its_request_and_of_its_caller_s_trace(traced):
    session = await traced.gateway.create()
    result = await traced.asked(session.id, "hello", traceparent=CALLER, tracestate="vendor=1")
    spans = await traced.ended()
    (request,), (turn,), (queued,), (launch,) = (spans[n] for n in ("POST", "turn", "turn.queued", "sandbox.start"))
    assert request.context.trace_id == int(CALLER.split("-")[1], 16)
    assert parent_of(request) == int(CALLER.split("-")[2], 16)
    assert {span.context.trace_id for span in (turn, queued, launch)} == {request.context.trace_id}
    assert parent_of(turn) == request.context.span_id
    assert parent_of(queued) == parent_of(launch) == turn.context.span_id
    assert turn.attributes["carrel.session.id"] == session.id
    assert turn.attributes["carrel.turn.id"] == result.id
    assert turn.attributes["carrel.turn.status"] == "succeeded"
    assert turn.start_time <= queued.start_time < queued.end_time <= turn.end_time
    assert turn.links == ()
    (stored,) = await stored_options(traced, session.id)
    assert stored["traceparent"] == f"00-{turn.context.trace_id:032x}-{turn.context.span_id:016x}-01"
    assert stored["tracestate"] == "vendor=1"


async def stored_options(traced, session_id):
    page = await traced.gateway.store.read(lambda tx: tx.turns.page(session_id, cursor=None, limit=10))
    return [turn.options["trace"] for turn in page.items]


async def test_later_turns_of_an_agent_are_linked_to_the_one_it_was_started_with(traced):
    session = await traced.gateway.create()
    for _ in range(3):
        await traced.asked(session.id, "hello")
    spans = await traced.ended()
    first, *later = sorted(spans["turn"], key=lambda span: span.start_time)
    assert len({span.context.trace_id for span in spans["turn"]}) == 3
    assert first.links == ()
    for turn in later:
        (link,) = turn.links
        assert link.context.span_id == first.context.span_id
    assert len(spans["sandbox.start"]) == 1
    bound = traced.host.alive[0].bind
    assert bound.trace["traceparent"].split("-")[2] == f"{first.context.span_id:016x}"


async def test_tools_are_spans_without_what_they_were_given(traced):
    async def work(turn: FakeTurn) -> None:
        turn.event(ToolCalled(id="a", tool="Bash", input={"command": "cat secret"}))
        turn.event(ToolFinished(id="a", tool="Bash", result="secret", is_error=True))
        turn.event(ToolCalled(id="b", tool="Read", input={"path": "secret"}))

    traced.host.scripts["work"] = work
    session = await traced.gateway.create()
    await traced.asked(session.id, "work")
    spans = await traced.ended()
    (bash,), (read,), (turn,) = spans["tool Bash"], spans["tool Read"], spans["turn"]
    assert parent_of(bash) == parent_of(read) == turn.context.span_id
    assert not bash.status.is_ok
    assert read.end_time == turn.end_time  # it never finished
    assert "secret" not in "".join(span.to_json() for group in spans.values() for span in group)


async def test_a_turn_without_a_request_begins_a_trace(traced):
    session = await traced.gateway.create()
    await traced.gateway.run(session.id, "hello")
    (turn,) = (await traced.ended())["turn"]
    assert turn.parent is None
    (stored,) = await stored_options(traced, session.id)
    assert stored["traceparent"].split("-")[1:3] == [f"{turn.context.trace_id:032x}", f"{turn.context.span_id:016x}"]


async def test_a_caller_that_is_not_sampled_is_left_out(traced):
    session = await traced.gateway.create()
    await traced.asked(session.id, "hello", traceparent=CALLER[:-2] + "00")
    assert await traced.ended() == {}
    (stored,) = await stored_options(traced, session.id)
    assert stored["traceparent"].endswith("-00")


async def test_without_the_extra_the_start_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    async with AsyncExitStack() as stack:
        with pytest.raises(OperatorError, match=r"carrel\[tracing\]"):
            await start_tracing(stack)
