"""The files of a session's workspace."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse

from carrel.api.dependencies import PrincipalDep, Services, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, Listing, SessionId, answer, example
from carrel.errors import (
    FileNotFound,
    FileTooLarge,
    InvalidCursor,
    InvalidPath,
    NotAFile,
    PathConflict,
    SessionNotFound,
    WorkspaceOverQuota,
)
from carrel.model import Principal
from carrel.workspaces import FileEntry, WorkspaceFiles

router = APIRouter(prefix="/sessions/{session_id}/files", tags=["files"])

_CHUNK_BYTES = 256 * 1024
_QUEUED_CHUNKS = 8

FilePath = Annotated[str, Path(description="Within the workspace. Bytes that are not UTF-8 are written `\\xE9`.")]


class File(BaseModel):
    """A file, a directory, or something else in the workspace."""

    path: str
    type: str
    size: int
    modified_at: datetime
    mode: int


_EXAMPLE = {
    "path": "src/main.py",
    "type": "file",
    "size": 1204,
    "modified_at": "2026-11-21T09:31:00Z",
    "mode": 0o644,
}


def _shown(entry: FileEntry) -> dict[str, object]:
    return {name: getattr(entry, name) for name in File.model_fields}


async def _files(services: Services, principal: Principal, session_id: str) -> WorkspaceFiles:
    return await services.sessions.files(await services.sessions.get(principal, session_id))


@router.get(
    "",
    response_model=Listing[File],
    responses=responses(SessionNotFound, InvalidPath, FileNotFound, InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "In the order of their paths.")},
)
async def list_files(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    path: Annotated[str, Query(description="Only what is below this directory.")] = "",
    recursive: Annotated[bool, Query(description="Whether directories in it are listed too.")] = True,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """The tree of the workspace. Symbolic links are shown and never followed."""
    files = await _files(services, principal, session_id)
    after = _path_of(cursor) if cursor is not None else None
    entries: list[FileEntry] = await services.sessions.run_blocking(
        lambda: files.tree(path, limit=limit + 1, after=after, recursive=recursive)
    )
    following = _cursor_of(entries[limit - 1].path) if len(entries) > limit else None
    return answer({"data": [_shown(entry) for entry in entries[:limit]], "next_cursor": following})


def _cursor_of(path: str) -> str:
    return base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")


def _path_of(cursor: str) -> str:
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise InvalidCursor from error


@router.get(
    "/{path:path}",
    response_class=StreamingResponse,
    responses=responses(SessionNotFound, FileNotFound, InvalidPath, NotAFile, PathConflict)
    | {200: {"description": "The file's bytes.", "content": {"application/octet-stream": {}}}},
)
async def read_file(session_id: SessionId, path: FilePath, services: ServicesDep, principal: PrincipalDep) -> Response:
    """A file's bytes."""
    files = await _files(services, principal, session_id)
    file: BinaryIO = await services.sessions.run_blocking(files.open_read, path)
    size = file.seek(0, 2)
    file.seek(0)
    headers = {
        "Content-Length": str(size),
        "Content-Disposition": "attachment",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(_read(services, file, size), media_type="application/octet-stream", headers=headers)


async def _read(services: Services, file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    """Exactly `size` bytes: the agent may be changing the file at this moment."""
    try:
        left = size
        while left > 0:
            data: bytes = await services.sessions.run_blocking(file.read, min(left, _CHUNK_BYTES))
            if not data:
                return
            left -= len(data)
            yield data
    finally:
        file.close()


@router.put(
    "/{path:path}",
    response_model=File,
    responses=responses(SessionNotFound, InvalidPath, PathConflict, FileTooLarge, WorkspaceOverQuota)
    | {200: example(_EXAMPLE)},
    openapi_extra={
        "requestBody": {
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            "description": "The content; without any, an empty file.",
            "required": False,
        }
    },
)
async def write_file(
    request: Request, session_id: SessionId, path: FilePath, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Write a file, whole or not at all; directories on the way to it are made."""
    files = await _files(services, principal, session_id)
    session = await services.sessions.get(principal, session_id)
    room = await services.workspaces.room(session)
    most = services.max_file_bytes if room is None else min(room, services.max_file_bytes)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUED_CHUNKS)
    whole = False

    def chunks() -> Iterator[bytes]:
        while (chunk := asyncio.run_coroutine_threadsafe(queue.get(), loop).result()) is not None:
            yield chunk
        if not whole:
            raise ConnectionError("the client went away")

    write = asyncio.ensure_future(services.sessions.run_blocking(lambda: files.write(path, chunks(), max_bytes=most)))
    try:
        async for chunk in request.stream():
            if chunk and not await _put(queue, chunk, write):
                break
        whole = True
    finally:
        await _put(queue, None, write)
    try:
        written = await write
    except FileTooLarge:
        if room is None or room > most:
            raise
        raise WorkspaceOverQuota(room_bytes=room) from None
    return answer(_shown(written))


async def _put(queue: asyncio.Queue[bytes | None], chunk: bytes | None, write: asyncio.Future[FileEntry]) -> bool:
    """Hand a chunk to the writing thread. False when it has ended and takes no more."""
    if write.done():
        return False
    putting = asyncio.ensure_future(queue.put(chunk))
    both: set[asyncio.Future[Any]] = {putting, write}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not putting.done():
        putting.cancel()
        return False
    return True


@router.delete(
    "/{path:path}",
    status_code=204,
    responses=responses(SessionNotFound, FileNotFound, InvalidPath, PathConflict),
)
async def delete_file(
    session_id: SessionId, path: FilePath, services: ServicesDep, principal: PrincipalDep
) -> Response:
    """Delete a file, a link, or a directory with all that is in it."""
    files = await _files(services, principal, session_id)
    await services.sessions.run_blocking(files.delete, path)
    await services.workspaces.measure(await services.sessions.get(principal, session_id))
    return Response(status_code=204)
