"""`carrel serve` hands the server what the command line says."""

import os
from pathlib import Path
from typing import Any

import pytest

from carrel.cli import reload, server
from carrel.cli.app import run
from carrel.model import Isolation, NetworkPolicy


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(server, "serve", found.append)
    monkeypatch.chdir(tmp_path)
    return found


def test_every_option_arrives(served: list[Any], tmp_path: Path) -> None:
    arguments = ["--port", "0", "--data", "d", "--model-upstream", "scripted", "--isolation", "container"]
    assert run(["serve", *arguments, "--network", "host", "--log-level", "warning"]) == 0
    [settings] = served
    assert (settings.port, settings.data, settings.model_upstream) == (0, tmp_path / "d", "scripted")
    assert (settings.isolation, settings.network) == (Isolation.CONTAINER, NetworkPolicy(mode="open"))
    assert settings.log_level == "warning"


@pytest.mark.parametrize(
    ("written", "policy"),
    [
        ("open", NetworkPolicy(mode="open")),
        ("gateway-only", NetworkPolicy()),
        ('{"allow": ["a.org", "*.B.org:8443"]}', NetworkPolicy(mode="allow", allow=("a.org", "*.b.org:8443"))),
    ],
)
def test_a_network_policy_is_a_word_or_names(served: list[Any], written: str, policy: NetworkPolicy) -> None:
    for arguments in (["--network", written], ["--set", f"network={written}"]):
        assert run(["serve", *arguments]) == 0
        assert served.pop().network == policy


def test_any_setting_can_be_set(served: list[Any]) -> None:
    assert run(["serve", "--set", "limits.max_sessions=20", "--set", "api.max_sessions_per_user=3"]) == 0
    assert (served[0].limits.max_sessions, served[0].limits.max_sessions_per_user) == (20, 3)


def test_the_folder_may_stand_before_the_command(served: list[Any], tmp_path: Path) -> None:
    assert run(["--data", "before", "serve"]) == 0
    assert served[0].data == tmp_path / "before"


def test_the_command_line_wins_over_the_file(served: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: 1\nhost: 127.0.0.2\n")
    assert run(["serve", "--config", "c.yaml", "--port", "2"]) == 0
    assert (served[0].port, served[0].host) == (2, "127.0.0.2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model-upstream", "somewhere"], "scripted"),
        (["--set", "limits.max_session=3"], "'limits.max_sessions'"),
        (["--port", "1", "--set", "port=2"], "both set port"),
        (["--auth", "none", "--host", "0.0.0.0"], "127.0.0.1"),
        (["--auth", "none", "--network", "host"], "gateway-only"),
        (["--auth", "none", "--network", "open"], "gateway-only"),
        (["--network", "somewhere"], "gateway-only"),
        (["--network", '{"allow": ["10.0.0.1"]}'], "is an address"),
        (["--network", '{"allow": ["a.org"'], "not valid JSON"),
        (["--network", '{"allow": ["a.org"]}', "--isolation", "none"], "cannot hold"),
        (["--set", "egress.private_networks=10.0.0.0/99"], "is no address"),
    ],
)
def test_what_is_wrong_or_unsafe_is_refused(
    served: list[Any], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert served == []


def test_reloading_runs_the_same_command(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    supervised: list[Any] = []
    monkeypatch.setattr(reload, "supervise", supervised.append)
    assert (
        run(["serve", "--reload", "--port", "0", "--network", "host", "--model-upstream", "scripted", "--set", "a=b"])
        == 2
    )
    arguments = ["--port", "0", "--model-upstream", "scripted", "--network", "host", "--set", "limits.memory_mb=99"]
    assert run(["serve", "--reload", *arguments]) == 0
    assert supervised == [["serve", *arguments]]
    assert served == []


def test_a_change_of_the_code_is_seen(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    module = tmp_path / "package" / "module.py"
    module.write_text("")
    before = reload.newest_change(tmp_path)
    os.utime(module, (before + 10, before + 10))
    assert reload.newest_change(tmp_path) == before + 10
    (tmp_path / "package" / "notes.txt").write_text("")
    os.utime(tmp_path / "package" / "notes.txt", (before + 20, before + 20))
    os.utime(tmp_path / "package", (before, before))
    assert reload.newest_change(tmp_path) == before + 10


def test_dialects_of_the_command_line_join_those_of_the_file(served: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dialects: {sdk-server: {port: 1, auth: none}, claude-agent-http: {}}\n")
    arguments = ["--dialect", "sdk-server=3000", "--dialect", "claude-agent-http=0,auth=none"]
    assert run(["serve", "--config", "c.yaml", *arguments]) == 0
    dialects = served[0].dialects
    assert (dialects["sdk-server"].port, dialects["sdk-server"].auth) == (3000, "none")
    assert (dialects["claude-agent-http"].port, dialects["claude-agent-http"].auth) == (0, "none")


def test_dialects_are_passed_on_when_it_reloads(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(reload, "supervise", found.append)
    assert run(["serve", "--dialect", "sdk-server=3000,auth=none", "--reload"]) == 0
    assert found == [["serve", "--dialect", "sdk-server=3000,auth=none"]]
