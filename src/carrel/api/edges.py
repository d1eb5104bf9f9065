"""What stands around the routes of every listener, in the order in which a request meets it.

AccessLog     an id, a line in the log, metrics, a span
Audit         on record, whatever becomes of it
OriginGuard   foreign pages and names; preflights; CORS headers, on errors too
AddressLimit  how often this address may ask
(the key)     who calls: `carrel.principal` in the scope
Known         that name in the log's lines
KeyLimit      how often this caller may ask
Crashes       an error that nobody expected becomes an answer that all of the above still see
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel.api import problems
from carrel.api.access_log import AccessLog
from carrel.api.addresses import Proxies
from carrel.api.audit import Audit, AuditLog
from carrel.api.limits import AddressLimit, KeyLimit, Limiter
from carrel.api.operations import Operations
from carrel.api.origins import OriginGuard, Origins
from carrel.errors import CarrelError
from carrel.model import Principal
from carrel.observability.metrics import Metrics
from carrel.observability.tracing import Tracing

__all__ = ["Edges"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Edges:
    """The parts of it; made once, by whoever wires the server. Without any, only origins and names are checked."""

    loopback: bool = True
    """Whether the server listens there alone."""
    origins: Origins = field(default_factory=Origins)
    proxies: Proxies = field(default_factory=Proxies)
    per_key: Limiter | None = None
    per_address: Limiter | None = None
    audit: AuditLog | None = None
    metrics: Metrics | None = None
    page: Callable[[], Awaitable[bytes]] | None = None
    """Makes the page of `/metrics`."""
    tracing: Tracing | None = None

    def inside(self, app: FastAPI, *, unnamed: Principal | None) -> None:
        """Add what stands between the key and the routes. To be called before whatever asks for the key is added.

        Args:
            app: the application.
            unnamed: who calls where no key is wanted.
        """
        app.add_middleware(Crashes)
        if self.per_key is not None:
            app.add_middleware(KeyLimit, limiter=self.per_key)
        app.add_middleware(Known, unnamed=unnamed)

    def outside(self, app: FastAPI) -> None:
        """Add what stands before the key. To be called last, when all routes are there."""
        if self.per_address is not None:
            app.add_middleware(AddressLimit, limiter=self.per_address)
        app.add_middleware(OriginGuard, origins=self.origins, loopback=self.loopback)
        if self.audit is not None:
            app.add_middleware(Audit, audit=self.audit)
        app.add_middleware(
            AccessLog,
            operations=Operations(app),
            proxies=self.proxies,
            metrics=self.metrics,
            tracing=self.tracing,
        )


class Known:
    """Names the caller in every line of the log from here on."""

    def __init__(self, app: ASGIApp, unnamed: Principal | None) -> None:
        self._app = app
        self._unnamed = unnamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            if self._unnamed is not None:
                scope.setdefault("carrel.principal", self._unnamed)
            principal: Principal | None = scope.get("carrel.principal")
            if principal is not None:
                structlog.contextvars.bind_contextvars(principal=principal.name)
        await self._app(scope, receive, send)


class Crashes:
    """Answers for an error that nobody expected; further out it would lack its request id and CORS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            log.error("request.crashed", path=scope["path"], exc_info=error)
            if started:  # half an answer cannot be taken back: the connection has to break off
                raise
            answer = CarrelError("Something went wrong inside Carrel; the server's log says what.")
            await problems.problem(answer, scope["path"])(scope, receive, send)
