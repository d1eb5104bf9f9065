"""`carrel settings` shows what holds, from where, and no secret."""

import json
from pathlib import Path

import pytest

from carrel.cli.app import run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_values_and_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("drain_seconds: 3\n")
    monkeypatch.setenv("CARREL_PORT", "8123")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    assert run(["--data", str(tmp_path / "here"), "settings", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "port = 8123    [CARREL_PORT]\n    The port" in shown
    assert f"data = {tmp_path / 'here'}    [command line]\n" in shown
    assert f"drain_seconds = 3.0    [{config}:1]\n" in shown
    assert "host = 127.0.0.1    [default]\n" in shown
    assert "cli_path = (not set)    [default]\n" in shown
    assert "sk-secret" not in shown


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["host"]["value"] == "127.0.0.1"
    assert set(lines["host"]) == {"name", "value", "source", "description", "variable"}


def test_a_wrong_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("prot: 8000\n")
    assert run(["settings", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "'port'" in capsys.readouterr().err


def test_what_serve_would_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "--set", "limits.max_sessions=20", "--set", "log_level=debug"]) == 0
    shown = capsys.readouterr().out
    assert "limits.max_sessions = 20    [--set limits.max_sessions]\n" in shown
    assert "log_level = debug    [--set log_level]\n" in shown
    assert run(["settings", "--set", "limits.max_session=20"]) == 2
    assert "'limits.max_sessions'" in capsys.readouterr().err


def test_an_example_to_begin_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "--example"]) == 0
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    assert run(["settings", "--config", str(config)]) == 0
    assert f"port = 8000    [{config}:" in capsys.readouterr().out


def test_the_page_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "--docs"]) == 0
    assert capsys.readouterr().out.startswith("# Settings\n")
