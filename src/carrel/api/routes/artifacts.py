"""Artifacts: files that a session publishes, kept as they are at that moment."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Body, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_SESSION, Cursor, Limit, Listing, SessionId, answer, example
from carrel.errors import (
    ArtifactNotFound,
    FileNotFound,
    FileTooLarge,
    InvalidCursor,
    InvalidPath,
    NotAFile,
    PathConflict,
    SessionNotFound,
    Unavailable,
)
from carrel.model import Artifact
from carrel.sessions.service import Mark

router = APIRouter(prefix="/sessions/{session_id}/artifacts", tags=["artifacts"])

ArtifactId = Annotated[str, Path(max_length=64, description="The artifact's id.")]

_EXAMPLE = {
    "id": "01980c5e-a4d2-7a10-9b3f-5c6d7e8f9a0b",
    "session_id": EXAMPLE_SESSION["id"],
    "path": "out/report.pdf",
    "size": 48_211,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": "2026-11-21T09:31:20Z",
}


class Publish(BaseModel):
    """What to publish."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, max_length=16_384, description="A file in the workspace.")


@router.post(
    "",
    status_code=201,
    response_model=Artifact,
    responses=responses(SessionNotFound, FileNotFound, InvalidPath, NotAFile, PathConflict, FileTooLarge, Unavailable)
    | {201: example(_EXAMPLE, "The new artifact.")},
)
async def create_artifact(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[Publish, Body(examples=[{"path": "out/report.pdf"}])],
) -> Response:
    """Publish a file of the workspace: it is kept as it is now, whatever becomes of the file."""

    async def make(mark: Mark | None) -> Response:
        session = await services.sessions.get(principal, session_id)
        files = await services.sessions.files(session)
        return answer(await services.artifacts.publish(session, files, body.path), status=201)

    return await once(request, services, principal, make)


@router.get(
    "",
    response_model=Listing[Artifact],
    responses=responses(SessionNotFound, InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Newest first.")},
)
async def list_artifacts(
    session_id: SessionId, services: ServicesDep, principal: PrincipalDep, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """What the session has published."""
    page = await services.artifacts.page(principal, session_id, cursor=cursor, limit=limit)
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/{artifact_id}",
    response_class=StreamingResponse,
    responses=responses(SessionNotFound, ArtifactNotFound, Unavailable)
    | {200: {"description": "The artifact's bytes.", "content": {"application/octet-stream": {}}}},
)
async def read_artifact(
    session_id: SessionId, artifact_id: ArtifactId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """An artifact's bytes, whose SHA-256 is the `ETag`."""
    artifact, chunks = await services.artifacts.open(principal, session_id, artifact_id)
    name = quote(artifact.path.rpartition("/")[2], safe="")
    headers = {
        "Content-Length": str(artifact.size),
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "ETag": f'"{artifact.sha256}"',
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


@router.delete("/{artifact_id}", status_code=204, responses=responses(SessionNotFound, ArtifactNotFound))
async def delete_artifact(
    session_id: SessionId, artifact_id: ArtifactId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Delete an artifact for good."""
    await services.artifacts.delete(principal, session_id, artifact_id)
    return Response(status_code=204)
