"""The application: routes, errors, and what stands before both."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel import __version__
from carrel.api import problems
from carrel.api.authentication import KeyFirst
from carrel.api.dependencies import Services
from carrel.api.routes import (
    archives,
    artifacts,
    audit,
    children,
    diff,
    environments,
    events,
    files,
    health,
    interactions,
    keys,
    messages,
    metrics,
    models,
    network,
    permissions,
    query,
    secrets,
    sessions,
    snapshots,
    tickets,
    turns,
    usage,
    users,
    workspaces,
)
from carrel.errors import CarrelError, FileTooLarge
from carrel.model import ADMIN

API_PREFIX = "/api/v1"
_DESCRIPTION = """Private, durable sessions of Claude Code.

Send `Authorization: Bearer <key>` with every call; the first key is in `DATA/admin.key`. Errors are
`application/problem+json` with a stable `code`. A `POST` may carry an `Idempotency-Key`: within a day, the same request
under the same key is done once."""


def create_app(services: Services) -> FastAPI:
    """Make the application over the services."""
    app = FastAPI(
        title="Carrel",
        version=__version__,
        description=_DESCRIPTION,
        docs_url="/docs",
        redoc_url=None,
        openapi_url="/openapi.json",
        swagger_ui_parameters={"persistAuthorization": True},
    )
    app.state.services = services
    problems.install(app)
    for router in (
        sessions.router,
        turns.router,
        events.router,
        messages.router,
        files.router,
        archives.router,
        network.router,
        snapshots.router,
        diff.router,
        artifacts.router,
        query.router,
        models.router,
        audit.router,
        keys.router,
        users.router,
        tickets.router,
        usage.router,
        workspaces.router,
        interactions.router,
        children.router,
        permissions.router,
        environments.router,
        secrets.router,
    ):
        app.include_router(router, prefix=API_PREFIX)
    if services.tools is not None:
        app.router.routes.append(services.tools.route())
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.add_middleware(_BodyLimit, max_bytes=services.max_body_bytes)
    services.edges.inside(app, unnamed=ADMIN if services.authenticator is None else None)
    if services.authenticator is not None:
        app.add_middleware(KeyFirst, prefix=API_PREFIX)
    services.edges.outside(app)
    _complete_openapi(app, key_wanted=services.authenticator is not None)
    return app


def _complete_openapi(app: FastAPI, *, key_wanted: bool) -> None:
    """Say in the OpenAPI document what FastAPI does not know: how errors look, and that a key is wanted."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        components = document.setdefault("components", {})
        components.setdefault("schemas", {})["Problem"] = problems.Problem.model_json_schema()
        if key_wanted:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in document["paths"].items():
            for operation in item.values():
                if key_wanted and (path.startswith(API_PREFIX) or path == "/metrics"):
                    operation["security"] = [{"key": []}]
                # FastAPI's own shape of a validation error is not what we answer.
                told = operation["responses"].get("422")
                if told is not None and problems.MEDIA_TYPE not in told["content"]:
                    told["content"] = {problems.MEDIA_TYPE: {"schema": {"$ref": problems.PROBLEM_REF}}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class _BodyLimit:
    """Refuses bodies that are larger than any request needs; files have a limit of their own."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "PUT":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        length = connection.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            await _refuse(FileTooLarge(self._max_bytes), scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise FileTooLarge(self._max_bytes)
            return message

        await self._app(scope, counted, send)


async def _refuse(error: CarrelError, scope: Scope, receive: Receive, send: Send) -> None:
    await problems.problem(error, scope["path"])(scope, receive, send)
