"""`carrel env`, for people and for programs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from carrel.cli.app import app
from carrel.cli.context import Context

DEV = "/api/v1/environments/dev"
STATUS = {
    "name": "dev",
    "version": 3,
    "running": True,
    "warm_wanted": 2,
    "warm": 1,
    "starting": 1,
    "sessions": 12,
    "live_sessions": 4,
    "problems": [{"code": "mcp_server_missing", "message": "It is not there."}],
}


@pytest.fixture
def carrel(data: Path) -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), obj=Context())

    return invoke


def test_status(carrel: Any, fake: Any) -> None:
    fake.on("GET", f"{DEV}/status", STATUS)
    result = carrel("env", "status", "dev")
    assert result.stdout.splitlines() == [
        "environment:   dev, version 3",
        "takes prompts: yes",
        "warm:          1 of 2, 1 starting",
        "sessions:      12, 4 with a sandbox",
    ]
    assert result.stderr == "mcp_server_missing: It is not there.\n"
    assert json.loads(carrel("env", "status", "dev", "--json").stdout) == STATUS


@pytest.mark.parametrize("verb", ["start", "stop"])
def test_start_and_stop(carrel: Any, fake: Any, verb: str) -> None:
    fake.on("POST", f"{DEV}/{verb}", STATUS | {"running": verb == "start", "starting": 0, "problems": []})
    shown = carrel("env", verb, "dev").stdout
    assert f"takes prompts: {'yes' if verb == 'start' else 'no, it is stopped'}\n" in shown
    assert "warm:          1 of 2\n" in shown
