"""Environments: write a version, list, get, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query
from starlette.responses import Response

from carrel.api.dependencies import AdminDep, ServicesDep, UnboundDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, Listing, answer, example
from carrel.errors import (
    BoundToSession,
    EnvironmentFixed,
    EnvironmentInUse,
    EnvironmentNotFound,
    InvalidCursor,
    ValidationFailed,
)
from carrel.model import Principal
from carrel.protocol.environments import ENVIRONMENT_NAME, Environment, EnvironmentSpec, EnvironmentStatus

router = APIRouter(prefix="/environments", tags=["environments"])

EnvironmentId = Annotated[str, Path(max_length=64, description="The environment's name.")]
NewEnvironmentId = Annotated[str, Path(pattern=ENVIRONMENT_NAME, description="The environment's name.")]

_SPEC = {
    "description": "Where pull requests are looked at.",
    "sandbox": {"network": "gateway-only"},
    "options": {"model": "sonnet", "permission_mode": "acceptEdits", "tools": ["Read", "Grep", "Glob"]},
    "limits": {"max_sessions_per_user": 5, "session_budget": {"max_usd": 2}},
    "allowed_roles": ["user"],
}
_EXAMPLE = {
    "name": "dev",
    "version": 3,
    "spec": _SPEC,
    "created_at": "2026-11-21T09:30:00Z",
    "created_by": "admin",
}

_STATUS = {
    "name": "dev",
    "version": 3,
    "running": True,
    "warm_wanted": 2,
    "warm": 1,
    "starting": 1,
    "sessions": 12,
    "live_sessions": 4,
    "problems": [
        {"code": "mcp_server_missing", "message": "The command of the MCP server files is not in the sandbox."}
    ],
}


def told(environment: Environment, principal: Principal) -> dict[str, Any]:
    """The environment as the caller may see it, without what nobody has named."""
    spec = environment.spec if principal.is_admin else environment.spec.without_inner_facts()
    return environment.model_dump(mode="json") | {"spec": spec.model_dump(mode="json", exclude_defaults=True)}


@router.put(
    "/{environment_id}",
    response_model=Environment,
    responses=responses(ValidationFailed)
    | {
        200: example(_EXAMPLE, "It says this already; no version was made."),
        201: example(_EXAMPLE, "The new version."),
    },
)
async def write_environment(
    environment_id: NewEnvironmentId,
    services: ServicesDep,
    principal: AdminDep,
    body: Annotated[EnvironmentSpec, Body(examples=[_SPEC])],
) -> Response:
    """Write an environment: the body is the whole of its next version. Sessions keep the version they have. Needs `admin`."""
    environment, new = await services.environments.put(principal, environment_id, body)
    if new:
        services.secrets.say(environment)
    return answer(told(environment, principal), status=201 if new else 200)


@router.get(
    "",
    response_model=Listing[Environment],
    responses=responses(BoundToSession, InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "In the order of their names.")},
)
async def list_environments(
    services: ServicesDep, principal: UnboundDep, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """The environments that you may open sessions in, each in its newest version."""
    page = await services.environments.page(principal, cursor=cursor, limit=limit)
    return answer({"data": [told(each, principal) for each in page.items], "next_cursor": page.next_cursor})


@router.get(
    "/{environment_id}",
    response_model=Environment,
    responses=responses(BoundToSession, EnvironmentNotFound) | {200: example(_EXAMPLE)},
)
async def get_environment(
    environment_id: EnvironmentId,
    services: ServicesDep,
    principal: UnboundDep,
    version: Annotated[int | None, Query(ge=0, le=10**9, description="Which version; default: the newest.")] = None,
) -> Response:
    """One environment, in its newest version or another."""
    return answer(told(await services.environments.get(principal, environment_id, version), principal))


@router.get(
    "/{environment_id}/versions",
    response_model=Listing[Environment],
    responses=responses(BoundToSession, EnvironmentNotFound)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Newest first.")},
)
async def list_environment_versions(
    environment_id: EnvironmentId, services: ServicesDep, principal: UnboundDep
) -> Response:
    """Every version of an environment, newest first."""
    found = await services.environments.versions(principal, environment_id)
    return answer({"data": [told(each, principal) for each in found], "next_cursor": None})


@router.get(
    "/{environment_id}/status",
    response_model=EnvironmentStatus,
    responses=responses(BoundToSession, EnvironmentNotFound) | {200: example(_STATUS)},
)
async def get_environment_status(
    environment_id: EnvironmentId, services: ServicesDep, principal: UnboundDep
) -> Response:
    """How an environment does: whether it takes prompts, its warm pool, its sessions, and what is wrong with it."""
    return answer((await services.life.status(principal, environment_id)).model_dump(mode="json"))


@router.post(
    "/{environment_id}/start",
    response_model=EnvironmentStatus,
    responses=responses(EnvironmentNotFound) | {200: example(_STATUS)},
)
async def start_environment(environment_id: EnvironmentId, services: ServicesDep, principal: AdminDep) -> Response:
    """Have an environment take prompts, as a new one does; its warm pool is filled. Needs `admin`."""
    return answer((await services.life.start(principal, environment_id)).model_dump(mode="json"))


@router.post(
    "/{environment_id}/stop",
    response_model=EnvironmentStatus,
    responses=responses(EnvironmentNotFound) | {200: example(_STATUS | {"running": False, "warm": 0, "starting": 0})},
)
async def stop_environment(environment_id: EnvironmentId, services: ServicesDep, principal: AdminDep) -> Response:
    """Have an environment take no more prompts; those it has taken are answered. Needs `admin`."""
    return answer((await services.life.stop(principal, environment_id)).model_dump(mode="json"))


@router.delete(
    "/{environment_id}", status_code=204, responses=responses(EnvironmentNotFound, EnvironmentFixed, EnvironmentInUse)
)
async def delete_environment(environment_id: EnvironmentId, services: ServicesDep, principal: AdminDep) -> Response:
    """Delete an environment with all of its versions. Sessions that are in it are deleted or moved first. Needs `admin`."""
    await services.environments.delete(environment_id)
    return Response(status_code=204)
