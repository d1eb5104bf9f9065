"""`carrel sessions`, for people and for programs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from carrel.cli.app import app, run
from carrel.cli.context import Context

API = "/api/v1/sessions"
S1 = f"{API}/s1"


@pytest.fixture
def carrel(data: Path) -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), obj=Context())

    return invoke


def test_list(carrel: Any, fake: Any, wire: Any) -> None:
    sessions = [wire.session("a"), wire.session("longer", title="Two\n\x1b[2Jlines", cost_usd=None)]
    fake.on("GET", API, {"data": sessions, "next_cursor": None})
    lines = carrel("sessions", "list").stdout.splitlines()
    assert lines[0].split() == ["SESSION", "STATUS", "TURNS", "COST", "LAST", "ACTIVE", "TITLE"]
    assert lines[1].startswith("a        idle    2      $0.2500  2026-11-")
    assert lines[1].endswith("First")
    assert lines[2].endswith("Two [2Jlines")
    assert fake.asked[0].headers["authorization"] == "Bearer the-key"


def test_list_takes_no_more_than_it_is_asked_for(carrel: Any, fake: Any, wire: Any) -> None:
    fake.on("GET", API, {"data": [wire.session("a"), wire.session("b")], "next_cursor": "more"})
    shown = json.loads(carrel("sessions", "list", "--limit", "3", "--status", "idle", "--json").stdout)
    assert [session["id"] for session in shown] == ["a", "b", "a"]
    assert [asked.query for asked in fake.asked] == [
        {"status": "idle", "limit": "3"},
        {"status": "idle", "limit": "3", "cursor": "more"},
    ]


def test_show(carrel: Any, fake: Any, wire: Any) -> None:
    failure = {"code": "sandbox_lost", "message": "It was lost."}
    fake.on("GET", S1, wire.session(stop_reason="error", of_next_year=1))
    fake.on("GET", f"{S1}/turns", {"data": [wire.turn(status="failed", error=failure)], "next_cursor": None})
    shown = carrel("sessions", "show", "s1").stdout
    assert "title:        First\n" in shown
    assert "stop reason:  error\n" in shown
    assert "It was lost." in shown
    assert json.loads(carrel("sessions", "show", "s1", "--json").stdout)["of_next_year"] == 1


def test_stop(carrel: Any, fake: Any, wire: Any) -> None:
    fake.on("POST", f"{S1}/stop", wire.session(status="stopped"))
    fake.on("POST", f"{API}/s2/stop", wire.session("s2", status="stopped"))
    assert carrel("sessions", "stop", "s1", "s2").stdout == "s1  stopped\ns2  stopped\n"


def test_delete(carrel: Any, fake: Any) -> None:
    fake.on("DELETE", S1, b"", status=204)
    assert carrel("sessions", "delete", "s1").stdout == "s1  deleted\n"
    assert fake.asked[0].method == "DELETE"


def test_delete_asks_a_person_first(fake: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(text: str, *, abort: bool) -> None:
        asked.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", refuse)
    assert run(["sessions", "delete", "s1"]) == 130
    assert asked == ["Delete session s1 for good?"]
    assert fake.asked == []


def test_export(carrel: Any, fake: Any, tmp_path: Path) -> None:
    fake.stream("GET", f"{S1}/export", b'{"kind":"session"}\n', b'{"kind":"turn"}\n')
    whole = b'{"kind":"session"}\n{"kind":"turn"}\n'
    assert carrel("sessions", "export", "s1").stdout_bytes == whole
    assert carrel("sessions", "export", "s1", "--output", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out").read_bytes() == whole


def test_an_export_that_breaks_off_leaves_what_was_there(fake: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    fake.stream("GET", f"{S1}/export", b'{"kind":"session"}\n', breaks=True)
    assert run(["sessions", "export", "s1", "--output", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out").read_text() == "before"
    assert not (tmp_path / "out.part").exists()
