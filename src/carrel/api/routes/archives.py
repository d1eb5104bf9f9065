"""A session's workspace as an archive, up and down."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import SessionId, answer, example
from carrel.errors import (
    ArchiveInvalid,
    ArchiveTooLarge,
    FileNotFound,
    FileTooLarge,
    InvalidPath,
    PathConflict,
    SessionNotFound,
    TurnAtWork,
    Unavailable,
    WorkspaceOverQuota,
)
from carrel.workspaces import ArchiveFormat

router = APIRouter(prefix="/sessions/{session_id}/archive", tags=["files"])

_MEDIA_TYPES: dict[ArchiveFormat, str] = {
    "tar.gz": "application/gzip",
    "tar.zst": "application/zstd",
    "tar": "application/x-tar",
    "zip": "application/zip",
}
_BYTES = {"schema": {"type": "string", "format": "binary"}}


class UnpackedArchive(BaseModel):
    """What came of an archive."""

    members: int = Field(description="How many files, folders and links it held.")
    bytes: int = Field(description="What its files hold.")
    links_left_out: int = Field(description="Links that lead out of the folder, where those were to be left out.")


Folder = Annotated[str, Query(max_length=4096, description="A folder of the workspace; empty: the workspace itself.")]
_EXAMPLE = {"members": 42, "bytes": 1_048_576, "links_left_out": 0}


@router.put(
    "",
    response_model=UnpackedArchive,
    responses=responses(
        SessionNotFound,
        TurnAtWork,
        InvalidPath,
        PathConflict,
        ArchiveInvalid,
        ArchiveTooLarge,
        FileTooLarge,
        WorkspaceOverQuota,
        Unavailable,
    )
    | {200: example(_EXAMPLE)},
    openapi_extra={
        "requestBody": {
            "content": {"application/octet-stream": _BYTES},
            "description": "A tar (plain, with gzip or zstd) or a zip, told apart by how it begins.",
            "required": True,
        }
    },
)
async def upload_archive(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    path: Folder = "",
    links: Annotated[
        Literal["refuse", "leave-out"],
        Query(description="What becomes of an archive with symbolic links that lead out of the folder."),
    ] = "refuse",
) -> Response:
    """Unpack an archive into the workspace. What it does not name stays; 409 while a turn waits or is at work."""
    done = await services.archives.unpack(
        principal, session_id, request.stream(), path=path, leave_out_links=links == "leave-out"
    )
    return answer({"members": done.members, "bytes": done.bytes, "links_left_out": done.links_left_out})


def _content() -> dict[str, Any]:
    return {"description": "The archive.", "content": dict.fromkeys(_MEDIA_TYPES.values(), _BYTES)}


@router.get(
    "",
    response_class=StreamingResponse,
    responses=responses(SessionNotFound, FileNotFound, InvalidPath, PathConflict, ArchiveTooLarge, Unavailable)
    | {200: _content()},
)
async def download_archive(
    request: Request,
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    path: Annotated[str, Query(max_length=4096, description="One entry of it; empty: the whole workspace.")] = "",
    format: Annotated[
        ArchiveFormat | None, Query(description="Default: as `Accept` says, and `tar.gz` where that says nothing.")
    ] = None,
) -> Response:
    """The workspace as an archive, while its agent may be at work. Symbolic links stand in it as they are."""
    chosen = format or _accepted(request.headers.get("accept", ""))
    chunks = await services.archives.pack(principal, session_id, chosen, path=path)
    headers = {
        "Content-Disposition": f'attachment; filename="workspace.{chosen}"',
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(chunks, media_type=_MEDIA_TYPES[chosen], headers=headers)


def _accepted(accept: str) -> ArchiveFormat:
    wanted = [each.partition(";")[0].strip().lower() for each in accept.split(",")]
    return next((form for form, media_type in _MEDIA_TYPES.items() if media_type in wanted), "tar.gz")
