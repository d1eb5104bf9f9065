"""`carrel chat` from a pipe."""

import io
from typing import Any

import pytest

from carrel.cli.app import run

API = "/api/v1/sessions"
S1 = f"{API}/s1"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_every_line_is_a_prompt(
    fake: Any, data: Any, wire: Any, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.on("POST", API, wire.session(), status=201)
    fake.stream("POST", f"{S1}/turns", wire.event(1, "turn.queued", ahead=0), wire.said(2, "One"), wire.completed(3))
    fake.stream("POST", f"{S1}/turns", wire.event(4, "turn.queued", ahead=0), wire.said(5, "Two"), wire.completed(6))
    typed("first\n\n  \nsecond")
    assert run(["chat", "--model", "haiku"]) == 0
    assert capsys.readouterr().out == "One\nTwo\n"
    assert [asked.json for asked in fake.asked] == [{"model": "haiku"}, {"prompt": "first"}, {"prompt": "second"}]


def test_a_turn_that_does_not_succeed_is_the_exit_code(
    fake: Any, data: Any, wire: Any, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.on("POST", API, wire.session(), status=201)
    fake.stream("POST", f"{S1}/turns", wire.event(1, "turn.queued", ahead=0), wire.completed(2, "failed"))
    fake.stream("POST", f"{S1}/turns", wire.event(3, "turn.queued", ahead=0), wire.completed(4))
    typed("first\nsecond\n")
    assert run(["chat"]) == 1
    assert len(fake.asked) == 3


@pytest.mark.parametrize(("status", "resumed"), [("stopped", True), ("failed", True), ("ready", False)])
def test_a_session_is_taken_up_again(fake: Any, data: Any, wire: Any, typed: Any, status: str, resumed: bool) -> None:
    fake.on("GET", S1, wire.session(status=status))
    fake.on("POST", f"{S1}/resume", wire.session())
    typed("")
    assert run(["chat", "s1"]) == 0
    assert [asked.path for asked in fake.asked] == [S1] + [f"{S1}/resume"] * resumed


def test_an_unknown_session_is_told(fake: Any, data: Any, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake.problem("GET", S1, "session_not_found", 404)
    typed("hello")
    assert run(["chat", "s1"]) == 1
    assert capsys.readouterr().err == "carrel: About session_not_found.\n"
