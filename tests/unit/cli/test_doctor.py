"""`carrel doctor`: what each fact means, and what to do about it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from carrel.cli import facts as gathering
from carrel.cli.app import run
from carrel.cli.doctor import Level, Line, check
from carrel.cli.facts import Facts
from carrel.model import Isolation

WELL = Facts(
    python=(3, 11, 2),
    cli_path="/opt/claude",
    cli_version="2.1.329",
    cli_error=None,
    cpu_flags=frozenset({"avx", "sse"}),
    isolation=None,
    runtimes=("local",),
    engine=None,
    engine_error=None,
    image="carrel-sandbox:1",
    image_there=False,
    bubblewrap="/usr/bin/bwrap",
    bubblewrap_error=None,
    user_namespaces_error=None,
    data=Path("/data"),
    data_error=None,
    free_bytes=100 * 2**30,
    host="127.0.0.1",
    port=8000,
    port_error=None,
    model_upstream="anthropic",
    credential="ANTHROPIC_API_KEY",
    server="http://127.0.0.1:8000",
    server_error=None,
)


DOCKER = {"runtimes": ("docker",), "engine": "28.0 at unix:///var/run/docker.sock", "image_there": True}


def line(name: str, **changes: Any) -> Line:
    [found] = [line for line in check(dataclasses.replace(WELL, **changes)) if line.name == name]
    return found


def test_a_machine_that_has_everything() -> None:
    assert {line.level for line in check(WELL)} == {Level.OK}


@pytest.mark.parametrize(
    ("name", "changes", "level", "words"),
    [
        ("Python", {"python": (3, 10, 9)}, Level.FAIL, "3.11"),
        ("Claude Code", {"cli_path": None}, Level.FAIL, "claude-agent-sdk"),
        ("Claude Code", {"cli_error": "exit code -4"}, Level.FAIL, "processor"),
        ("processor", {"cpu_flags": frozenset({"sse"})}, Level.FAIL, "SIGILL"),
        ("processor", {"cpu_flags": None}, Level.OK, ""),
        ("Docker engine", DOCKER | {"engine": None, "engine_error": "no such file"}, Level.FAIL, "Start it"),
        ("Docker engine", DOCKER | {"image_there": False}, Level.FAIL, "scripts/build-images"),
        ("Docker engine", DOCKER, Level.OK, ""),
        ("bubblewrap", DOCKER | {"isolation": Isolation.CONTAINER}, Level.OK, ""),
        ("user namespaces", DOCKER | {"user_namespaces_error": "Set it.", "bubblewrap_error": "x"}, Level.OK, ""),
        ("bubblewrap", DOCKER | {"runtimes": ("docker", "local"), "isolation": Isolation.NONE}, Level.WARN, "see each"),
        ("bubblewrap", {"bubblewrap": None, "bubblewrap_error": "apt-get install"}, Level.FAIL, "apt-get install"),
        ("bubblewrap", {"isolation": Isolation.NONE, "bubblewrap_error": "x"}, Level.WARN, "see each other"),
        ("user namespaces", {"user_namespaces_error": "Set it."}, Level.OK, ""),
        ("user namespaces", {"user_namespaces_error": "Set it.", "bubblewrap_error": "x"}, Level.WARN, "Set it."),
        ("data folder", {"data_error": "cannot be written to"}, Level.FAIL, "--data"),
        ("disk", {"free_bytes": 2**30}, Level.WARN, "room"),
        ("disk", {"free_bytes": 2**20}, Level.FAIL, "room"),
        ("port", {"port_error": "address already in use", "server": None}, Level.FAIL, "--port"),
        ("port", {"port_error": "address already in use"}, Level.OK, ""),
        ("port", {"port_error": "in use", "server": "http://127.0.0.1:18000"}, Level.FAIL, "--port"),
        ("credential", {"credential": None}, Level.WARN, "ANTHROPIC_API_KEY"),
        ("credential", {"credential": None, "model_upstream": "scripted"}, Level.OK, ""),
        ("server", {"server": None}, Level.OK, ""),
        ("server", {"server_error": "No server answers."}, Level.FAIL, "carrel serve"),
    ],
)
def test_what_is_amiss_is_told_with_its_remedy(name: str, changes: dict[str, Any], level: Level, words: str) -> None:
    found = line(name, **changes)
    assert found.level is level
    assert words in found.remedy
    assert bool(found.remedy) is (level is not Level.OK)


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx\n\nprocessor\t: 1\nflags : fpu\n", {"fpu", "avx"}),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None),
        ("", None),
    ],
)
def test_the_flags_of_a_processor(cpuinfo: str, flags: set[str] | None) -> None:
    assert gathering.cpu_flags(cpuinfo) == flags


@pytest.mark.parametrize(
    ("sysctls", "words"),
    [
        ({}, None),
        ({"user/max_user_namespaces": "0\n"}, "max_user_namespaces"),
        ({"user/max_user_namespaces": "100\n", "kernel/unprivileged_userns_clone": "1\n"}, None),
        ({"kernel/unprivileged_userns_clone": "0\n"}, "unprivileged_userns_clone"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "1\n"}, "AppArmor"),
    ],
)
def test_user_namespaces(sysctls: dict[str, str], words: str | None) -> None:
    found = gathering.namespaces_error(lambda name: sysctls.get(name, ""))
    assert (words in found) if words and found else found is words


def test_facts_are_gathered_and_judged(
    fake: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = tmp_path / "claude"
    cli.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "9.9 (of a test)"\n')
    cli.chmod(0o755)
    monkeypatch.setenv("CARREL_CLI_PATH", str(cli))
    monkeypatch.setenv("CARREL_PORT", fake.url.rpartition(":")[2])
    monkeypatch.setenv("CARREL_MODEL_UPSTREAM", "scripted")
    fake.on("GET", "/health", {"status": "healthy"})
    run(["doctor", "--json"])  # its exit code is this machine's
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["Claude Code"]["found"] == f"9.9 (of a test) at {cli}"
    assert lines["data folder"] == {"level": "ok", "name": "data folder", "found": str(data), "remedy": ""}
    assert lines["port"]["found"].endswith("is this data folder's server")
    assert lines["server"] == {"level": "ok", "name": "server", "found": f"{fake.url} answers", "remedy": ""}


def test_an_engine_that_is_not_there(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARREL_RUNTIME", "docker")
    monkeypatch.setenv("CARREL_DOCKER__HOST", f"unix://{data}/none.sock")
    assert run(["doctor", "--json"]) == 1
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["Docker engine"]["level"] == "fail"
    assert f"unix://{data}/none.sock" in lines["Docker engine"]["found"]
    assert lines["bubblewrap"]["level"] == "ok"


def test_a_failure_is_the_exit_code(
    fake: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = tmp_path / "claude"
    cli.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    cli.chmod(0o755)
    monkeypatch.setenv("CARREL_CLI_PATH", str(cli))
    fake.on("GET", "/health", {"status": "unhealthy"}, status=503)
    assert run(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert f"fail  Claude Code: {cli} does not run: exit code 3 broken\n      Look at" in shown
    assert "fail  server: " in shown
    assert not (tmp_path / "carrel-data").exists()
