"""Whatever looks like a secret is hidden, wherever it stands; what does not is left alone."""

import pytest

from carrel.observability import Redactor, redacted_query

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlc2lnbmF0dXJl"
PLANTED = [
    "sk-ant-api03-AbCdEf0123456789",
    "carrel_admin_AbCdEf0123456789AbCdEf",
    "carrel_AbCdEf0123456789AbCdEf0123",
    "cak-AbCdEf0123456789AbCd",
    JWT,
    "known-secret-value",
]


@pytest.mark.parametrize("secret", PLANTED)
@pytest.mark.parametrize("around", ["{}", "Bearer {}", '"{}"', "a={};b", "(it said {})", "x-api-key: {}"])
def test_a_secret_is_hidden_in_any_company(secret, around):
    told = Redactor(["known-secret-value", None, ""]).text(around.format(secret))
    assert secret not in told
    assert "[redacted]" in told


def test_what_carries_secrets_is_hidden_whatever_it_holds():
    redact = Redactor().text
    assert redact("Authorization: Bearer abcdef123456") == "Authorization: Bearer [redacted]"
    assert redact("Basic YWxpY2U6cGFzcw==") == "Basic [redacted]"
    assert redact("postgresql://carrel:hunter2@db:5432/x") == "postgresql://carrel:[redacted]@db:5432/x"
    assert redact("GET /stream?ticket=abc&after=3") == "GET /stream?ticket=[redacted]&after=3"


@pytest.mark.parametrize(
    "text",
    [
        "the bearer of this letter",
        "carrel_turns_total",
        "/api/v1/sessions/01980c5e-5f0b-7c3a-9d0e-0d3c7f1f9a10",
        "http://127.0.0.1:8000/?after=3",
        "a basic idea",
        "no password was given",
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    assert Redactor(["short"]).text(text) == text


def test_it_looks_into_everything_that_a_line_may_hold():
    line = {
        "event": "x",
        "authorization": "whatever",
        "nested": {"password": "p", "list": ["Bearer abcdef123456", 3, None, True]},
        "bytes": b"sk-ant-api03-AbCdEf0123456789",
        "error": ValueError("sk-ant-api03-AbCdEf0123456789"),
        "input_tokens": 5,
    }
    assert Redactor()(None, "info", line) == {
        "event": "x",
        "authorization": "[redacted]",
        "nested": {"password": "[redacted]", "list": ["Bearer [redacted]", 3, None, True]},
        "bytes": "[redacted]",
        "error": "[redacted]",
        "input_tokens": 5,
    }


def test_a_value_that_holds_itself_ends():
    loop: dict[str, object] = {}
    loop["again"] = loop
    assert "[redacted]" in str(Redactor().value(loop))


def test_of_a_query_the_secret_parameters_are_hidden():
    assert redacted_query("after=3&Ticket=abc&key=&x=%20y") == "after=3&Ticket=[redacted]&key=[redacted]&x=%20y"
