"""Token counts, derived from sizes: never exact, always plausible, the same for the same request."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from carrel.model_gateway.scripted.conversation import Json
from carrel.model_gateway.scripted.errors import ApiError
from carrel.model_gateway.scripted.steps import Calls, Count, Repeat, Say, Step, Think

BYTES_PER_TOKEN = 4
OPENING_TOKENS = 1
"""What `message_start` reports as made before anything was."""


@dataclass(frozen=True)
class InputTokens:
    """The input side of `usage`: what was read from the cache, written to it, and neither."""

    read: int
    created: int
    plain: int

    @property
    def total(self) -> int:
        """All tokens that went in."""
        return self.read + self.created + self.plain

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """The `usage` object of a message."""
        return {
            "input_tokens": self.plain,
            "cache_creation_input_tokens": self.created,
            "cache_read_input_tokens": self.read,
            "cache_creation": {"ephemeral_5m_input_tokens": self.created, "ephemeral_1h_input_tokens": 0},
            "output_tokens": output_tokens,
            "service_tier": "standard",
        }


def input_tokens(body: Json) -> InputTokens:
    """Count a request. Up to its last cache mark it is cached: read where an earlier request had it, else written."""
    messages = body["messages"]
    head = [body.get("tools") or [], body.get("system") or ""]
    sizes = [_tokens(_json_size(part)) for part in (*head, *messages)]
    marked = [index for index, part in enumerate((*head, *messages)) if _has_cache_mark(part)]
    cached = marked[-1] + 1 if marked else 0
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    seen = min(cached, answers[-1] + len(head)) if answers else 0
    return InputTokens(read=sum(sizes[:seen]), created=sum(sizes[seen:cached]), plain=max(1, sum(sizes[cached:])))


def output_tokens(steps: Iterable[Step]) -> int:
    """Count what an answer says, thinks and calls."""
    return max(1, _tokens(sum(map(_step_size, steps))))


def _step_size(step: Step) -> int:
    match step:
        case Say(text) | Think(text):
            return len(text.encode("utf-8", "replace"))
        case Count(to=to):
            first_numbers: list[int] = [10**digits for digits in range(len(str(to)))]
            return sum(to - first + 1 for first in first_numbers) + to
        case Repeat(size_bytes=size):
            return size
        case Calls(calls):
            return sum(len(call.name) + len(json.dumps(call.input)) for call in calls)
    return 0


def _json_size(part: Any) -> int:
    try:
        return len(json.dumps(part, ensure_ascii=False).encode()) if part else 0
    except UnicodeEncodeError:
        raise ApiError(400, "The request body is not valid JSON: a surrogate stands alone in a string") from None


def _tokens(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


def _has_cache_mark(part: Any) -> bool:
    if isinstance(part, dict):
        part = part.get("content")
    return isinstance(part, list) and any(isinstance(block, dict) and block.get("cache_control") for block in part)
