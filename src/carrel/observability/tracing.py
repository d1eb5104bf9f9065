"""Traces: from a request through its turn to the agent and its model requests.

A turn outlives the request that asked for it, and perhaps the server: so the request's context is stored with the turn,
and the turn's spans are made afterwards, from what was committed, with the times that stand in the log. Whoever works
for the turn meanwhile (the agent, the model gateway) is told the turn's own context, which is chosen when the turn is
accepted.

The OpenTelemetry SDK is an extra (`pip install carrel[tracing]`) and is imported where it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from carrel import __version__, abc
from carrel.errors import OperatorError
from carrel.model import SessionStatus, Turn
from carrel.protocol.events import StoredEvent

__all__ = ["Tracing", "start_tracing"]

log = structlog.get_logger(__name__)

_MOST_TURNS = 10_000
_MOST_EVENTS = 50_000
_FAILED = frozenset({"failed"})
_WATCHED = frozenset(
    {"turn.queued", "turn.started", "turn.completed", "tool.called", "tool.finished", "session.status_changed"}
)
_PROPAGATOR = TraceContextTextMapPropagator()
_chosen: ContextVar[SpanContext | None] = ContextVar("chosen_span_context", default=None)


async def start_tracing(exit_stack: AsyncExitStack, *, exporter: Any = None) -> Tracing:
    """Make traces and export them; what is left is exported when `exit_stack` closes.

    Args:
        exit_stack: where the closing is registered.
        exporter: where spans go; default: by OTLP over HTTP to where the OTEL_ variables say.

    Raises:
        OperatorError: the extra is not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ImportError as error:
        raise OperatorError(
            "Tracing is switched on, and OpenTelemetry is not installed. Install it (pip install 'carrel[tracing]'), "
            "or set observability.tracing to false."
        ) from error

    class ChosenIds(RandomIdGenerator):
        """A turn's span has the id that was told to its agent while it ran."""

        def generate_span_id(self) -> int:
            chosen = _chosen.get()
            return chosen.span_id if chosen is not None else int(super().generate_span_id())

        def generate_trace_id(self) -> int:
            chosen = _chosen.get()
            return chosen.trace_id if chosen is not None else int(super().generate_trace_id())

    resource = Resource.create({"service.name": "carrel", "service.version": __version__})
    provider = TracerProvider(resource=resource, id_generator=ChosenIds())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    exit_stack.push_async_callback(asyncio.to_thread, provider.shutdown)
    return Tracing(provider.get_tracer("carrel", __version__))


