"""`carrel env login`: Claude Code's own, on a folder that is one environment's alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from carrel.cli.app import app
from carrel.cli.context import Context
from carrel.errors import OperatorError

Run = Callable[..., tuple[int, str]]
SIGNS_IN = """#!/bin/sh
echo "$@ key=$ANTHROPIC_API_KEY" > "$CLAUDE_CONFIG_DIR/asked"
{what}
"""
WRITES = 'echo "{}" > "$CLAUDE_CONFIG_DIR/.credentials.json"'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the-servers-own")

    def run(*arguments: str, does: str = WRITES) -> tuple[int, str]:
        program = tmp_path / "claude"
        program.write_text(SIGNS_IN.replace("{what}", does))
        program.chmod(0o755)
        monkeypatch.setenv("CARREL_CLI_PATH", str(program))
        result = CliRunner().invoke(app, ["env", *arguments, "--data", str(tmp_path / "data")], obj=Context())
        if isinstance(result.exception, OperatorError):
            return 2, result.exception.message
        return result.exit_code, result.stdout

    return run


def test_it_says_for_whom_it_is_and_keeps_it_apart(run: Run, tmp_path: Path) -> None:
    code, said = run("login", "dev", "--yes")
    assert code == 0
    assert "single operator" in said
    folder = tmp_path / "data" / "logins" / "dev"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / ".credentials.json").stat().st_mode & 0o777 == 0o600
    assert (folder / "asked").read_text() == "auth login key=\n"
    assert run("logout", "dev")[0] == 0
    assert not folder.exists()
    assert run("logout", "dev")[0] == 2


def test_what_has_not_worked_is_said(run: Run) -> None:
    for does in ("exit 3", "true"):
        code, said = run("login", "dev", "--yes", does=does)
        assert code == 2
        assert "has not signed in" in said


def test_a_name_that_is_none_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("login", "../dev", "--yes")[0] == 2
    assert not (tmp_path / "dev").exists()


def test_with_direct_credentials_it_would_be_of_no_use(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARREL_CREDENTIALS", "direct")
    code, said = run("login", "dev", "--yes")
    assert code == 2
    assert "direct" in said
