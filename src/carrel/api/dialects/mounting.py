"""Where dialects are served: under `/compat/<name>` of the native listener, and at the root of a port of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from carrel import __version__
from carrel.api.dependencies import PRINCIPAL, Services
from carrel.api.dialects import claude_agent_http, claudecode_api, errors, sdk_server
from carrel.api.dialects.auth import CallerFirst
from carrel.api.dialects.options import DialectOptions


@dataclass(frozen=True)
class Dialect:
    """An older service's API."""

    title: str
    create_router: Callable[[Services, DialectOptions], APIRouter]
    refuse: errors.Refuse = errors.refusal


DIALECTS: Mapping[str, Dialect] = {
    "claude-agent-http": Dialect(claude_agent_http.TITLE, claude_agent_http.create_router),
    "claudecode-api": Dialect(claudecode_api.TITLE, claudecode_api.create_router, claudecode_api.refusal),
    "sdk-server": Dialect(sdk_server.TITLE, sdk_server.create_router),
}
"""Every dialect, by its name."""

_AT_ROOT = "carrel.dialect_at_root"


def create_dialect(name: str, services: Services, options: DialectOptions) -> FastAPI:
    """The application that speaks this dialect, with its own `/docs` and `/openapi.json`."""
    dialect = DIALECTS[name]
    app = FastAPI(
        title=dialect.title,
        version=__version__,
        description=f"The API of `{name}`, spoken by Carrel.",
        redoc_url=None,
        swagger_ui_parameters={"persistAuthorization": True},
        # Says in the document that a key is wanted; `CallerFirst` is who wants it.
        dependencies=[] if options.auth.mode == "none" else [Depends(HTTPBearer(auto_error=False))],
    )
    errors.install(app, dialect.refuse)
    app.include_router(dialect.create_router(services, options))
    services.edges.inside(app, unnamed=None)
    app.add_middleware(CallerFirst, auth=options.auth, refuse=dialect.refuse)
    return app


def mount(app: FastAPI, name: str, dialect: FastAPI) -> None:
    """Serve a dialect under `/compat/<name>` of the application."""
    app.mount(prefix(name), _Mounted(dialect), name=name)


def prefix(name: str) -> str:
    """Where a dialect is on the native listener."""
    return f"/compat/{name}"


class _Mounted:
    """A dialect behind its prefix; one that was called at its own root does not hear of the prefix."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    @property
    def routes(self) -> list[BaseRoute]:
        """What can be asked of it; whoever lists a mount's routes looks here."""
        return self._app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(_AT_ROOT):
            cut = len(scope["root_path"])
            raw = scope.get("raw_path")
            own = {**scope, "root_path": "", "path": scope["path"][cut:], "raw_path": raw[cut:] if raw else raw}
            try:
                await self._app(own, receive, send)
            finally:
                # Whoever stands outside, the audit log for one, asks for the caller here.
                if PRINCIPAL in own:
                    scope[PRINCIPAL] = own[PRINCIPAL]
            return
        await self._app(scope, receive, send)


class Listeners:
    """All listeners in front of one application: on a dialect's own port, its paths begin at the root.

    So whatever stands before the native API (limits, logs, metrics) stands before dialects too.
    """

    def __init__(self, app: ASGIApp, ports: Mapping[int, str], *, loopback: Collection[str] = ()) -> None:
        """Make it.

        Args:
            app: the native application, dialects mounted.
            ports: the dialect of each port that is one's own.
            loopback: those of them that listen on loopback alone.
        """
        self._app = app
        self._ports = ports
        self._loopback = frozenset(loopback)
        self.up = asyncio.Event()
        """Set when every listener listens; nothing is answered before."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        await self.up.wait()
        server = scope.get("server")
        name = self._ports.get(server[1]) if server else None
        if name is not None and scope["type"] in ("http", "websocket"):
            before = prefix(name)
            raw = scope.get("raw_path")
            scope = {
                **scope,
                "path": before + scope["path"],
                "raw_path": before.encode() + raw if raw else raw,
                _AT_ROOT: True,
                "carrel.loopback": name in self._loopback,
            }
        await self._app(scope, receive, send)
