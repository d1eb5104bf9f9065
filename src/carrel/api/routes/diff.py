"""What has changed in a session's workspace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import SessionId, answer
from carrel.errors import (
    FileTooLarge,
    NotARepository,
    SessionNotFound,
    SnapshotMissing,
    SnapshotNotFound,
    Unavailable,
    ValidationFailed,
)

router = APIRouter(prefix="/sessions/{session_id}/diff", tags=["snapshots"])

_MOST_CHANGES = 10_000
_EXAMPLE: dict[str, Any] = {
    "snapshot_id": "01980c5e-9b11-7f00-8d3e-2b4c6d8e0f12",
    "changes": [
        {"path": "src/main.py", "kind": "changed", "type": "file", "size_before": 1204, "size_after": 1310},
        {"path": "notes.md", "kind": "added", "type": "file", "size_before": None, "size_after": 88},
    ],
    "truncated": False,
}


@router.get(
    "",
    responses=responses(
        SessionNotFound,
        SnapshotNotFound,
        SnapshotMissing,
        NotARepository,
        FileTooLarge,
        ValidationFailed,
        Unavailable,
    )
    | {
        200: {
            "description": "Changes by path; with `kind=git` a patch.",
            "content": {
                "application/json": {"example": _EXAMPLE},
                "text/x-diff": {"example": "diff --git a/x.py b/x.py\n…"},
            },
        }
    },
)
async def get_diff(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    kind: Annotated[
        Literal["files", "git"], Query(description="Since a snapshot, or since git's last commit.")
    ] = "files",
    snapshot: Annotated[str | None, Query(max_length=64, description="Which one; default: the last.")] = None,
) -> Response:
    """What has changed in the files: since a snapshot, by path and size; or since git's last commit, as a patch."""
    session = await services.sessions.get(principal, session_id)
    files = await services.sessions.files(session)
    if kind == "git":
        found = await services.diffs.since_commit(session, files)
        headers = {"X-Carrel-Truncated": str(found.truncated).lower(), "X-Content-Type-Options": "nosniff"}
        return Response(found.patch, media_type="text/x-diff", headers=headers)
    kept, changes = await services.diffs.since_snapshot(session, snapshot)
    shown = [
        {name: getattr(change, name) for name in ("path", "kind", "type", "size_before", "size_after")}
        for change in changes[:_MOST_CHANGES]
    ]
    return answer({"snapshot_id": kept.id, "changes": shown, "truncated": len(changes) > _MOST_CHANGES})
