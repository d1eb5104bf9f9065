"""Which pages may call, and by which names the server may be called.

A browser lets a page of any origin send requests to a server on its user's own machine, and a name of an attacker's may
lead there too (DNS rebinding). So a server on loopback answers to its own names alone; and wherever it listens, a page
must be of its own origin or of one that is listed, with a key and without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel.api import problems
from carrel.errors import InvalidSettings, UnsafeConfiguration, UntrustedOrigin

__all__ = ["LOOPBACK_NAMES", "OriginGuard", "Origins"]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")
_METHODS = "GET, POST, PUT, PATCH, DELETE"
_REQUEST_HEADERS = (
    "Accept, Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Traceparent, Tracestate, X-Api-Key, "
    "X-Request-Id"
)
_ANSWER_HEADERS = (
    "Content-Disposition, RateLimit, RateLimit-Policy, Retry-After, X-Carrel-Session, X-Carrel-Turn, X-Request-Id"
)
_PREFLIGHT_SECONDS = 600
_REFUSED = 4003


class Origins:
    """The origins whose pages may call."""

    def __init__(self, listed: Sequence[str] = (), *, key_wanted: bool = True) -> None:
        """List origins, such as `https://app.example.com`. `*` is any, and never together with credentials.

        Args:
            listed: the origins.
            key_wanted: whether callers need a key; without one, `*` would hand the server to every page there is.

        Raises:
            InvalidSettings: one of them is not an origin.
            UnsafeConfiguration: `*`, where no key is wanted.
        """
        self.any = "*" in listed
        if self.any and not key_wanted:
            raise UnsafeConfiguration(
                "cors_origins * with auth none would let every page that a user opens drive this server. List the "
                "origins, or keep the key."
            )
        self._listed = frozenset(_origin(text) for text in listed if text != "*")
        hosts = [urlsplit(origin).hostname for origin in self._listed]
        self.names = frozenset(host for host in hosts if host is not None)
        """The hosts of listed origins: the operator has said that they are his."""

    def __bool__(self) -> bool:
        return self.any or bool(self._listed)

    def has(self, origin: str) -> bool:
        """Whether pages of this origin may call."""
        return origin.lower() in self._listed or (self.any and bool(_ORIGIN.fullmatch(origin.lower())))

    def allowed(self, origin: str) -> str:
        """What a listed origin is told in Access-Control-Allow-Origin."""
        return "*" if self.any else origin


def _origin(text: str) -> str:
    origin = text.strip().lower()
    if not _ORIGIN.fullmatch(origin):
        raise InvalidSettings(
            f"cors_origins: {text!r} is not an origin; write scheme, host and port, such as https://app.example.com, "
            "without a path."
        )
    return origin


class OriginGuard:
    """Refuses foreign pages and names, answers preflights, and tells listed origins that they may read."""

    def __init__(self, app: ASGIApp, origins: Origins, *, loopback: bool) -> None:
        """Stand before `app`. `loopback`: the server listens there, so it has no other names than loopback's."""
        self._app = app
        self._origins = origins
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        origin = connection.headers.get("origin")
        listed = origin is not None and self._origins.has(origin)
        if not self._named(connection) or not (origin is None or listed or _own(connection, origin)):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _REFUSED})
                return
            await problems.problem(UntrustedOrigin(), scope["path"])(scope, receive, send)
            return
        if scope["type"] == "websocket" or not self._origins:
            await self._app(scope, receive, send)
            return
        if listed and scope["method"] == "OPTIONS" and "access-control-request-method" in connection.headers:
            await self._preflight(origin or "")(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.add_vary_header("Origin")
                if listed:
                    headers["Access-Control-Allow-Origin"] = self._origins.allowed(origin or "")
                    headers["Access-Control-Expose-Headers"] = _ANSWER_HEADERS
            await send(message)

        await self._app(scope, receive, told)

    def _named(self, connection: HTTPConnection) -> bool:
        # A listener of a dialect's own may be elsewhere than the native one.
        if not connection.scope.get("carrel.loopback", self._loopback):
            return True
        try:
            name = urlsplit(f"//{connection.headers.get('host', '')}").hostname
        except ValueError:  # not an address at all
            return False
        return name in LOOPBACK_NAMES or name in self._origins.names

    def _preflight(self, origin: str) -> Response:
        headers = {
            "Access-Control-Allow-Origin": self._origins.allowed(origin),
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": _REQUEST_HEADERS,
            "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS),
            "Vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        }
        return Response(status_code=204, headers=headers)


def _own(connection: HTTPConnection, origin: str) -> bool:
    host = connection.headers.get("host", "")
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:  # not an address at all
        return False
