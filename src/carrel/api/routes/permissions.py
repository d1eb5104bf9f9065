"""Rules about calls of tools, and what would become of a call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Request, status
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep, UnboundDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_SESSION, Cursor, Limit, Listing, SessionId, answer, example
from carrel.errors import (
    BoundToSession,
    EnvironmentForbids,
    EnvironmentNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidCursor,
    MissingScope,
    RuleNotFound,
    SessionNotFound,
    ValidationFailed,
    WorkspaceNotFound,
)
from carrel.model import PermissionRule, RuleScope
from carrel.protocol.permissions import Rule
from carrel.protocol.spec import NoNul
from carrel.sessions.rules import PermissionVerdict
from carrel.sessions.service import Mark

router = APIRouter(tags=["permissions"])

RuleId = Annotated[str, Path(max_length=64, description="The rule's id.")]

_EXAMPLE = {
    "id": "01980c5e-7a10-7d11-8f00-5a4b3c2d1e0f",
    "scope": "session",
    "target": EXAMPLE_SESSION["id"],
    "effect": "allow",
    "rule": "Bash(git push origin main)",
    "interaction_id": None,
    "created_by": "key:01980c5e-0000-7000-8000-000000000000",
    "created_at": "2026-11-21T09:41:00Z",
}
_VERDICT = {
    "decision": "ask",
    "reason": "an ask rule",
    "rule": "Bash(git push *)",
    "layer": "environment",
    "rule_id": None,
    "mode": "default",
}


class CreateRule(BaseModel):
    """A rule to write."""

    model_config = ConfigDict(extra="forbid")

    scope: RuleScope = Field(description="What it holds for; `environment`: for admins alone.")
    target: NoNul | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="The id of the session, workspace or user, or the environment's name. Of a user: null for the caller.",
    )
    effect: Literal["allow", "ask", "deny"]
    rule: Rule = Field(description="In Claude Code's syntax, such as `Bash(git push *)`.")


class CheckPermission(BaseModel):
    """A call that might be made."""

    model_config = ConfigDict(extra="forbid")

    tool: NoNul = Field(min_length=1, max_length=255, description="The tool's name, such as `Bash`.")
    input: dict[str, Any] = Field(default_factory=dict, description="What it would be called with.")


@router.get(
    "/permissions/rules",
    response_model=Listing[PermissionRule],
    responses=responses(InvalidCursor, BoundToSession, ValidationFailed)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Oldest first.")},
)
async def list_rules(
    services: ServicesDep,
    principal: UnboundDep,
    scope: Annotated[RuleScope | None, Query(description="Only those that hold for such things.")] = None,
    target: Annotated[str | None, Query(max_length=128, description="Only those that hold for this one.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """The rules that the caller has written, by themselves or by an answer with `remember`: everybody's for an admin."""
    page = await services.rules.page(principal, scope=scope, target=target, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.post(
    "/permissions/rules",
    response_model=PermissionRule,
    status_code=status.HTTP_201_CREATED,
    responses=responses(
        SessionNotFound,
        WorkspaceNotFound,
        EnvironmentNotFound,
        MissingScope,
        BoundToSession,
        EnvironmentForbids,
        ValidationFailed,
        IdempotencyInFlight,
        IdempotencyMismatch,
    )
    | {201: example(_EXAMPLE, "The rule holds.")},
)
async def create_rule(
    request: Request,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[CreateRule, Body(examples=[{"scope": "user", "effect": "deny", "rule": "WebFetch"}])],
) -> Response:
    """Write a rule for a session, a persistent workspace, a user or an environment. Agents are told at once."""

    async def write(mark: Mark | None) -> Response:
        made = await services.rules.create(
            principal, scope=body.scope, target=body.target, effect=body.effect, rule=body.rule
        )
        return answer(made, status=201)

    return await once(request, services, principal, write)


@router.delete(
    "/permissions/rules/{rule_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=responses(RuleNotFound, BoundToSession),
)
async def delete_rule(rule_id: RuleId, services: ServicesDep, principal: UnboundDep) -> Response:
    """Revoke a rule. Agents are told at once."""
    await services.rules.delete(principal, rule_id)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


@router.post(
    "/sessions/{session_id}/permissions/check",
    response_model=PermissionVerdict,
    responses=responses(SessionNotFound, ValidationFailed) | {200: example(_VERDICT, "What would become of it.")},
)
async def check_permission(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[CheckPermission, Body(examples=[{"tool": "Bash", "input": {"command": "git push origin main"}}])],
) -> Response:
    """What would become of a call of a tool in this session, and why. Nothing happens, and nobody is asked."""
    return answer(await services.rules.check(principal, session_id, tool=body.tool, given=body.input))
