"""How a command ends: its exit code, and one line about what went wrong."""

from typing import Any

import pytest

from carrel import __version__
from carrel.cli.app import run
from carrel.client import Carrel
from carrel.errors import CarrelError, DataFolderInUse


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(capsys, "--version") == (0, f"carrel {__version__}\n", "")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ran(capsys, "--help")
    assert code == 0
    for command in ("serve", "demo", "chat", "sessions", "keys", "users", "token", "settings", "doctor"):
        assert command in out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["serve", "--port", "many"], ["serve", "--auth", "maybe"], ["sessions", "show"]]
)
def test_a_wrong_command_is_told_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = ran(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("carrel: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CarrelError("Not\n\nnow."), 1, "carrel: Not now.\n"),
        (DataFolderInUse(), 2, "carrel: Another server uses this data folder"),
        (PermissionError(13, "Permission denied", "/x"), 1, "carrel: Permission denied: /x\n"),
        (KeyError("secret"), 1, "carrel: internal error, KeyError; run it again with `carrel --debug …`\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: Any,
    error: BaseException,
    code: int,
    words: str,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Carrel, "__enter__", fail)
    ended, _, err = ran(capsys, "sessions", "list")
    assert ended == code
    assert err.startswith(words)
    assert "Traceback" not in err
    assert "secret" not in err


def test_debug_shows_where_it_came_from(capsys: pytest.CaptureFixture[str], fake: Any, data: Any) -> None:
    fake.problem("GET", "/api/v1/sessions/s1", "session_not_found", 404)
    code, _, err = ran(capsys, "--debug", "sessions", "show", "s1")
    assert code == 1
    assert err.startswith("carrel: About session_not_found.\nTraceback")
