"""Parts that the routes' requests and answers share."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.responses import Response

from carrel.errors import ValidationFailed

T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]
Cursor = Annotated[str | None, Query(max_length=4096, description="`next_cursor` of the part before.")]
SessionId = Annotated[str, Path(max_length=64, description="The session's id.")]
TurnId = Annotated[str, Path(max_length=64, description="The turn's id.")]

Sought = Annotated[
    str | None, Query(min_length=1, max_length=1000, description="Only with this text, in any case of letters.")
]


def sought(text: str | None) -> str | None:
    """A text as a database takes it. Raises ValidationFailed where none can have it."""
    if text is not None and ("\x00" in text or (not text.isascii() and not _is_unicode(text))):
        raise ValidationFailed("A text that is looked for must be Unicode without NUL characters.")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate stands alone
        return False
    return True


class Listing(BaseModel, Generic[T]):
    """A part of a list."""

    data: list[T]
    next_cursor: str | None = Field(description="Asks for the next part; null at the end.")


def answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """The value as JSON."""
    return Response(to_json(value), status_code=status, media_type="application/json", headers=headers)


EXAMPLE_SESSION = {
    "id": "01980c5e-5f0b-7c3a-9d0e-0d3c7f1f9a10",
    "status": "idle",
    "stop_reason": "end_turn",
    "title": "Fix the tests",
    "spec": {"model": "opus"},
    "workspace": {"type": "ephemeral"},
    "metadata": {"ticket": 42},
    "environment": "default",
    "environment_version": 0,
    "forked_from": None,
    "parent_id": None,
    "root_id": None,
    "depth": 0,
    "birth": None,
    "last_seq": 12,
    "turn_count": 1,
    "usage": {
        "input_tokens": 812,
        "output_tokens": 96,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 15000,
    },
    "cost_usd": 0.0082,
    "budget": {"max_usd": 5.0, "max_tokens": None},
    "error": None,
    "created_at": "2026-11-21T09:30:00Z",
    "last_active_at": "2026-11-21T09:31:12Z",
    "ttl_seconds": None,
    "expires_at": None,
}
EXAMPLE_TURN = {
    "id": "01980c5e-6a31-7b10-8a55-1f0a3b7f22c4",
    "session_id": EXAMPLE_SESSION["id"],
    "number": 1,
    "origin": "prompt",
    "status": "queued",
    "stop_reason": None,
    "error": None,
    "structured_output": None,
    "usage": {
        "input_tokens": 0,
        "output_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    },
    "cost_usd": None,
    "num_turns": 0,
    "duration_ms": None,
    "created_at": "2026-11-21T09:30:02Z",
    "started_at": None,
    "ended_at": None,
    "expires_at": None,
    "deadline_at": None,
}
EXAMPLE_RESULT = {
    "id": EXAMPLE_TURN["id"],
    "session_id": EXAMPLE_SESSION["id"],
    "status": "succeeded",
    "stop_reason": "end_turn",
    "text": "All 14 tests pass now.",
    "structured_output": None,
    "tool_calls": [
        {
            "id": "toolu_01",
            "tool": "Bash",
            "input": {"command": "pytest -q"},
            "result": "14 passed in 0.52s",
            "is_error": False,
        }
    ],
    "error": None,
    "usage": EXAMPLE_SESSION["usage"],
    "cost_usd": 0.0082,
    "duration_ms": 8123,
    "num_turns": 2,
}
EXAMPLE_DETAIL = EXAMPLE_TURN | EXAMPLE_RESULT
EXAMPLE_EVENT = {
    "seq": 9,
    "type": "message.assistant",
    "turn_id": EXAMPLE_TURN["id"],
    "at": "2026-11-21T09:31:11Z",
    "data": {
        "message_id": "msg_01",
        "block": 0,
        "text": "All 14 tests pass now.",
        "model": "claude-opus-5-5",
        "parent_tool_use_id": None,
    },
}


def example(value: Any, description: str = "Done.", media_type: str = "application/json") -> dict[str, Any]:
    """An OpenAPI response with an example."""
    return {"description": description, "content": {media_type: {"example": value}}}
