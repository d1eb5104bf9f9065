"""Sessions: make, list, change, stop, resume, interrupt, fork, export, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response, StreamingResponse

from carrel.api.dependencies import PrincipalDep, ServicesDep, UnboundDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import (
    EXAMPLE_SESSION,
    EXAMPLE_TURN,
    Cursor,
    Limit,
    Listing,
    SessionId,
    Sought,
    answer,
    example,
    sought,
)
from carrel.errors import (
    BoundToSession,
    EnvironmentForbids,
    EnvironmentNotFound,
    Forbidden,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidCursor,
    NothingToInterrupt,
    QueueFull,
    SessionNotFound,
    SessionStopped,
    TurnNotFinished,
    TurnNotFound,
    ValidationFailed,
)
from carrel.model import Session, SessionStatus, Turn
from carrel.protocol.spec import MAX_PROMPT_CHARS, CreateSession, CreateTurn, UpdateSession
from carrel.sessions.service import Mark

router = APIRouter(prefix="/sessions", tags=["sessions"])


class Fork(BaseModel):
    """Where to fork."""

    model_config = ConfigDict(extra="forbid")

    turn_id: str | None = Field(default=None, description="The last turn of the copy; default: the last that ended.")


class InterruptBody(BaseModel):
    """What to interrupt, and what to do instead."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "not": {
                "required": ["turn_id", "prompt"],
                "properties": {"turn_id": {"type": "string"}, "prompt": {"type": "string"}},
            }
        },
    )

    turn_id: str | None = Field(
        default=None, strict=True, max_length=64, description="Only this turn; default: whichever is at work."
    )
    prompt: str | None = Field(
        default=None,
        strict=True,
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        pattern=r"\S",
        description="Another instruction, queued in the same step; then nothing need be at work.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> InterruptBody:
        if self.turn_id is not None and self.prompt is not None:
            raise ValueError("give turn_id or prompt, not both")
        return self


@router.post(
    "",
    status_code=201,
    response_model=Session,
    responses=responses(
        Forbidden,
        EnvironmentForbids,
        BoundToSession,
        EnvironmentNotFound,
        ValidationFailed,
        IdempotencyInFlight,
        IdempotencyMismatch,
    )
    | {201: example(EXAMPLE_SESSION, "The new session.")},
)
async def create_session(
    request: Request,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[
        CreateSession, Body(examples=[{"title": "Fix the tests", "model": "opus", "budget": {"max_usd": 5}}])
    ] = CreateSession(),
) -> Response:
    """Open a session. No model is asked and no process started before its first turn."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.sessions.create(principal, body, mark), status=201)

    async def replay(object_id: str) -> Response:
        return answer(await services.sessions.get(principal, object_id), status=201)

    return await once(request, services, principal, make, replay)


@router.get(
    "",
    response_model=Listing[Session],
    responses=responses(InvalidCursor, ValidationFailed)
    | {200: example({"data": [EXAMPLE_SESSION], "next_cursor": None}, "Newest first.")},
)
async def list_sessions(
    services: ServicesDep,
    principal: PrincipalDep,
    status: Annotated[SessionStatus | None, Query(description="Only those with this status.")] = None,
    q: Sought = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """Your sessions, newest first. `q` looks in their titles and in what was said in them."""
    page = await services.sessions.page(principal, status=status, cursor=cursor, limit=limit, text=sought(q))
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/{session_id}", response_model=Session, responses=responses(SessionNotFound) | {200: example(EXAMPLE_SESSION)}
)
async def get_session(session_id: SessionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """One session."""
    return answer(await services.sessions.get(principal, session_id))


@router.patch(
    "/{session_id}",
    response_model=Session,
    responses=responses(SessionNotFound, EnvironmentNotFound, Forbidden, EnvironmentForbids, ValidationFailed)
    | {200: example(EXAMPLE_SESSION)},
)
async def update_session(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[UpdateSession, Body(examples=[{"title": "Fix the tests at last", "model": "sonnet"}])],
) -> Response:
    """Change title, metadata or options. Options marked `live` apply at once, the others at the next wake."""
    if principal.name.startswith("sandbox:"):
        raise Forbidden("An agent cannot change the options of its own session.")
    return answer(await services.sessions.update(principal, session_id, body))


@router.delete("/{session_id}", status_code=204, responses=responses(SessionNotFound))
async def delete_session(session_id: SessionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """Delete a session for good: its processes, files, transcript and events."""
    await services.sessions.delete(principal, session_id)
    return Response(status_code=204)


@router.post(
    "/{session_id}/stop", response_model=Session, responses=responses(SessionNotFound) | {200: example(EXAMPLE_SESSION)}
)
async def stop_session(
    request: Request, session_id: SessionId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Stop a session by hand. Its turn is interrupted, queued ones are cancelled; prompts get 409 until `resume`."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.sessions.stop(principal, session_id))

    return await once(request, services, principal, make)


@router.post(
    "/{session_id}/pause",
    response_model=Session,
    responses=responses(SessionNotFound) | {200: example(EXAMPLE_SESSION)},
)
async def pause_session(
    request: Request, session_id: SessionId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Stop a session so that it can go on: its turn is interrupted, queued ones wait. `resume` tells it to go on."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.sessions.pause(principal, session_id))

    return await once(request, services, principal, make)


@router.post(
    "/{session_id}/resume",
    response_model=Session,
    responses=responses(SessionNotFound) | {200: example(EXAMPLE_SESSION)},
)
async def resume_session(
    request: Request, session_id: SessionId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Take a stopped or failed session up again."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.sessions.resume(principal, session_id))

    return await once(request, services, principal, make)


@router.post(
    "/{session_id}/interrupt",
    status_code=202,
    response_model=Turn,
    responses=responses(SessionNotFound, NothingToInterrupt, SessionStopped, ValidationFailed, QueueFull)
    | {202: example(EXAMPLE_TURN, "It is being ended; with `prompt`, the turn that comes next.")},
)
async def interrupt_session(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[InterruptBody, Body()] = InterruptBody(),
) -> Response:
    """End the turn at work. The session can be used at once; `turn.completed` says when the turn has ended.

    With `prompt` the session is given that instead: the answer is its turn.
    """

    async def make(mark: Mark | None) -> Response:
        if body.prompt is not None:
            given = CreateTurn(prompt=body.prompt)
            turn, _ = await services.sessions.redirect(principal, session_id, given, mark)
            return answer(turn, status=202)
        return answer(await services.sessions.interrupt(principal, session_id, body.turn_id), status=202)

    return await once(request, services, principal, make)


@router.post(
    "/{session_id}/fork",
    status_code=201,
    response_model=Session,
    responses=responses(BoundToSession, SessionNotFound, TurnNotFound, TurnNotFinished)
    | {201: example(EXAMPLE_SESSION, "The new session.")},
)
async def fork_session(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[Fork, Body()] = Fork(),
) -> Response:
    """A new session that remembers this one up to the end of a turn, with a copy of the files as they are now."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.sessions.fork(principal, session_id, body.turn_id, mark), status=201)

    async def replay(object_id: str) -> Response:
        return answer(await services.sessions.get(principal, object_id), status=201)

    return await once(request, services, principal, make, replay)


@router.get(
    "/{session_id}/export",
    response_class=StreamingResponse,
    responses=responses(SessionNotFound)
    | {200: example({"kind": "session", "session": EXAMPLE_SESSION}, "A JSON text a line.", "application/x-ndjson")},
)
async def export_session(session_id: SessionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """Everything of a session, a JSON text a line: the session, its turns, its events, its agent's transcript."""
    lines = await services.sessions.export(principal, session_id)
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.ndjson"'}
    return StreamingResponse(lines, media_type="application/x-ndjson", headers=headers)
