"""A one-off prompt: the session is gone after it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query, Request
from starlette.responses import Response

from carrel.api.dependencies import ServicesDep, UnboundDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_RESULT
from carrel.api.routes.turns import EXAMPLE_STREAM, respond
from carrel.errors import (
    BoundToSession,
    CarrelError,
    Draining,
    EnvironmentForbids,
    EnvironmentNotFound,
    Forbidden,
    OutOfMemory,
    SessionNotFound,
    ValidationFailed,
)
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import Query as QueryBody
from carrel.sessions.service import Mark

router = APIRouter(tags=["query"])


@router.post(
    "/query",
    response_model=TurnResult,
    responses=responses(
        Forbidden, EnvironmentForbids, BoundToSession, EnvironmentNotFound, ValidationFailed, Draining, OutOfMemory
    )
    | {
        200: {
            "description": "The result; or, with `Accept: text/event-stream`, the events and deltas.",
            "model": TurnResult,
            "content": {
                "application/json": {"example": EXAMPLE_RESULT},
                "text/event-stream": {"example": EXAMPLE_STREAM},
            },
        }
    },
)
async def query(
    request: Request,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[QueryBody, Body(examples=[{"prompt": "What is 6 × 7?", "model": "haiku"}])],
    deltas: Annotated[bool, Query(description="Whether a stream has deltas too.")] = True,
) -> Response:
    """Ask once. The answer is the turn's result or its stream; session and files are deleted afterwards."""
    turn_body = body.turn().model_copy(update={"wait": True})

    async def make(mark: Mark | None) -> Response:
        session = await services.sessions.create(principal, body.session(), mark)

        async def clean_up() -> None:
            try:
                await services.sessions.delete(principal, session.id)
            except SessionNotFound:
                return

        try:
            turn, before = await services.sessions.create_turn(principal, session.id, turn_body)
        except CarrelError:
            await clean_up()
            raise
        return await respond(request, services, principal, turn, before, turn_body, deltas=deltas, afterwards=clean_up)

    return await once(request, services, principal, make)
