"""A session's history as a reader wants it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_TURN, Limit, Listing, SessionId, Sought, answer, example, sought
from carrel.errors import SessionNotFound, ValidationFailed
from carrel.protocol.messages import Message

router = APIRouter(prefix="/sessions/{session_id}/messages", tags=["messages"])

_EXAMPLE = [
    {
        "id": "m5",
        "seq": 5,
        "turn_id": EXAMPLE_TURN["id"],
        "role": "user",
        "at": "2026-11-21T09:30:02Z",
        "content": [{"type": "text", "text": "Make the tests pass."}],
        "model": None,
        "parent_tool_use_id": None,
        "complete": True,
    },
    {
        "id": "msg_01",
        "seq": 8,
        "turn_id": EXAMPLE_TURN["id"],
        "role": "assistant",
        "at": "2026-11-21T09:30:05Z",
        "content": [
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "toolu_01", "name": "Bash", "input": {"command": "pytest -q"}},
        ],
        "model": "claude-opus-5-5",
        "parent_tool_use_id": None,
        "complete": True,
    },
]


@router.get(
    "",
    response_model=Listing[Message],
    responses=responses(SessionNotFound, ValidationFailed)
    | {200: example({"data": _EXAMPLE, "next_cursor": None}, "In the order in which they began.")},
)
async def list_messages(
    session_id: SessionId,
    services: ServicesDep,
    principal: PrincipalDep,
    after: Annotated[
        int | None, Query(ge=0, le=2**62, description="Only messages that began after the event of this number.")
    ] = None,
    cursor: Annotated[
        int | None,
        Query(ge=0, le=2**62, description="`next_cursor` of the part before; the larger of it and `after` counts."),
    ] = None,
    limit: Limit = 100,
    turn_id: Annotated[str | None, Query(max_length=64, description="Only those of this turn.")] = None,
    thinking: Annotated[bool, Query(description="With what the agent thought.")] = False,
    q: Sought = None,
) -> Response:
    """The conversation: prompts, answers with their calls of tools, and the tools' results, as whole messages.

    The blocks of one answer are joined. While a turn is at work its last message is not `complete`: read it again, from
    the `seq` of the message before it.
    """
    page = await services.history.messages(
        principal,
        session_id,
        after=max(after or 0, cursor or 0),
        limit=limit,
        turn_id=sought(turn_id),
        thinking=thinking,
        text=sought(q),
    )
    following = None if page.next_after is None else str(page.next_after)
    return answer({"data": page.items, "next_cursor": following})