class Tracing(abc.Observer):
    """Makes the spans of one server."""

    def __init__(self, tracer: trace.Tracer) -> None:
        """Make spans with `tracer`."""
        self._tracer = tracer
        self._events: asyncio.Queue[StoredEvent | None] = asyncio.Queue(_MOST_EVENTS)
        self._turns: OrderedDict[str, _Spans] = OrderedDict()
        self._connected: OrderedDict[str, tuple[str | None, SpanContext]] = OrderedDict()
        self._starting: dict[str, datetime] = {}
        self._started: dict[str, tuple[datetime, datetime]] = {}
        self._store: abc.Store | None = None

    async def start(self, exit_stack: AsyncExitStack, store: abc.Store) -> None:
        """Begin to make the spans of turns. `store` says what their rows have; closing is registered."""
        self._store = store
        task = asyncio.create_task(self._work(store), name="tracing")

        async def close() -> None:
            await self._events.put(None)
            await task

        exit_stack.push_async_callback(close)

    # ---------------------------------------------------------------------------------------------------- a request

    @contextlib.contextmanager
    def request(self, headers: Mapping[str, str], method: str) -> Iterator[trace.Span]:
        """The span of a request; what it does is done within. Whoever called may have sent his own context."""
        parent = _PROPAGATOR.extract(headers)
        attributes = {"http.request.method": method}
        with self._tracer.start_as_current_span(
            method, context=parent, kind=SpanKind.SERVER, attributes=attributes, record_exception=False
        ) as span:
            yield span

    def accept(self) -> dict[str, str]:
        """What is stored with a turn: the context that those who work for it are told, and what it is a part of.

        Called where the turn is accepted, within the span of its request; without one the turn begins a trace.
        """
        current = trace.get_current_span().get_span_context()
        trace_id = current.trace_id if current.is_valid else secrets.randbits(128) or 1
        sampled = current.trace_flags if current.is_valid else TraceFlags(TraceFlags.SAMPLED)
        told = {"traceparent": f"00-{trace_id:032x}-{secrets.randbits(64) or 1:016x}-{sampled:02x}"}
        if current.is_valid:
            told["parent_id"] = f"{current.span_id:016x}"
            if current.trace_state:
                told["tracestate"] = current.trace_state.to_header()
        return told

    # --------------------------------------------------------------------------------------------- a model request

    async def model_request(self, token_hash: str) -> trace.Span | None:
        """Begin the span of an agent's model request, under the turn at work; None where there is none."""
        assert self._store is not None

        def find(tx: abc.Transaction) -> Turn | None:
            sandbox = tx.sandboxes.by_agent_token(token_hash)
            return tx.turns.live(sandbox.session_id) if sandbox is not None else None

        turn = await self._store.read(find)
        if turn is None:
            return None
        parent = self._parent_of(turn)
        attributes = {"carrel.session.id": turn.session_id, "carrel.turn.id": turn.id}
        return self._tracer.start_span("model.request", context=parent, kind=SpanKind.CLIENT, attributes=attributes)

    def _parent_of(self, turn: Turn) -> otel_context.Context:
        told = turn.options.get("trace")
        if told is not None:
            return _PROPAGATOR.extract(told)
        spans = self._turns.get(turn.id)
        return trace.set_span_in_context(spans.span) if spans is not None else otel_context.Context()

    # ------------------------------------------------------------------------------------------------------- a turn

    def stored(self, events: Sequence[StoredEvent]) -> None:
        """Events were committed; spans are made of them later, by a task of its own."""
        for event in events:
            if event.type in _WATCHED:
                with contextlib.suppress(asyncio.QueueFull):  # a span may be missing; a turn must not wait
                    self._events.put_nowait(event)

    async def _work(self, store: abc.Store) -> None:
        while (event := await self._events.get()) is not None:
            try:
                await self._take(store, event)
            except Exception:  # one turn's spans are lost; the server and other turns' are not
                log.exception("tracing.failed", session_id=event.session_id, turn_id=event.turn_id)

    async def _take(self, store: abc.Store, event: StoredEvent) -> None:
        if event.type == "session.status_changed":
            self._moved(event)
            return
        turn_id = event.turn_id
        if turn_id is None:
            return
        spans = self._turns.get(turn_id)
        if spans is None:
            turn = await store.read(lambda tx: tx.turns.get(turn_id))
            if turn is None:
                return
            spans = self._turns[turn_id] = self._open(turn)
            if len(self._turns) > _MOST_TURNS:
                self._turns.popitem(last=False)
        match event.type:
            case "turn.started":
                await self._begun(store, spans, event)
            case "tool.called":
                spans.called(self._tracer, event)
            case "tool.finished":
                spans.finished(event)
            case "turn.completed":
                del self._turns[turn_id]
                spans.end(event)

    def _open(self, turn: Turn) -> _Spans:
        told = turn.options.get("trace") or {}
        parent, chosen = otel_context.Context(), None
        if "traceparent" in told:
            own = trace.get_current_span(_PROPAGATOR.extract(told)).get_span_context()
            chosen = own
            if "parent_id" in told:
                parent = _context(own, int(told["parent_id"], 16))
        attributes: dict[str, Any] = {
            "carrel.session.id": turn.session_id,
            "carrel.turn.id": turn.id,
            "carrel.turn.number": turn.number,
            "carrel.turn.origin": str(turn.origin),
        }
        mark = _chosen.set(chosen)
        try:
            span = self._tracer.start_span(
                "turn", context=parent, attributes=attributes, start_time=_ns(turn.created_at)
            )
        finally:
            _chosen.reset(mark)
        return _Spans(span, turn.created_at)

    async def _begun(self, store: abc.Store, spans: _Spans, event: StoredEvent) -> None:
        if event.data.get("attempt", 1) == 1:
            spans.part(self._tracer, "turn.queued", spans.accepted_at, event.at)
        if (launch := self._started.pop(event.session_id, None)) is not None:
            spans.part(self._tracer, "sandbox.start", *launch)
        turn = await store.read(lambda tx: tx.turns.get(event.turn_id or ""))
        sandbox = turn.sandbox_id if turn is not None else None
        known = self._connected.get(event.session_id)
        own = spans.span.get_span_context()
        if known is None or known[0] != sandbox:
            # The first turn in this sandbox: its context is the one that the agent was started with.
            self._connected[event.session_id] = sandbox, own
            self._connected.move_to_end(event.session_id)
            if len(self._connected) > _MOST_TURNS:
                self._connected.popitem(last=False)
        elif known[1].span_id != own.span_id:
            spans.span.add_link(known[1], {"carrel.link": "agent"})

    def _moved(self, event: StoredEvent) -> None:
        """A launch belongs to the turn that starts after it."""
        data, session_id = event.data, event.session_id
        if data["status"] == SessionStatus.STARTING:
            self._starting[session_id] = event.at
            return
        begun = self._starting.pop(session_id, None)
        if begun is not None and data["status"] == SessionStatus.READY:
            self._started[session_id] = begun, event.at
        if data["status"] in (SessionStatus.IDLE, SessionStatus.STOPPED, SessionStatus.FAILED):
            self._connected.pop(session_id, None)
            self._started.pop(session_id, None)


