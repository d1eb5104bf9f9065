"""`carrel audit`, for people and for programs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from carrel.cli.app import app, run
from carrel.cli.context import Context

PATH = "/api/v1/audit"
RECORD = {
    "id": "a1",
    "at": "2026-11-21T09:30:00Z",
    "principal": "key:k1",
    "user_id": "alice",
    "action": "session.delete",
    "object_type": "session",
    "object_id": "s1\x1b[2J",
    "address": "192.0.2.7",
    "request_id": "r1",
    "outcome": 204,
    "details": {},
}
LINES = b"".join(
    json.dumps(record).encode() + b"\n"
    for record in (RECORD, RECORD | {"outcome": 401, "object_id": None, "address": None, "details": {"times": 9}})
)


@pytest.fixture
def carrel(data: Path) -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), obj=Context())

    return invoke


def test_a_table_for_people(carrel: Any, fake: Any) -> None:
    fake.on("GET", PATH, LINES)
    lines = carrel("audit", "--user", "alice", "--since", "2026-11-01").stdout.splitlines()
    assert lines[0].split() == ["WHEN", "WHO", "ACTION", "OBJECT", "OUTCOME", "FROM"]
    assert lines[1].split()[2:] == ["key:k1", "session.delete", "session", "s1[2J", "204", "192.0.2.7"]
    assert lines[2].split()[2:] == ["key:k1", "session.delete", "session", "401", "×9"]
    (asked,) = fake.asked
    assert asked.headers["accept"] == "application/x-ndjson"
    assert asked.query["user"] == "alice"
    assert asked.query["since"].startswith("2026-11-01T00:00:00")
    assert set(asked.query) == {"user", "since"}
    assert len(carrel("audit", "--limit", "1").stdout.splitlines()) == 2


def test_everything_for_programs(carrel: Any, fake: Any) -> None:
    fake.on("GET", PATH, LINES)
    assert carrel("audit", "--json").stdout.encode() == LINES
    fake.on("GET", PATH, b"id,at\r\n")
    carrel("audit", "--csv", "--object", "s1")
    assert fake.asked[-1].headers["accept"] == "text/csv"
    assert fake.asked[-1].query == {"object_id": "s1"}


def test_what_makes_no_sense_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "--json", "--csv"]) == 1
    assert run(["audit", "--since", "yesterday"]) == 1
    assert "'yesterday' is not a time" in capsys.readouterr().err
