"""The event log of a session: as pages, as a stream of server-sent events, and over a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Header, Query, Request, WebSocket
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect

from carrel.api import sse
from carrel.api.audit import audited
from carrel.api.authentication import Standing, let_in
from carrel.api.dependencies import PrincipalDep, Services, ServicesDep, need, services
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_EVENT, Limit, SessionId
from carrel.api.routes.turns import EXAMPLE_STREAM
from carrel.errors import (
    AuthenticationRequired,
    CarrelError,
    Forbidden,
    InvalidCursor,
    SessionNotFound,
    ValidationFailed,
)
from carrel.model import Principal, Scope
from carrel.protocol.events import PendingInteraction, StoredEvent
from carrel.protocol.spec import CreateTurn
from carrel.sessions.tree_streams import places_of

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/sessions/{session_id}", tags=["events"])

After = Annotated[
    str | None,
    Query(
        max_length=8192,
        description="Only events with a higher `seq`; with `tree`, the `next_cursor` or the id of the last event.",
    ),
]
_HIGHEST = 2**62


class Event(BaseModel):
    """A stored event."""

    session_id: str | None = Field(default=None, description="Whose it is; with `tree` alone.")
    seq: int = Field(description="Counts the session's events from 1, without gaps.")
    type: str
    turn_id: str | None
    at: str
    data: dict[str, Any]


class EventPage(BaseModel):
    """A part of the log."""

    data: list[Event]
    next_cursor: str | None = Field(description="The `after` of the next part; null at the end.")


@router.get(
    "/events",
    response_model=EventPage,
    responses=responses(SessionNotFound, InvalidCursor, ValidationFailed)
    | {
        200: {
            "description": "A page; or, with `Accept: text/event-stream`, a live stream that ends with the session.",
            "model": EventPage,
            "content": {
                "application/json": {"example": {"data": [EXAMPLE_EVENT], "next_cursor": None}},
                "text/event-stream": {"example": EXAMPLE_STREAM},
            },
        }
    },
)
async def list_events(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    after: After = None,
    cursor: Annotated[str | None, Query(max_length=8192, description="The same as `after`.")] = None,
    tree: Annotated[bool, Query(description="Whether those of all sessions below are among them.")] = False,
    limit: Limit = 100,
    deltas: Annotated[bool, Query(description="Whether a stream has deltas too.")] = False,
    last_event_id: Annotated[str | None, Header(description="In a stream: resumes after this `seq`.")] = None,
    ticket: Annotated[
        str | None, Query(max_length=200, description="In a stream: a single-use ticket in place of a key.")
    ] = None,
) -> Response:
    """The session's events in order, from `after` on.

    With `tree`, those of every session below too, each with its `session_id`: in order within each session.
    """
    given = after if after is not None else cursor
    if tree:
        return await _tree(request, services, principal, session_id, last_event_id or given, limit)
    start = _seq("after", given) if given is not None else None
    if sse.wanted(request):
        session = await services.sessions.get(principal, session_id)
        if last_event_id:
            start = _seq("Last-Event-ID", last_event_id)
        batches = services.sessions.streams.follow(
            session.id, after=start or 0, deltas=deltas, heartbeat_seconds=services.heartbeat_seconds
        )
        first = await services.interactions.first_told(principal, session.id)
        return sse.response(Standing(services, principal).guard(batches), first=first)
    events = await services.sessions.events(principal, session_id, after=start or 0, limit=limit)
    return Response(_page(events, limit), media_type="application/json")


async def _tree(
    request: Request, services: Services, principal: Principal, session_id: str, after: str | None, limit: int
) -> Response:
    if sse.wanted(request):
        await services.sessions.get(principal, session_id)
        places_of(after)
        batches = services.trees.follow(
            principal, session_id, after=after, heartbeat_seconds=services.heartbeat_seconds
        )
        return sse.response(Standing(services, principal).guard(batches))
    events = await services.trees.page(principal, session_id, after=after, limit=limit)
    following = to_json(events[-1].cursor) if len(events) == limit else b"null"
    body = b'{"data":[' + b",".join([event.json() for event in events]) + b'],"next_cursor":' + following + b"}"
    return Response(body, media_type="application/json")


def _seq(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > _HIGHEST:
        wrong = {"field": name, "message": "must be the number of an event"}
        raise ValidationFailed(f"{name}: {wrong['message']}", errors=[wrong])
    return int(text)


def _page(events: Sequence[StoredEvent], limit: int) -> bytes:
    following = to_json(str(events[-1].seq)) if len(events) == limit else b"null"
    return b'{"data":[' + b",".join([event.json() for event in events]) + b'],"next_cursor":' + following + b"}"


# ---------------------------------------------------------------------------------------------------------- WebSocket


class PromptMessage(CreateTurn):
    """Sends a prompt."""

    type: Literal["prompt"]


class InterruptMessage(BaseModel):
    """Ends the turn at work."""

    type: Literal["interrupt"]
    turn_id: str | None = None


class PingMessage(BaseModel):
    """Asks for a `pong`."""

    type: Literal["ping"]


_MESSAGE: TypeAdapter[PromptMessage | InterruptMessage | PingMessage] = TypeAdapter(
    Annotated[PromptMessage | InterruptMessage | PingMessage, Field(discriminator="type")]
)
_UNAUTHORISED, _FORBIDDEN, _NOT_FOUND, _ENDED = 4001, 4003, 4004, 1000


@router.websocket("/stream")
async def stream(
    websocket: WebSocket, session_id: str, after: int = Query(default=0, ge=0), deltas: bool = Query(default=True)
) -> None:
    """Events and deltas out; `prompt`, `interrupt` and `ping` in. Any number of viewers see the same thing."""
    own = services(websocket)
    try:
        who = await let_in(websocket)
        await own.sessions.get(who, session_id)
        first = await own.interactions.first_told(who, session_id)
    except AuthenticationRequired as error:
        await websocket.close(_UNAUTHORISED, error.code)
        return
    except Forbidden as error:
        await websocket.close(_FORBIDDEN, error.code)
        return
    except SessionNotFound as error:
        await websocket.close(_NOT_FOUND, error.code)
        return
    except WebSocketDisconnect:  # it went away before it had said who it is
        return
    standing = Standing(own, who)
    over = asyncio.create_task(standing.over(), name="ws-standing")
    all_ = {
        asyncio.create_task(_tell(websocket, own, session_id, after, deltas, first), name="ws-out"),
        asyncio.create_task(_hear(websocket, own, who, session_id), name="ws-in"),
        over,
    }
    try:
        done, _ = await asyncio.wait(all_, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await websocket.close(*((_UNAUTHORISED, AuthenticationRequired.code) if over in done else (_ENDED,)))
    except (WebSocketDisconnect, RuntimeError) as error:
        log.debug("websocket.closed", session=session_id, reason=repr(error))
    finally:
        for task in all_:
            task.cancel()
        await asyncio.gather(*all_, return_exceptions=True)


async def _tell(
    websocket: WebSocket,
    own: Services,
    session_id: str,
    after: int,
    deltas: bool,
    first: Sequence[PendingInteraction],
) -> None:
    for each in first:
        await websocket.send_text(each.json().decode())
    batches = own.sessions.streams.follow(
        session_id, after=after, deltas=deltas, heartbeat_seconds=own.heartbeat_seconds
    )
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for frame in batch:
                await websocket.send_text(frame.json().decode())
            if not batch:
                await websocket.send_text('{"type":"heartbeat"}')


async def _hear(websocket: WebSocket, own: Services, who: Principal, session_id: str) -> None:
    while True:
        text = await websocket.receive_text()
        try:
            reply = await _obey(websocket, own, who, session_id, text)
        except ValidationError as error:
            told = [{"field": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
            reply = {
                "type": "problem",
                "code": ValidationFailed.code,
                "detail": "The message is not valid.",
                "errors": told,
            }
        except CarrelError as error:
            reply = {"type": "problem", "code": error.code, "detail": error.message, "status": error.http_status}
        if reply is not None:
            await websocket.send_text(to_json(reply).decode())


async def _obey(
    websocket: WebSocket, own: Services, who: Principal, session_id: str, text: str
) -> dict[str, Any] | None:
    message = _MESSAGE.validate_json(text)
    if isinstance(message, PingMessage):
        return {"type": "pong"}
    prompted = isinstance(message, PromptMessage)
    outcome, turn_id = 500, None
    try:
        if own.edges.per_key is not None:
            await own.edges.per_key.spend(who)
        need(who, Scope.WRITE)
        if isinstance(message, InterruptMessage):
            await own.sessions.interrupt(who, session_id, message.turn_id)
            outcome = 202
            return None
        body = CreateTurn.model_validate(message.model_dump(exclude={"type"}, exclude_none=True))
        turn, _ = await own.sessions.create_turn(who, session_id, body)
        outcome, turn_id = 202, turn.id
        return {"type": "accepted", "turn_id": turn_id}
    except CarrelError as error:
        outcome = error.http_status
        raise
    finally:
        audited(
            websocket,
            "turn.create" if prompted else "session.interrupt",
            outcome=outcome,
            object_type="turn" if prompted else "session",
            object_id=turn_id if prompted else session_id,
            principal=who,
            details={"session_id": session_id, "over": "websocket"},
            prompt=message.prompt if isinstance(message, PromptMessage) else None,
        )
