"""Lets callers in: at the door of every HTTP request, and on WebSockets in the ways that browsers can manage."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope
from starlette.websockets import WebSocket

from carrel.api import problems
from carrel.api.dependencies import PRINCIPAL, Services, bearer, need, principal, services
from carrel.auth import Authenticator
from carrel.errors import AuthenticationRequired, CarrelError
from carrel.model import ADMIN, Principal, Scope, utc_now

__all__ = ["SUBPROTOCOL", "KeyFirst", "Standing", "let_in"]

log = structlog.get_logger(__name__)

T = TypeVar("T")

SUBPROTOCOL = "carrel.v1"
_BEARER = "bearer."
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
# What a caller may ask although it may do little: who it is, and for less than it has itself.
_NEEDED = {"/me": None, "/auth/tickets": Scope.READ, "/mcp": Scope.READ}
_TOOLS = "/mcp"
"""The one path beside the API that wants a key; each tool says what it needs."""
_IN_AN_ADDRESS = frozenset(
    {"access_token", "api_key", "apikey", "auth", "authorization", "bearer", "jwt", "key", "token"}
)


# --------------------------------------------------------------------------------------------------------------- HTTP


class KeyFirst:
    """Turns away who brings no good key or too small a one, before a byte of the body is read or a route is chosen."""

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        """Guard everything below the prefix."""
        self._app = app
        self._prefix = prefix
        self._stream = re.compile(re.escape(prefix) + r"/sessions/[^/]+/events")

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"].startswith(self._prefix + "/") or scope["path"] == _TOOLS):
            try:
                await self._admit(HTTPConnection(scope), scope["method"])
            except CarrelError as error:
                await problems.problem(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, connection: HTTPConnection, method: str) -> None:
        authenticator = services(connection).authenticator
        ticket = connection.query_params.get("ticket")
        if authenticator is not None and ticket is not None and bearer(connection) is None:
            if method != "GET" or not self._is_stream(connection):
                raise AuthenticationRequired
            connection.scope[PRINCIPAL] = await authenticator.redeem(ticket)
        found = await principal(connection)
        ordinary = Scope.READ if method in _READING else Scope.WRITE
        needed = _NEEDED.get(connection.scope["path"].removeprefix(self._prefix), ordinary)
        if needed is not None:
            need(found, needed)

    def _is_stream(self, connection: HTTPConnection) -> bool:
        wanted = "text/event-stream" in connection.headers.get("accept", "")
        return wanted and self._stream.fullmatch(connection.scope["path"]) is not None


# ---------------------------------------------------------------------------------------------------------- WebSocket


class AuthMessage(BaseModel):
    """The first message of a client that can send its token in no other way."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field(pattern="^auth$")
    token: str = Field(repr=False)


async def let_in(websocket: WebSocket) -> Principal:
    """Accept the connection and say who it is of. The token is never repeated.

    By header, by subprotocol (`carrel.v1, bearer.<token>`), by a single-use `?ticket=`, or else by a first message.

    Raises:
        AuthenticationRequired: by none of them; the connection is accepted and still to be closed.
        MissingScope: they may not read.
        WebSocketDisconnect: they went away.
    """
    offered: list[str] = websocket.scope.get("subprotocols", [])
    await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
    own = services(websocket)
    found = ADMIN if own.authenticator is None else await _who(websocket, own, own.authenticator, offered)
    websocket.scope[PRINCIPAL] = found
    need(found, Scope.READ)
    return found


async def _who(websocket: WebSocket, own: Services, authenticator: Authenticator, offered: list[str]) -> Principal:
    query = websocket.query_params
    if any(name.lower() in _IN_AN_ADDRESS for name in query):
        # Addresses end up in logs and histories: what stands in one is taken for known to others.
        log.warning("auth.refused", reason="a credential in the address")
        raise AuthenticationRequired
    if "authorization" in websocket.headers:
        return await authenticator.authenticate(bearer(websocket))
    tokens = [name.removeprefix(_BEARER) for name in offered if name.startswith(_BEARER)]
    if tokens:
        return await authenticator.authenticate(tokens[0])
    if "ticket" in query:
        return await authenticator.redeem(query["ticket"])
    return await authenticator.authenticate(await _first_message(websocket, own.first_message_seconds))


async def _first_message(websocket: WebSocket, seconds: float) -> str | None:
    try:
        async with asyncio.timeout(seconds):
            message = await websocket.receive_text()
        return AuthMessage.model_validate_json(message).token
    except (TimeoutError, KeyError, ValidationError):  # nothing, bytes, or something else
        return None


# --------------------------------------------------------------------------------------------------- while it lasts


class Standing:
    """Whether a caller that was let in may still be there: not once its key has expired or was revoked."""

    def __init__(self, own: Services, who: Principal) -> None:
        """Watch over the caller."""
        self._own = own
        self._who = who
        self._looked = time.monotonic()

    async def holds(self) -> bool:
        """Whether it may. What it rests on is looked up again every `recheck_seconds`."""
        authenticator = self._own.authenticator
        if authenticator is None:
            return True
        if self._who.expires_at is not None and self._who.expires_at <= utc_now():
            return False
        if time.monotonic() - self._looked < self._own.recheck_seconds:
            return True
        self._looked = time.monotonic()
        return await authenticator.still_good(self._who)

    async def over(self) -> None:
        """Wait until it may no longer."""
        while await self.holds():
            pause = self._own.recheck_seconds
            if self._who.expires_at is not None:
                pause = min(pause, (self._who.expires_at - utc_now()).total_seconds())
            await asyncio.sleep(max(pause, 0.01))

    async def guard(self, batches: AsyncIterator[T]) -> AsyncIterator[T]:
        """The batches, as long as the caller may have them. A stream that ends so can be opened with a new key."""
        try:
            async for batch in batches:
                if not await self.holds():
                    return
                yield batch
        finally:
            if hasattr(batches, "aclose"):
                await batches.aclose()
