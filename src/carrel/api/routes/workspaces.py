"""Persistent workspaces: make, list, change, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from carrel.api.dependencies import ServicesDep, UnboundDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, Listing, answer, example
from carrel.errors import (
    BoundToSession,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidCursor,
    ValidationFailed,
    WorkspaceExists,
    WorkspaceInUse,
    WorkspaceNotFound,
)
from carrel.model import WORKSPACE_NAME, NamedWorkspace, WorkspaceMode
from carrel.sessions.service import Mark

router = APIRouter(prefix="/workspaces", tags=["workspaces"])

WorkspaceId = Annotated[str, Path(max_length=64, description="The workspace's id.")]

_EXAMPLE = {
    "id": "01980c5e-5f0b-7c3a-9d0e-1a2b3c4d5e6f",
    "name": "shop",
    "mode": "lock",
    "quota_mb": 2048,
    "size_bytes": 73_400_320,
    "created_at": "2026-11-21T09:30:00Z",
    "last_used_at": "2026-11-21T09:31:12Z",
}


class UpdateWorkspace(BaseModel):
    """What is to change."""

    model_config = ConfigDict(extra="forbid")

    mode: WorkspaceMode = Field(
        default=WorkspaceMode.LOCK, description="`lock`: one session works in it at a time, others wait. `share`: any."
    )
    quota_mb: int | None = Field(
        default=None, strict=True, ge=1, le=10**9, description="Mebibytes its files may take; null: no limit."
    )


class CreateWorkspace(UpdateWorkspace):
    """A workspace to be made."""

    name: str = Field(pattern=WORKSPACE_NAME, description="What sessions open it by; one of its kind for its user.")


@router.post(
    "",
    status_code=201,
    response_model=NamedWorkspace,
    responses=responses(BoundToSession, WorkspaceExists, ValidationFailed, IdempotencyInFlight, IdempotencyMismatch)
    | {201: example(_EXAMPLE, "The new workspace.")},
)
async def create_workspace(
    request: Request,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[CreateWorkspace, Body(examples=[{"name": "shop", "quota_mb": 2048}])],
) -> Response:
    """Make a workspace. A session that opens one by a name that is not there makes it too, without a quota."""

    async def make(mark: Mark | None) -> Response:
        made = await services.workspaces.create(principal, body.name, mode=body.mode, quota_mb=body.quota_mb)
        return answer(made, status=201)

    return await once(request, services, principal, make)


@router.get(
    "",
    response_model=Listing[NamedWorkspace],
    responses=responses(BoundToSession, InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Newest first.")},
)
async def list_workspaces(
    services: ServicesDep, principal: UnboundDep, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """Your workspaces; an admin's: everybody's."""
    page = await services.workspaces.page(principal, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/{workspace_id}",
    response_model=NamedWorkspace,
    responses=responses(BoundToSession, WorkspaceNotFound) | {200: example(_EXAMPLE)},
)
async def get_workspace(workspace_id: WorkspaceId, services: ServicesDep, principal: UnboundDep) -> Response:
    """One workspace."""
    return answer(await services.workspaces.get(principal, workspace_id))


@router.patch(
    "/{workspace_id}",
    response_model=NamedWorkspace,
    responses=responses(BoundToSession, WorkspaceNotFound, WorkspaceInUse, ValidationFailed) | {200: example(_EXAMPLE)},
)
async def update_workspace(
    workspace_id: WorkspaceId,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[UpdateWorkspace, Body(examples=[{"mode": "share", "quota_mb": 4096}])],
) -> Response:
    """Change its mode or its quota. Only what is given changes."""
    given = {name: getattr(body, name) for name in body.model_fields_set}
    return answer(await services.workspaces.update(principal, workspace_id, **given))


@router.delete(
    "/{workspace_id}", status_code=204, responses=responses(BoundToSession, WorkspaceNotFound, WorkspaceInUse)
)
async def delete_workspace(workspace_id: WorkspaceId, services: ServicesDep, principal: UnboundDep) -> Response:
    """Delete a workspace for good, with its files and snapshots. Sessions that have it are deleted first."""
    await services.workspaces.delete(principal, workspace_id)
    return Response(status_code=204)
