"""Agents' requests at the model gateway: counted, and spans of their turns."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from hashlib import sha256
from typing import Any

from opentelemetry.trace import Status, StatusCode

from carrel.observability.metrics import Metrics
from carrel.observability.tracing import Tracing

__all__ = ["ModelRequests"]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[Any, _Receive, _Send], Awaitable[None]]

_PATH = "/v1/messages"


class ModelRequests:
    """Stands before the model gateway's application."""

    def __init__(self, app: _App, metrics: Metrics, tracing: Tracing | None) -> None:
        """Stand before `app`; without `tracing` requests are counted alone."""
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["path"] != _PATH:
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        span = await self._tracing.model_request(_token_hash(scope)) if self._tracing is not None else None

        async def seen(message: _Message) -> None:
            if message["type"] == "http.response.start":
                status = int(message["status"])
                self._metrics.model_request(status, time.perf_counter() - begun)
                if span is not None:
                    span.set_attribute("http.response.status_code", status)
                    span.add_event("first byte")
                    if status >= 400:
                        span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            if span is not None:
                span.end()


def _token_hash(scope: MutableMapping[str, Any]) -> str:
    headers = {name: value for name, value in scope["headers"] if name in (b"x-api-key", b"authorization")}
    token = headers.get(b"x-api-key") or headers.get(b"authorization", b"").partition(b" ")[2]
    return sha256(token).hexdigest()
