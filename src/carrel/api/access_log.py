"""The outermost layer: every request gets an id, a line in the log, a place in the metrics and, if wanted, a span."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel.api.addresses import Proxies
from carrel.api.operations import Operation, Operations
from carrel.model import Principal, new_id
from carrel.observability.metrics import Metrics
from carrel.observability.redaction import redacted_query
from carrel.observability.tracing import Tracing

__all__ = ["AccessLog"]

log = structlog.get_logger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_CLIENT_WENT_AWAY = 499
_WATCHERS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})


class AccessLog:
    """Knows what is asked for, from where, under which id; says what came of it, once."""

    def __init__(
        self,
        app: ASGIApp,
        operations: Operations,
        proxies: Proxies,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Stand before `app`, which finds in its scope:

        `carrel.request_id`, `carrel.address`, `carrel.operation` and `carrel.path_values`.
        """
        self._app = app
        self._operations = operations
        self._proxies = proxies
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else new_id()
        operation, values = self._operations.find(scope)
        scope["carrel.request_id"] = request_id
        scope["carrel.address"] = self._proxies.address(scope)
        scope["carrel.operation"] = operation
        scope["carrel.path_values"] = values
        context = {name: values[name] for name in ("session_id", "turn_id") if name in values}
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, **context)
        request = _Request(scope, operation, headers)
        with ExitStack() as stack:
            span = None
            if self._tracing is not None:
                span = stack.enter_context(self._tracing.request(headers, request.method))
            if self._metrics is not None:
                self._metrics.open(request.kind, 1)
                stack.callback(self._metrics.open, request.kind, -1)

            async def answered(message: Message) -> None:
                request.saw(message)
                if message["type"] in ("http.response.start", "websocket.http.response.start"):
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
                await send(message)

            try:
                await self._app(scope, receive, answered)
            finally:
                self._over(request, span)

    def _over(self, request: _Request, span: Any) -> None:
        status = request.status or _CLIENT_WENT_AWAY
        route = request.operation.template if request.operation is not None else None
        if self._metrics is not None:
            self._metrics.request(request.method, route, status, request.first_byte_seconds)
        if span is not None:
            span.update_name(f"{request.method} {route or 'unmatched'}")
            span.set_attribute("http.route", route or "")
            span.set_attribute("http.response.status_code", status)
        principal: Principal | None = request.scope.get("carrel.principal")
        # Whoever watches a server asks it every few seconds; nobody wants to read that.
        tell = log.debug if route in _WATCHERS and status < 400 else log.info
        tell(
            "request",
            method=request.method,
            route=route,
            **({} if route is not None else {"path": request.scope["path"][:200]}),
            **({"query": redacted_query(request.query)} if request.query else {}),
            status=status,
            ms=round(request.seconds * 1000, 1),
            address=request.scope.get("carrel.address"),
            **({"principal": principal.name} if principal is not None else {}),
        )


class _Request:
    """One request, as far as it has come."""

    def __init__(self, scope: Scope, operation: Operation | None, headers: Headers) -> None:
        self.scope = scope
        self.operation = operation
        self.kind = scope["type"]
        self.method = "WEBSOCKET" if self.kind == "websocket" else scope["method"]
        self.query = scope.get("query_string", b"").decode("latin-1")
        self.status: int | None = None
        self._begun = time.perf_counter()
        self._answered: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self._begun

    @property
    def first_byte_seconds(self) -> float:
        """How long its caller waited for the first byte."""
        return self.seconds if self._answered is None else self._answered

    def saw(self, message: Message) -> None:
        """A message goes to the caller."""
        if self.status is not None:
            return
        match message["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self.status = message["status"]
            case "websocket.accept":
                self.status = 101
            case "websocket.close":
                self.status = 403  # before it was accepted
            case _:
                return
        self._answered = self.seconds
