"""Snapshots of a session's files, and the way back to the end of an earlier turn."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_SESSION, Cursor, Limit, Listing, SessionId, answer, example
from carrel.errors import (
    FilesShared,
    InvalidCursor,
    SessionNotFound,
    SnapshotMissing,
    SnapshotNotFound,
    TurnAtWork,
    TurnNotFinished,
    TurnNotFound,
    TurnRewound,
    Unavailable,
    ValidationFailed,
)
from carrel.model import Session, Snapshot
from carrel.sessions.service import Mark

router = APIRouter(prefix="/sessions/{session_id}", tags=["snapshots"])

SnapshotId = Annotated[str, Path(max_length=64, description="The snapshot's id.")]

_EXAMPLE = {
    "id": "01980c5e-9b11-7f00-8d3e-2b4c6d8e0f12",
    "session_id": EXAMPLE_SESSION["id"],
    "reason": "turn",
    "turn_id": "01980c5e-6a31-7b10-8a55-1f0a3b7f22c4",
    "seq": 12,
    "exact": True,
    "size_bytes": 1_048_576,
    "stored_bytes": 262_144,
    "files": 42,
    "created_at": "2026-11-21T09:31:13Z",
}


class Rewind(BaseModel):
    """Where to go back to: the end of a turn."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"oneOf": [{"required": ["turn_id"]}, {"required": ["seq"]}]}
    )

    turn_id: str | None = Field(default=None, max_length=64, description="The turn that becomes the last one.")
    seq: int | None = Field(
        default=None, strict=True, ge=1, le=2**62, description="In its place: the last turn that had ended by then."
    )
    files: bool = Field(default=True, strict=True, description="Whether the files go back too.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Rewind:
        if (self.turn_id is None) == (self.seq is None):
            raise ValueError("give either turn_id or seq")
        return self


@router.get(
    "/snapshots",
    response_model=Listing[Snapshot],
    responses=responses(SessionNotFound, InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Newest first.")},
)
async def list_snapshots(
    session_id: SessionId, services: ServicesDep, principal: PrincipalDep, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """The snapshots of a session's files. One is taken after each turn that has ended, and before a sandbox goes."""
    page = await services.snapshots.page(principal, session_id, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.post(
    "/snapshots",
    status_code=201,
    response_model=Snapshot,
    responses=responses(SessionNotFound, FilesShared, SnapshotMissing, Unavailable)
    | {201: example(_EXAMPLE | {"reason": "asked", "turn_id": None}, "The new snapshot.")},
)
async def create_snapshot(
    request: Request, session_id: SessionId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Take a snapshot now, be a turn at work or not."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.snapshots.take(principal, session_id), status=201)

    return await once(request, services, principal, make)


@router.post(
    "/snapshots/{snapshot_id}/restore",
    response_model=Session,
    responses=responses(SessionNotFound, SnapshotNotFound, TurnAtWork, FilesShared, Unavailable)
    | {200: example(EXAMPLE_SESSION)},
)
async def restore_snapshot(
    request: Request,
    session_id: SessionId,
    snapshot_id: SnapshotId,
    services: ServicesDep,
    principal: PrincipalDep,
) -> Response:
    """Put the files back to a snapshot. What was made since is removed; the conversation stays as it is."""

    async def make(mark: Mark | None) -> Response:
        return answer(await services.snapshots.restore(principal, session_id, snapshot_id))

    return await once(request, services, principal, make)


@router.post(
    "/rewind",
    response_model=Session,
    responses=responses(
        SessionNotFound,
        TurnNotFound,
        TurnAtWork,
        TurnNotFinished,
        TurnRewound,
        SnapshotMissing,
        FilesShared,
        ValidationFailed,
        Unavailable,
    )
    | {200: example(EXAMPLE_SESSION)},
)
async def rewind_session(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[Rewind, Body(examples=[{"turn_id": "01980c5e-6a31-7b10-8a55-1f0a3b7f22c4"}])],
) -> Response:
    """Go back to the end of a turn: conversation and files together, Bash's writes included. No event is deleted."""

    async def make(mark: Mark | None) -> Response:
        rewound = await services.snapshots.rewind(
            principal, session_id, turn_id=body.turn_id, seq=body.seq, files=body.files
        )
        return answer(rewound)

    return await once(request, services, principal, make)
