"""Errors in the shape that FastAPI gave the older services' own: `{"detail": …}`."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from pydantic import ValidationError
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from carrel.errors import CarrelError

log = structlog.get_logger(__name__)


Refuse = Callable[[CarrelError, HTTPConnection], Response]
"""Makes the response to a request that is refused."""


def refusal(error: CarrelError, connection: HTTPConnection) -> Response:
    """The error as `{"detail": …}`."""
    headers = {}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return JSONResponse({"detail": error.message}, status_code=error.http_status, headers=headers)


def install(app: FastAPI, refuse: Refuse) -> None:
    """Have every error of the application answered: ours as `refuse` says, others as `{"detail": …}`."""

    @app.exception_handler(CarrelError)
    async def ours(request: Request, error: CarrelError) -> Response:
        if error.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.warning("request.failed", code=error.code, path=request.url.path, detail=str(error))
        return refuse(error, request)

    @app.exception_handler(ValidationError)
    async def invalid_inside(request: Request, error: ValidationError) -> Response:
        found = [{"type": e["type"], "loc": ["body", *e["loc"]], "msg": e["msg"]} for e in error.errors()]
        return JSONResponse({"detail": jsonable_encoder(found)}, status_code=422)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("request.crashed", path=request.url.path, exc_info=error)
        return JSONResponse({"detail": "Internal server error"}, status_code=500)
