"""Turns: send a prompt and wait, stream, or come back later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import APIRouter, Body, Query, Request
from starlette.responses import Response

from carrel import abc
from carrel.api import sse
from carrel.api.authentication import Standing
from carrel.api.dependencies import PrincipalDep, Services, ServicesDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import (
    EXAMPLE_DETAIL,
    EXAMPLE_RESULT,
    EXAMPLE_TURN,
    Cursor,
    Limit,
    Listing,
    SessionId,
    TurnId,
    answer,
    example,
)
from carrel.errors import (
    CarrelError,
    Draining,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidCursor,
    OutOfMemory,
    QueueFull,
    SessionNotFound,
    SessionStopped,
    TurnNotCancellable,
    TurnNotFound,
    ValidationFailed,
)
from carrel.model import OnDisconnect, Principal, Turn
from carrel.protocol.results import TurnDetail, TurnResult
from carrel.protocol.spec import CreateTurn
from carrel.sessions.service import Mark

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/sessions/{session_id}/turns", tags=["turns"])

T = TypeVar("T")

EXAMPLE_STREAM = (
    'id: 9\nevent: message.assistant\ndata: {"seq":9,"type":"message.assistant","turn_id":"…","at":"…","data":{…}}\n\n'
)
_DELTAS = Query(description="Whether a stream has deltas too.")


@router.post(
    "",
    status_code=202,
    response_model=Turn,
    responses=responses(
        SessionNotFound,
        SessionStopped,
        ValidationFailed,
        QueueFull,
        Draining,
        OutOfMemory,
        IdempotencyInFlight,
        IdempotencyMismatch,
    )
    | {
        202: example(EXAMPLE_TURN, "The turn is queued."),
        200: {
            "description": "With `wait`: the turn has ended. With `Accept: text/event-stream`: its events and deltas.",
            "model": TurnResult,
            "content": {
                "application/json": {"example": EXAMPLE_RESULT},
                "text/event-stream": {"example": EXAMPLE_STREAM},
            },
        },
    },
)
async def create_turn(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[
        CreateTurn, Body(examples=[{"prompt": "Make the tests pass.", "wait": True, "budget": {"max_usd": 1}}])
    ],
    deltas: Annotated[bool, _DELTAS] = True,
) -> Response:
    """Send a prompt. While another turn runs, it is queued behind it.

    Answers 202 with the queued turn; or, with `wait`, 200 with the result of the ended turn; or, with
    `Accept: text/event-stream`, the turn's events and deltas as they come.
    """

    async def make(mark: Mark | None) -> Response:
        turn, before = await services.sessions.create_turn(principal, session_id, body, mark)
        return await respond(request, services, principal, turn, before, body, deltas=deltas)

    async def replay(object_id: str) -> Response:
        turn = await services.sessions.turn(principal, session_id, object_id)
        return await respond(request, services, principal, turn, 0, body, deltas=deltas)

    return await once(request, services, principal, make, replay)


async def respond(
    request: Request,
    services: Services,
    principal: Principal,
    turn: Turn,
    before: int,
    body: CreateTurn,
    *,
    deltas: bool,
    afterwards: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> Response:
    """Answer for a turn in the way the caller asked for. `afterwards` is done when a waited-for turn is over."""
    interrupt = body.on_disconnect is OnDisconnect.INTERRUPT
    sessions = services.sessions
    if sse.wanted(request):
        batches = sessions.streams.follow(
            turn.session_id,
            after=before,
            deltas=deltas,
            until_turn=turn.id,
            heartbeat_seconds=services.heartbeat_seconds,
        )
        allowed = Standing(services, principal).guard(batches)
        guarded = _guard(allowed, services, principal, turn, interrupt=interrupt, afterwards=afterwards)
        return sse.response(guarded, headers={"X-Carrel-Turn": turn.id, "X-Carrel-Session": turn.session_id})
    if not body.wait:
        return answer(turn, status=202)
    waiting = sessions.wait_for_turn(principal, turn.session_id, turn.id, after=before)
    try:
        if not interrupt:
            return answer(await waiting)
        result = await _while_connected(request, waiting)
        if result is None:
            await _interrupt(services, principal, turn)
            return Response(status_code=499)
        return answer(result)
    finally:
        if afterwards is not None:
            await afterwards()


async def _guard(
    batches: AsyncIterator[list[abc.Frame]],
    services: Services,
    principal: Principal,
    turn: Turn,
    *,
    interrupt: bool,
    afterwards: Callable[[], Coroutine[Any, Any, None]] | None,
) -> AsyncIterator[list[abc.Frame]]:
    """The frames; and what is to be done when they end, or when nobody reads them any more."""
    ended = False
    try:
        async for batch in batches:
            yield batch
        ended = True
    finally:
        if not ended and interrupt:
            services.background(_interrupt(services, principal, turn))
        if afterwards is not None:
            services.background(afterwards())


async def _interrupt(services: Services, principal: Principal, turn: Turn) -> None:
    try:
        await services.sessions.interrupt(principal, turn.session_id, turn.id)
    except CarrelError as error:
        log.debug("turn.already_over", turn=turn.id, reason=error.code)


async def _while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """The result, or None when the client went away first."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request), name="watch-client")
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get(
    "",
    response_model=Listing[Turn],
    responses=responses(SessionNotFound, InvalidCursor)
    | {200: example({"data": [EXAMPLE_TURN], "next_cursor": None}, "Newest first.")},
)
async def list_turns(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """The session's turns, newest first."""
    page = await services.sessions.turns(principal, session_id, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/{turn_id}",
    response_model=TurnDetail,
    responses=responses(SessionNotFound, TurnNotFound) | {200: example(EXAMPLE_DETAIL)},
)
async def get_turn(session_id: SessionId, turn_id: TurnId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """One turn, with what it has come to so far."""
    turn = await services.sessions.turn(principal, session_id, turn_id)
    result = await services.sessions.result(principal, session_id, turn_id)
    return answer(turn.model_dump() | result.model_dump())


@router.post(
    "/{turn_id}/cancel",
    response_model=Turn,
    responses=responses(SessionNotFound, TurnNotFound, TurnNotCancellable) | {200: example(EXAMPLE_TURN)},
)
async def cancel_turn(
    request: Request, session_id: SessionId, turn_id: TurnId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Take a queued turn back."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.sessions.cancel_turn(principal, session_id, turn_id))

    return await once(request, services, principal, make)
