"""Who calls a dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from fastapi import Request
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from carrel.api.dependencies import PRINCIPAL
from carrel.api.dialects.errors import Refuse
from carrel.errors import AuthenticationRequired, CarrelError, Forbidden, MissingScope
from carrel.model import ADMIN, Principal, Scope

AuthMode = Literal["keys", "static-token", "jwt", "none"]

_ACCEPTED: Mapping[AuthMode, frozenset[str]] = {
    "keys": frozenset({"admin", "key"}),
    "static-token": frozenset({"admin", "static"}),
    "jwt": frozenset({"admin", "jwt"}),
}


class Authenticate(Protocol):
    """Finds whose a token is; `carrel.auth.Authenticator.authenticate` is one."""

    async def __call__(self, token: str | None, *, accept: frozenset[str]) -> Principal:
        """Who holds this token of one of these kinds. Raises AuthenticationRequired."""


STATIC = "static"
"""The name of the principal that holds the static token."""

_OPEN = frozenset({"/", "/health", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class DialectAuth:
    """Finds out who calls."""

    def __init__(self, mode: AuthMode, authenticate: Authenticate) -> None:
        """Make it.

        Args:
            mode: who may call; with `none` everybody, and with all rights.
            authenticate: asked whose a token is.
        """
        self.mode = mode
        self._authenticate = authenticate

    async def principal_of(self, connection: HTTPConnection) -> Principal:
        """Who calls.

        Raises:
            AuthenticationRequired: nobody we know.
            MissingScope: somebody who may not do this.
            Forbidden: somebody bound to one session.
        """
        if self.mode == "none":
            return ADMIN
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise AuthenticationRequired
        principal = await self._authenticate(token.strip(), accept=_ACCEPTED[self.mode])
        if principal.session_id is not None:
            raise Forbidden("A token that is bound to one session opens nothing here; use a user's key.")
        needed = Scope.READ if connection.scope.get("method") in _READING else Scope.WRITE
        if not principal.scopes & {needed, Scope.ADMIN}:
            raise MissingScope(needed)
        return principal


class CallerFirst:
    """Turns away who may not call, before a byte of the body is read; notes who it is otherwise."""

    def __init__(self, app: ASGIApp, *, auth: DialectAuth, refuse: Refuse) -> None:
        self._app = app
        self._auth = auth
        self._refuse = refuse

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in _OPEN:
            connection = HTTPConnection(scope)
            try:
                principal = await self._auth.principal_of(connection)
            except CarrelError as error:
                await self._refuse(error, connection)(scope, receive, send)
                return
            scope[PRINCIPAL] = principal
        await self._app(scope, receive, send)


def principal(request: Request) -> Principal:
    """Who calls, as `CallerFirst` has found out."""
    found: Principal = request.scope[PRINCIPAL]
    return found


def is_trusted(principal: Principal) -> bool:
    """Whether the caller is a back end that speaks for its users: an admin, or the holder of the static token."""
    return principal.is_admin or principal.name == STATIC


def for_all_users(principal: Principal) -> Principal:
    """The caller, with every user's sessions in sight where it speaks for them all."""
    if principal.is_admin or not is_trusted(principal):
        return principal
    return principal.model_copy(update={"scopes": principal.scopes | {Scope.ADMIN}})
