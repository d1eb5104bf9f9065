"""How many tokens a model request may come to at most, read from its body before it is sent.

No token is shorter than a byte, so a text has at most as many tokens as bytes of UTF-8: true of every text and every
tokeniser, and some four times what prose has. What has been counted is not guessed again: when an answer says how
many tokens its request had, that number holds for the same beginning of every later request, and bytes are counted only
for what has been added since. Images and pages count as their documented maximum.
"""

from __future__ import annotations

import binascii
import json
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

__all__ = ["Counted", "ModelRequest"]

IMAGE_TOKENS = 4_784
"""The documented maximum of an image, of the models that see the largest ones."""
PAGE_TOKENS = 3_000 + IMAGE_TOKENS
"""The documented maximum of a page of a PDF: its text, and its image."""
MOST_PAGES = 600
"""The documented maximum of a PDF's pages."""
SERVER_TOOL_TOKENS = 10_000
"""Held for each use of a tool that the upstream runs by itself; what such a tool reads cannot be known."""
FRAME_TOKENS = 1_024
"""What the upstream adds by itself: the prompt that explains tools, and what frames each message."""
LARGEST_CONTEXT = 1_000_000
"""No model reads more."""
LEAST_MAX_TOKENS = 1_024
"""`max_tokens` is not lowered below this."""

_SERVER_TOOL_USES = 10
_SERVER_TOOLS = ("web_search_", "web_fetch_", "code_execution_", "tool_search_", "advisor_")
_NOT_INPUT = frozenset(
    {"messages", "max_tokens", "stream", "metadata", "temperature", "top_p", "top_k", "service_tier"}
)
_ONE_HOUR = re.compile(rb'"ttl"\s*:\s*"1h"')
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")


@dataclass(frozen=True)
class ModelRequest:
    """What a body of the Messages API asks for."""

    body: dict[str, Any] = field(repr=False)
    model: str
    max_tokens: int
    one_hour: bool
    """Whether any of it may be written to the cache for an hour."""
    sizes: tuple[int, ...]
    """Tokens at most: of all that stands before the messages, then of each message."""
    digests: tuple[bytes, ...] = field(repr=False)
    """Of what goes in, up to the same places."""

    @classmethod
    def read(cls, data: bytes) -> ModelRequest | None:
        """Read a body; None where it is none that any model would answer."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            return None
        model, most = body.get("model"), body.get("max_tokens")
        if not isinstance(model, str) or isinstance(most, bool) or not isinstance(most, int) or most < 1:
            return None
        head = {name: _plain(value) for name, value in body.items() if name not in _NOT_INPUT}
        sizes, digests = [], []
        digest = sha256()
        for part in (head, *map(_plain, body["messages"])):
            text = json.dumps(part, ensure_ascii=False).encode("utf-8", "surrogatepass")
            digest.update(text)
            digests.append(digest.digest())
            blobs, tokens = _media(part)
            sizes.append(len(text) - blobs + tokens)
        sizes[0] += FRAME_TOKENS + _server_tools(body.get("tools"))
        one_hour = _ONE_HOUR.search(data) is not None
        return cls(body, model, most, one_hour, tuple(sizes), tuple(digests))

    @property
    def least_max_tokens(self) -> int:
        """The smallest `max_tokens` that still makes sense: an answer, after the thinking that is asked for."""
        thinking = self.body.get("thinking")
        budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
        least = max(LEAST_MAX_TOKENS, budget + 1 if isinstance(budget, int) else 0)
        return min(least, self.max_tokens)

    def with_max_tokens(self, max_tokens: int) -> bytes:
        """The body with another `max_tokens`."""
        return json.dumps(self.body | {"max_tokens": max_tokens}).encode()


class Counted:
    """How many tokens the beginnings of earlier requests had at most. Forgotten, it costs only closeness."""

    def __init__(self, most: int = 20_000) -> None:
        """Remember up to so many beginnings."""
        self._most = most
        self._tokens: OrderedDict[bytes, int] = OrderedDict()

    def bound(self, request: ModelRequest) -> int:
        """The most tokens that can go in."""
        rest = 0
        for size, digest in zip(reversed(request.sizes), reversed(request.digests), strict=True):
            known = self._tokens.get(digest)
            if known is not None:
                self._tokens.move_to_end(digest)
                return min(known + rest, LARGEST_CONTEXT)
            rest += size
        return min(rest, LARGEST_CONTEXT)

    def learn(self, request: ModelRequest, input_tokens: int) -> None:
        """The request had so many tokens; hence so did what stands before its messages, at most."""
        for digest in (request.digests[0], request.digests[-1]):
            self._tokens[digest] = min(input_tokens, self._tokens.get(digest, input_tokens))
            self._tokens.move_to_end(digest)
        while len(self._tokens) > self._most:
            self._tokens.popitem(last=False)


def _plain(part: Any) -> Any:
    """Without the marks of the cache, which move from request to request and are no input."""
    if isinstance(part, dict):
        rest = {name: value for name, value in part.items() if name != "cache_control"}
        if isinstance(rest.get("content"), list):
            rest["content"] = _plain(rest["content"])
        elif isinstance(rest.get("content"), str):
            # A text that bears no mark is written without a block around it.
            rest["content"] = [{"type": "text", "text": rest["content"]}]
        return rest
    if isinstance(part, list):
        return [_plain(item) for item in part]
    return part


def _media(part: Any) -> tuple[int, int]:
    """Of all images and documents in it: the characters of their data, and their tokens at most."""
    if isinstance(part, list):
        found = [_media(item) for item in part]
        return sum(blob for blob, _ in found), sum(tokens for _, tokens in found)
    if not isinstance(part, dict):
        return 0, 0
    source = part.get("source")
    if not isinstance(source, dict) or part.get("type") not in ("image", "document"):
        return _media(part.get("content"))
    if part["type"] == "document" and source.get("type") in ("text", "content"):
        return _media(source.get("content"))
    data = source.get("data")
    blob = data if isinstance(data, str) and source.get("type") == "base64" else ""
    tokens = IMAGE_TOKENS if part["type"] == "image" else _pages(blob) * PAGE_TOKENS
    return len(blob), tokens


def _pages(data: str) -> int:
    """The pages of a PDF at most."""
    try:
        raw = binascii.a2b_base64(data)
    except (ValueError, UnicodeEncodeError):
        return MOST_PAGES
    # In object streams pages are compressed, and nothing else says how many there are.
    if not raw.startswith(b"%PDF") or b"/ObjStm" in raw:
        return MOST_PAGES
    return min(MOST_PAGES, len(_PAGE.findall(raw)) or MOST_PAGES)


def _server_tools(tools: Any) -> int:
    found = 0
    for tool in tools if isinstance(tools, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind.startswith(_SERVER_TOOLS):
            uses = tool.get("max_uses")
            found += SERVER_TOOL_TOKENS * (uses if isinstance(uses, int) and uses >= 0 else _SERVER_TOOL_USES)
    return found