class _Spans:
    """The spans of one turn."""

    def __init__(self, span: trace.Span, accepted_at: datetime) -> None:
        self.span = span
        self.accepted_at = accepted_at
        self._tools: dict[str, trace.Span] = {}

    def part(self, tracer: trace.Tracer, name: str, begun: datetime, ended: datetime) -> None:
        """A part of the turn that is over."""
        span = tracer.start_span(name, context=trace.set_span_in_context(self.span), start_time=_ns(begun))
        span.end(_ns(ended))

    def called(self, tracer: trace.Tracer, event: StoredEvent) -> None:
        """A tool was called: its name is told, and nothing of what it was given."""
        data = event.data
        parent = trace.set_span_in_context(self.span)
        attributes = {"gen_ai.tool.name": data["tool"], "gen_ai.tool.call.id": data["id"]}
        self._tools[data["id"]] = tracer.start_span(
            f"tool {data['tool']}", context=parent, attributes=attributes, start_time=_ns(event.at)
        )

    def finished(self, event: StoredEvent) -> None:
        """A tool gave its result."""
        data = event.data
        span = self._tools.pop(data["id"], None)
        if span is not None:
            if data.get("is_error"):
                span.set_status(Status(StatusCode.ERROR))
            span.end(_ns(event.at))

    def end(self, event: StoredEvent) -> None:
        """The turn is over."""
        data = event.data
        for tool in self._tools.values():
            tool.end(_ns(event.at))
        self.span.set_attribute("carrel.turn.status", data["status"])
        for name in ("stop_reason", "num_turns", "cost_usd"):
            if data.get(name) is not None:
                self.span.set_attribute(f"carrel.turn.{name}", data[name])
        for name, count in (data.get("usage") or {}).items():
            self.span.set_attribute(f"gen_ai.usage.{name}", count)
        if data["status"] in _FAILED:
            self.span.set_status(Status(StatusCode.ERROR, (data.get("error") or {}).get("code")))
        self.span.end(_ns(event.at))


def _context(own: SpanContext, parent_id: int) -> otel_context.Context:
    parent = SpanContext(
        own.trace_id, parent_id, is_remote=True, trace_flags=own.trace_flags, trace_state=own.trace_state
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))


def _ns(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000
