"""Sessions that a session begins: begun, listed, drawn as a tree, waited for; and what clones have changed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse

from carrel.api import sse
from carrel.api.authentication import Standing
from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_RESULT, EXAMPLE_SESSION, SessionId, answer, example
from carrel.errors import (
    ChildLimitReached,
    Draining,
    EnvironmentForbids,
    EnvironmentNotFound,
    FileTooLarge,
    IdempotencyInFlight,
    IdempotencyMismatch,
    NoPatch,
    PatchConflict,
    SessionFailed,
    SessionNotFound,
    SessionStopped,
    TooDeep,
    Unavailable,
    ValidationFailed,
    WiderThanParent,
)
from carrel.model import Failure, Session, SessionStatus, StopReason, Usage
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import CreateChild
from carrel.sessions.children import Node, Outcome
from carrel.sessions.service import Mark

router = APIRouter(prefix="/sessions/{session_id}", tags=["children"])

_PROGRESS_SECONDS = 10.0
_CHILD_ID = "01980c5e-7d20-7e01-b8a4-9c8b7a6f5e4d"
_EXAMPLE_CHILD = EXAMPLE_SESSION | {
    "id": _CHILD_ID,
    "title": None,
    "turn_count": 1,
    "parent_id": EXAMPLE_SESSION["id"],
    "root_id": EXAMPLE_SESSION["id"],
    "depth": 1,
    "birth": {
        "files": "clone",
        "on_parent_end": "stop",
        "context": {"module": "auth"},
        "task_type": "test",
        "turn_id": EXAMPLE_RESULT["id"],
    },
}


class Children(BaseModel):
    """Those that a session has begun."""

    data: list[Session] = Field(description="Oldest first.")


class Branch(BaseModel):
    """A session in its tree."""

    session_id: str
    title: str | None
    task_type: str | None
    status: SessionStatus
    stop_reason: StopReason | None
    error: Failure | None
    depth: int
    usage: Usage = Field(description="Of its own requests.")
    cost_usd: float | None = Field(description="Of its own requests; null where any part of it is not known.")
    total_usage: Usage = Field(description="Its own, and that of all that are or were below it.")
    total_cost_usd: float | None
    children: list[Branch]


_EXAMPLE_TREE = {
    "session_id": EXAMPLE_SESSION["id"],
    "title": "Fix the tests",
    "task_type": None,
    "status": "running",
    "stop_reason": None,
    "error": None,
    "depth": 0,
    "usage": EXAMPLE_SESSION["usage"],
    "cost_usd": 0.0082,
    "total_usage": EXAMPLE_SESSION["usage"],
    "total_cost_usd": 0.0164,
    "children": [],
}


class OutcomeShown(BaseModel):
    """How far a session has come with what it was last asked."""

    session_id: str
    status: SessionStatus
    complete: bool = Field(description="Whether nothing of it waits or is at work.")
    turn: TurnResult | None = Field(description="Its newest turn; null: it has had none.")


_EXAMPLE_OUTCOME = {"session_id": _CHILD_ID, "status": "ready", "complete": True, "turn": EXAMPLE_RESULT}


class Applied(BaseModel):
    """What a patch has changed."""

    changed: list[str] = Field(description="The paths, sorted.")


@router.post(
    "/children",
    status_code=201,
    response_model=Session,
    responses=responses(
        SessionNotFound,
        SessionStopped,
        SessionFailed,
        WiderThanParent,
        TooDeep,
        EnvironmentForbids,
        EnvironmentNotFound,
        ChildLimitReached,
        ValidationFailed,
        Draining,
        IdempotencyInFlight,
        IdempotencyMismatch,
    )
    | {201: example(_EXAMPLE_CHILD, "The child; its prompt waits or is at work.")},
)
async def create_child(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[
        CreateChild,
        Body(
            examples=[
                {
                    "prompt": "Write tests for the module auth.",
                    "workspace": "clone",
                    "context": {"module": "auth"},
                    "budget": {"max_usd": 0.5},
                    "timeout_seconds": 600,
                }
            ]
        ),
    ],
) -> Response:
    """Begin a session below this one, with its first prompt. It may do what this one may, or less."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.children.begin(principal, session_id, body, mark), status=201)

    async def replay(object_id: str) -> Response:
        return answer(await services.sessions.get(principal, object_id), status=201)

    return await once(request, services, principal, make, replay)


