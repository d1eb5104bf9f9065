"""What a request may come to at most is never less than what it comes to, and as close as is known."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.model_gateway.bounds import (
    FRAME_TOKENS,
    IMAGE_TOKENS,
    LARGEST_CONTEXT,
    MOST_PAGES,
    PAGE_TOKENS,
    SERVER_TOOL_TOKENS,
    Counted,
    ModelRequest,
)


def read(messages: list[Any] | None = None, **more: Any) -> ModelRequest:
    body = {"model": "m", "max_tokens": 32_000, "messages": messages or [user("hi")], **more}
    request = ModelRequest.read(json.dumps(body).encode())
    assert request is not None
    return request


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bound(request: ModelRequest) -> int:
    return Counted().bound(request)


@given(st.text(max_size=300))
def test_a_text_has_no_more_tokens_than_bytes(text: str) -> None:
    assert bound(read([user(text)])) >= len(text.encode("utf-8", "surrogatepass")) + FRAME_TOKENS


def test_everything_that_goes_in_counts() -> None:
    bare = bound(read())
    assert bound(read(system="x" * 500)) >= bare + 500
    assert bound(read(tools=[{"name": "t", "description": "x" * 500}])) >= bare + 500
    assert bound(read(output_config={"format": {"schema": "x" * 500}})) >= bare + 500
    assert bound(read(metadata={"user_id": "x" * 500})) == bare


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_counts_as_its_documented_maximum_whatever_its_size(nested: bool) -> None:
    def image(size: int) -> dict[str, Any]:
        found = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * size}}
        return {"type": "tool_result", "tool_use_id": "t", "content": [found]} if nested else found

    small, large = (bound(read([user([image(size)])])) for size in (4, 4_000_000))
    assert small == large
    assert IMAGE_TOKENS < small < IMAGE_TOKENS + FRAME_TOKENS + 300
    by_url = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    assert bound(read([user([by_url])])) > IMAGE_TOKENS


@pytest.mark.parametrize(
    ("raw", "pages"),
    [
        (b"%PDF-1.4 << /Type /Pages >> << /Type /Page >> <</Type/Page>>", 2),
        (b"%PDF-1.5 /ObjStm << /Type /Page >>", MOST_PAGES),
        (b"%PDF-1.4 nothing to be seen", MOST_PAGES),
        (b"no PDF", MOST_PAGES),
    ],
)
def test_a_document_counts_by_its_pages_or_as_the_largest(raw: bytes, pages: int) -> None:
    data = base64.b64encode(raw).decode()
    source = {"type": "base64", "media_type": "application/pdf", "data": data}
    found = bound(read([user([{"type": "document", "source": source}])]))
    assert found >= min(pages * PAGE_TOKENS, LARGEST_CONTEXT)
    assert found <= min(pages * PAGE_TOKENS + FRAME_TOKENS + 300, LARGEST_CONTEXT)


def test_a_document_of_text_counts_by_its_bytes() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "x" * 500}
    assert 500 < bound(read([user([{"type": "document", "source": source}])])) < 500 + FRAME_TOKENS + 300


def test_tools_that_the_upstream_runs_are_held_for() -> None:
    searching = read(tools=[{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}])
    assert bound(searching) > 3 * SERVER_TOOL_TOKENS
    assert bound(read(tools=[{"type": "custom", "name": "x"}])) < SERVER_TOOL_TOKENS


def test_no_request_is_larger_than_a_context() -> None:
    assert bound(read([user("x" * 3_000_000)])) == LARGEST_CONTEXT


def test_what_was_counted_is_not_guessed_again() -> None:
    counted = Counted()
    first = read([user("a" * 4_000)], system="s" * 40_000)
    assert counted.bound(first) > 44_000
    counted.learn(first, 11_000)
    assert counted.bound(first) == 11_000
    more = [user("a" * 4_000), {"role": "assistant", "content": "b" * 100}, user("c" * 200)]
    assert 11_300 < counted.bound(read(more, system="s" * 40_000)) < 11_500
    # What stands before the messages had no more than the whole.
    assert 11_000 < counted.bound(read([user("other")], system="s" * 40_000)) < 11_100
    # Another model may count otherwise; another beginning is another.
    assert counted.bound(read([user("a" * 4_000)], system="s" * 40_000, model="n")) > 44_000
    assert counted.bound(read([user("a" * 4_000)], system="t" * 40_000)) > 44_000


def test_the_marks_of_the_cache_change_nothing() -> None:
    counted = Counted()
    mark = {"cache_control": {"type": "ephemeral"}}
    counted.learn(read([user([{"type": "text", "text": "a" * 4_000, **mark}])], system=[{"text": "s", **mark}]), 900)
    plain = read([user("a" * 4_000), {"role": "assistant", "content": "b"}], system=[{"text": "s"}])
    assert counted.bound(plain) < 1_100


def test_only_so_many_beginnings_are_remembered() -> None:
    counted = Counted(most=4)
    requests = [read([user("x" * 100)], system=str(n) * 1_000) for n in range(4)]
    for request in requests:
        counted.learn(request, 10)
    assert [counted.bound(request) for request in requests[2:]] == [10, 10]
    assert counted.bound(requests[0]) > 1_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"model": "m", "messages": []}',
        b'{"model": "m", "max_tokens": true, "messages": []}',
        b'{"model": "m", "max_tokens": 0, "messages": []}',
        b'{"model": 1, "max_tokens": 5, "messages": []}',
        b'{"model": "m", "max_tokens": 5}',
    ],
)
def test_what_no_model_would_answer(body: bytes) -> None:
    assert ModelRequest.read(body) is None


def test_a_lone_surrogate_is_passed_on() -> None:
    request = ModelRequest.read(
        b'{"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "\\ud800"}]}'
    )
    assert request is not None
    assert b"\\ud800" in request.with_max_tokens(3)


def test_how_far_the_answer_may_be_shortened() -> None:
    assert read().least_max_tokens == 1_024
    assert read(max_tokens=7).least_max_tokens == 7
    assert read(thinking={"type": "enabled", "budget_tokens": 9_000}).least_max_tokens == 9_001
    assert json.loads(read(system="é").with_max_tokens(5)) == {
        "model": "m",
        "max_tokens": 5,
        "messages": [user("hi")],
        "system": "é",
    }


def test_whether_anything_is_kept_for_an_hour() -> None:
    marked = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    assert read(system=marked).one_hour
    assert not read([user('they say "ttl": "1h"')]).one_hour
