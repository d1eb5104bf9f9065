"""What a session's sandboxes may reach beside the gateway, and what they asked for."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, SessionId, answer, example
from carrel.errors import InvalidCursor, SessionNotFound, ValidationFailed
from carrel.model import GivenNetwork

router = APIRouter(prefix="/sessions", tags=["sessions"])


class Asked(BaseModel):
    """What was asked for, with what verdict, and how often."""

    host: str = Field(description="The name as it was asked for; `*`: the rest, where there were too many.")
    port: int = Field(description="0 where there was none.")
    verdict: Literal["allowed", "refused"]
    reason: str = Field(description="A stable word, such as `listed`, `not_listed`, `private_address`.")
    count: int
    first_at: datetime
    last_at: datetime


class NetworkReport(BaseModel):
    """What a session's sandboxes may reach, and what they asked for."""

    policy: GivenNetwork = Field(description="Of the running sandbox, or else of the next one.")
    recorded: bool = Field(description="False with `open`: what is asked for then passes nobody who could record it.")
    data: Annotated[list[Asked], Field(description="What was first asked for last stands at the front.")]
    next_cursor: str | None = Field(description="Asks for the next part; null at the end.")


_EXAMPLE: dict[str, Any] = {
    "policy": {"allow": ["packages.example.org", "*.example.net"]},
    "recorded": True,
    "data": [
        {
            "host": "example.net",
            "port": 443,
            "verdict": "refused",
            "reason": "not_listed",
            "count": 2,
            "first_at": "2026-11-21T09:31:04Z",
            "last_at": "2026-11-21T09:31:05Z",
        },
        {
            "host": "packages.example.org",
            "port": 443,
            "verdict": "allowed",
            "reason": "listed",
            "count": 7,
            "first_at": "2026-11-21T09:30:40Z",
            "last_at": "2026-11-21T09:31:02Z",
        },
    ],
    "next_cursor": None,
}


@router.get(
    "/{session_id}/network",
    response_model=NetworkReport,
    responses=responses(SessionNotFound, InvalidCursor, ValidationFailed) | {200: example(_EXAMPLE, "The record.")},
)
async def get_network(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """What the session's sandboxes may reach beside the gateway, and what they asked for: allowed and refused."""
    if services.settle_network is not None:
        await services.settle_network()
    policy, page = await services.sessions.network(principal, session_id, cursor=cursor, limit=limit)
    asked = [Asked.model_validate(vars(each)).model_dump() for each in page.items]
    report = {"policy": policy, "recorded": policy.mode != "open", "data": asked, "next_cursor": page.next_cursor}
    return answer(report)