@router.get(
    "/children",
    response_model=Children,
    responses=responses(SessionNotFound) | {200: example({"data": [_EXAMPLE_CHILD]}, "Oldest first.")},
)
async def list_children(session_id: SessionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """The sessions that this one has begun; deleted ones are not among them."""
    return answer({"data": await services.children.begun(principal, session_id)})


@router.get(
    "/tree",
    response_model=Branch,
    responses=responses(SessionNotFound) | {200: example(_EXAMPLE_TREE, "The session, with all below it.")},
)
async def get_tree(session_id: SessionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """The session with all that are below it, each with what it has cost, alone and with what is below it."""
    return answer(branch_of(await services.children.tree(principal, session_id)))


def branch_of(node: Node) -> dict[str, Any]:
    """A node as it is answered."""
    session = node.session
    return {
        "session_id": session.id,
        "title": session.title,
        "task_type": session.birth.task_type if session.birth is not None else None,
        "status": session.status,
        "stop_reason": session.stop_reason,
        "error": session.error,
        "depth": session.depth,
        "usage": session.usage,
        "cost_usd": session.cost_usd,
        "total_usage": node.usage,
        "total_cost_usd": node.cost_usd,
        "children": [branch_of(each) for each in node.children],
    }


@router.get(
    "/result",
    response_model=OutcomeShown,
    responses=responses(SessionNotFound, ValidationFailed)
    | {
        200: {
            "description": "How far it is; with `Accept: text/event-stream`, `progress` events until a `result`.",
            "model": OutcomeShown,
            "content": {
                "application/json": {"example": _EXAMPLE_OUTCOME},
                "text/event-stream": {
                    "example": 'event: progress\ndata: {"session_id":"…",…}\n\nevent: result\ndata: {…}\n\n'
                },
            },
        }
    },
)
async def get_result(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    wait: Annotated[bool, Query(description="Whether to wait until nothing of it waits or is at work.")] = False,
    timeout_seconds: Annotated[
        float | None, Query(gt=0, le=604_800, description="With `wait`: the longest wait; default: none.")
    ] = None,
) -> Response:
    """What the session's newest turn has come to. A stream waits in any case, and says every few seconds that it does."""
    children = services.children
    if sse.wanted(request):
        await services.sessions.get(principal, session_id)
        found = children.follow(principal, session_id, seconds=timeout_seconds)
        return StreamingResponse(
            _told(Standing(services, principal).guard(found)), media_type="text/event-stream", headers=sse.HEADERS
        )
    outcome = await children.outcome(principal, session_id)
    if wait:
        async for each in children.follow(principal, session_id, seconds=timeout_seconds):
            outcome = each
    return answer(outcome_of(outcome))


async def _told(outcomes: AsyncIterator[Outcome]) -> AsyncIterator[bytes]:
    yield sse.HEARTBEAT
    said = 0.0
    async for each in outcomes:
        if not each.complete and time.monotonic() - said < _PROGRESS_SECONDS:
            yield sse.HEARTBEAT
            continue
        said = time.monotonic()
        kind = b"result" if each.complete else b"progress"
        yield b"event: %s\ndata: %s\n\n" % (kind, to_json(outcome_of(each)))


def outcome_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome as it is answered."""
    session = outcome.session
    return {
        "session_id": session.id,
        "status": session.status,
        "complete": outcome.complete,
        "turn": outcome.turn,
    }


@router.get(
    "/patch",
    response_class=Response,
    responses=responses(SessionNotFound, NoPatch, FileTooLarge, Unavailable)
    | {200: example("diff --git a/x.py b/x.py\n…", "A patch as `git apply` takes it; empty: nothing.", "text/x-diff")},
)
async def get_patch(session_id: SessionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """What a clone has changed since it was made: new and binary files too, without what is in `.git`."""
    patch = await services.children.patch(principal, session_id)
    return Response(patch, media_type="text/x-diff", headers={"X-Content-Type-Options": "nosniff"})


@router.post(
    "/patch/apply",
    response_model=Applied,
    responses=responses(
        SessionNotFound, NoPatch, PatchConflict, FileTooLarge, Unavailable, IdempotencyInFlight, IdempotencyMismatch
    )
    | {200: example({"changed": ["tests/test_auth.py"]}, "All of it was done.")},
)
async def apply_patch(
    request: Request, session_id: SessionId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Do to the parent's files what a clone has done to its own: all of it, or, where it does not fit, nothing."""

    async def make(mark: Mark | None) -> Response:
        return answer({"changed": await services.children.apply(principal, session_id)})

    return await once(request, services, principal, make)
