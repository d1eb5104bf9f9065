"""What a server refuses becomes the class of error it names."""

import json
from typing import Any

import httpx
import pytest

from carrel import errors
from carrel.client.responses import error_of, unreachable


def answered(status: int, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.Response(status, content=content, headers=headers, request=httpx.Request("GET", "http://x/y"))


@pytest.mark.parametrize("code", sorted(errors.all_errors()))
def test_every_error_comes_back_as_its_own_class(code: str) -> None:
    cls = errors.all_errors()[code]
    body = {"type": "about:blank", "title": "T", "status": 400, "detail": "Do this.", "code": code, "path": "a/b"}
    error = error_of(answered(400, body))
    assert type(error) is cls
    assert error.message == "Do this."
    assert error.context == {"path": "a/b"}


@pytest.mark.parametrize(
    ("status", "cls"),
    [(404, errors.NotFound), (409, errors.Conflict), (502, errors.Unavailable), (418, errors.CarrelError)],
)
def test_an_unknown_code_is_known_by_its_status(status: int, cls: type[errors.CarrelError]) -> None:
    error = error_of(answered(status, {"code": "of_next_year", "detail": "New."}))
    assert type(error) is cls
    assert error.message == "New."


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"", b"[1]", b"\xff"])
def test_what_is_no_problem_is_told_by_its_status(body: bytes) -> None:
    error = error_of(answered(502, body))
    assert type(error) is errors.Unavailable
    assert "502" in error.message
    assert "html" not in str(error)


def test_retry_after_is_read_from_the_header() -> None:
    assert error_of(answered(429, {"code": "too_many"}, {"Retry-After": "7"})).retry_after_seconds == 7
    assert error_of(answered(429, {"code": "too_many", "retry_after_seconds": 5})).retry_after_seconds == 5
    assert error_of(answered(429, {"code": "too_many"})).retry_after_seconds is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectError("refused"), "carrel serve"),
        (httpx.ReadTimeout("slow"), "too long"),
        (httpx.RemoteProtocolError("cut"), "broke"),
    ],
)
def test_a_server_that_does_not_answer(error: httpx.TransportError, words: str) -> None:
    told = unreachable("http://here", error)
    assert isinstance(told, errors.ServerUnreachable)
    assert words in told.message
    assert "http://here" in told.message
