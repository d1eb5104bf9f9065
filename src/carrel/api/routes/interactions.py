"""Interactions: what agents ask people, and the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_TURN, Cursor, Limit, Listing, SessionId, answer, example
from carrel.errors import (
    EnvironmentForbids,
    Forbidden,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InteractionChanged,
    InteractionExpired,
    InteractionNotFound,
    InteractionResolved,
    InvalidCursor,
    MissingScope,
    SessionNotFound,
    ValidationFailed,
)
from carrel.model import Interaction, InteractionStatus, PermissionMode, RuleScope
from carrel.sessions.service import Mark

router = APIRouter(tags=["interactions"])

InteractionId = Annotated[str, Path(max_length=64, description="The interaction's id.")]
Status = Annotated[InteractionStatus | None, Query(description="Only those of this status.")]

_EXAMPLE = {
    "id": "01980c5e-6a10-7d11-8f00-5a4b3c2d1e0f",
    "session_id": EXAMPLE_TURN["session_id"],
    "root_session_id": EXAMPLE_TURN["session_id"],
    "turn_id": EXAMPLE_TURN["id"],
    "kind": "permission",
    "title": "Bash: git push origin main",
    "tool": "Bash",
    "tool_use_id": "toolu_01",
    "input": {"command": "git push origin main"},
    "input_digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "reason": "an ask rule: Bash(git push *)",
    "suggestions": ["Bash(git push origin main)"],
    "options": [
        {"label": "Yes", "answer": {"decision": "allow"}},
        {"label": "Yes, and the same again in this session", "answer": {"decision": "allow", "remember": "session"}},
        {"label": "No", "answer": {"decision": "deny"}},
    ],
    "status": "pending",
    "answer": None,
    "answered_by": None,
    "created_at": "2026-11-21T09:30:05Z",
    "expires_at": None,
    "remind_at": None,
    "resolved_at": None,
}
_ANSWERED = _EXAMPLE | {
    "status": "answered",
    "answer": {"decision": "allow"},
    "answered_by": "key:01980c5e-0000-7000-8000-000000000000",
    "resolved_at": "2026-11-21T09:41:00Z",
}


class AnswerInteraction(BaseModel):
    """What a person says."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["allow", "deny"]
    updated_input: dict[str, Any] | None = Field(
        default=None, description="With `allow`: what the tool is called with instead of `input`."
    )
    answers: dict[str, str] | None = Field(
        default=None, description="Of a question: the answer to each of its questions, by the question's text."
    )
    message: str | None = Field(default=None, max_length=100_000, description="With `deny`: what the agent is told.")
    input_digest: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Of the call that the answer is meant for, as it was shown; for another it is refused.",
    )
    remember: Literal["session", "workspace", "environment"] | None = Field(
        default=None,
        description="Writes the first of `suggestions` as a rule for this, so that such calls are decided the same way; "
        "of an environment, for admins alone.",
    )
    permission_mode: PermissionMode | None = Field(
        default=None, description="Of a plan, with `allow`: the session's mode from here on; default: `default`."
    )
    stop: StrictBool = Field(default=False, description="With `deny`: the turn is interrupted too.")


@router.get(
    "/interactions",
    response_model=Listing[Interaction],
    responses=responses(InvalidCursor, ValidationFailed)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Oldest first.")},
)
async def list_interactions(
    services: ServicesDep,
    principal: PrincipalDep,
    status: Status = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """What waits for the caller in any session, or has: everybody's for an admin."""
    page = await services.interactions.page(principal, status=status, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/sessions/{session_id}/interactions",
    response_model=Listing[Interaction],
    responses=responses(SessionNotFound, InvalidCursor, ValidationFailed)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Oldest first.")},
)
async def list_session_interactions(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    status: Status = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """What this session's agent has asked people."""
    page = await services.interactions.page(principal, session_id=session_id, status=status, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/interactions/{interaction_id}",
    response_model=Interaction,
    responses=responses(InteractionNotFound) | {200: example(_EXAMPLE, "The interaction.")},
)
async def get_interaction(interaction_id: InteractionId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """One interaction."""
    return answer(await services.interactions.get(principal, interaction_id))


@router.post(
    "/interactions/{interaction_id}/answer",
    response_model=Interaction,
    responses=responses(
        InteractionNotFound,
        InteractionResolved,
        InteractionChanged,
        InteractionExpired,
        Forbidden,
        MissingScope,
        EnvironmentForbids,
        ValidationFailed,
        IdempotencyInFlight,
        IdempotencyMismatch,
    )
    | {200: example(_ANSWERED, "The answer counts.")},
)
async def answer_interaction(
    interaction_id: InteractionId,
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[
        AnswerInteraction,
        Body(examples=[{"decision": "allow"}, {"decision": "deny", "message": "Not on a Friday.", "stop": True}]),
    ],
) -> Response:
    """Answer. Of several answers at once exactly one counts; the others get 409, and one that is too late gets 410.

    With `updated_input` the tool is called with that, and the event says who changed it.
    """

    async def give(mark: Mark | None) -> Response:
        resolved = await services.interactions.answer(
            principal,
            interaction_id,
            allow=body.decision == "allow",
            updated_input=body.updated_input,
            answers=body.answers,
            message=body.message,
            stop=body.stop,
            input_digest=body.input_digest,
            remember=None if body.remember is None else RuleScope(body.remember),
            permission_mode=body.permission_mode,
        )
        return answer(resolved)

    return await once(request, services, principal, give)
