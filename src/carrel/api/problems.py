"""Errors as problem+json (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from carrel.errors import (
    AuthenticationRequired,
    CarrelError,
    MethodNotAllowed,
    MissingScope,
    RouteNotFound,
    ValidationFailed,
)

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
PROBLEM_REF = "#/components/schemas/Problem"


class Problem(BaseModel):
    """An error."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(description="What happened and what to do about it.")
    code: str = Field(description="A stable word for programs.", examples=["session_not_found"])
    instance: str = Field(description="The address that was called.")


def responses(*errors: type[CarrelError]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the errors a route may answer."""
    found: dict[int | str, dict[str, Any]] = {}
    listed: dict[type[CarrelError], None] = dict.fromkeys((AuthenticationRequired, MissingScope, *errors))
    for error in listed:
        entry = found.setdefault(
            error.http_status,
            {"description": "", "content": {MEDIA_TYPE: {"schema": {"$ref": PROBLEM_REF}, "examples": {}}}},
        )
        summary = (error.__doc__ or "").split("\n", 1)[0]
        entry["description"] = " ".join(filter(None, [entry["description"], f"`{error.code}`: {summary}"]))
        entry["content"][MEDIA_TYPE]["examples"][error.code] = {
            "value": {
                "type": "about:blank",
                "title": HTTPStatus(error.http_status).phrase,
                "status": error.http_status,
                "detail": summary,
                "code": error.code,
                "instance": "/api/v1/…",
            }
        }
    return found


def problem(error: CarrelError, instance: str) -> Response:
    """The error as a response."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(error.http_status).phrase,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "instance": instance,
        **error.context,
    }
    headers = {}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return Response(to_json(body), status_code=error.http_status, headers=headers, media_type=MEDIA_TYPE)


# The checker's words where they speak of its own workings.
_WORDS = {
    "extra_forbidden": "there is no such field",
    "missing": "is required",
    "model_attributes_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
}


def _plain(error: dict[str, Any]) -> dict[str, Any]:
    # The offending input itself is left out: it may be large, or a secret.
    kind = error.get("type")
    if kind == "json_invalid":
        *place, character = error["loc"]
        return {"field": ".".join(map(str, place)), "message": f"is not JSON, from character {character} on"}
    message = _WORDS.get(kind or "", error["msg"])
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
    return {"field": ".".join(str(part) for part in error["loc"]), "message": message}


def _validation_failed(errors: list[Any]) -> ValidationFailed:
    found = [_plain(item) for item in errors]
    first = found[0] if found else {"field": "body", "message": "is not valid"}
    return ValidationFailed(f"{first['field']}: {first['message']}", errors=found[:50])


def _methods(request: Request) -> set[str]:
    """What the address takes: the framework names the methods of the first route alone, and has one for each."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return found


def install(app: FastAPI) -> None:
    """Have every error of the application answered as a problem."""

    @app.exception_handler(CarrelError)
    async def ours(request: Request, error: CarrelError) -> Response:
        if error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.warning("request.failed", code=error.code, path=request.url.path, detail=str(error))
        return problem(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = list(error.errors())
        if any(item["loc"] == ("body",) for item in errors) and "json" not in request.headers.get("content-type", ""):
            errors = [{"loc": ("body",), "msg": "must be JSON, sent with the header Content-Type: application/json"}]
        return problem(_validation_failed(errors), request.url.path)

    @app.exception_handler(ValidationError)
    async def invalid_inside(request: Request, error: ValidationError) -> Response:
        return problem(_validation_failed(list(error.errors())), request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.NOT_FOUND:
            return problem(RouteNotFound(), request.url.path)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            answer = problem(MethodNotAllowed(), request.url.path)
            answer.headers["Allow"] = ", ".join(sorted(_methods(request)))
            return answer
        failed = ValidationFailed(str(error.detail)) if error.status_code < 500 else CarrelError()
        return problem(failed, request.url.path)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("request.crashed", path=request.url.path, exc_info=error)
        return problem(CarrelError("Something went wrong inside Carrel; the server's log says what."), request.url.path)
