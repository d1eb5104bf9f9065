"""Presets: what they stand for, and what is refused."""

import pytest
from pydantic import ValidationError

from carrel.protocol.environments import EnvironmentSpec
from carrel.protocol.presets import PRESETS, written_out
from carrel.protocol.spec import SessionSpec
from carrel.settings import load_settings

EXAMPLES = {
    "filesystem": {},
    "github": {"token": "${secret:GITHUB_TOKEN}"},
    "playwright": {},
    "sqlite": {"path": "shop.db"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_out_as_a_server(name: str) -> None:
    spec = SessionSpec(mcp_servers={"it": {"preset": name} | EXAMPLES[name]})
    assert spec.mcp_servers is not None
    server = spec.mcp_servers["it"]
    assert server["type"] in ("stdio", "http")
    assert "preset" not in server
    assert SessionSpec(mcp_servers=spec.mcp_servers) == spec, "what is written out stays as it is"


def test_what_a_preset_is_given_stands_in_its_command() -> None:
    assert written_out({"preset": "sqlite", "path": "a.db"})["args"] == ["--db-path", "a.db"]
    assert written_out({"preset": "filesystem", "paths": ["a", "b"]})["args"] == ["a", "b"]
    assert written_out({"preset": "filesystem"})["args"] == ["."]
    assert written_out({"command": "x"}) == {"command": "x"}


def test_the_token_of_github_stays_with_the_gateway() -> None:
    spec = EnvironmentSpec.model_validate(
        {
            "options": {"mcp_servers": {"code": {"preset": "github", "token": "${secret:GITHUB_TOKEN}"}}},
            "secrets": [{"name": "GITHUB_TOKEN"}],
        }
    )
    assert spec.gateway_servers["code"]["headers"] == {"Authorization": "Bearer ${secret:GITHUB_TOKEN}"}


def test_settings_may_name_presets() -> None:
    settings = load_settings(overrides={"mcp_servers": {"files": {"preset": "filesystem"}}})
    assert settings.mcp_servers["files"]["command"] == "mcp-server-filesystem"


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"preset": "oracle"}, "a: there is no such preset, but filesystem, github, playwright, sqlite"),
        ({"preset": 3}, "a: there is no such preset"),
        ({"preset": ["sqlite"]}, "a: there is no such preset"),
        ({"preset": "sqlite"}, "a: preset sqlite: path: Field required"),
        ({"preset": "sqlite", "path": "a", "command": "b"}, "a: preset sqlite: command: Extra inputs"),
        ({"preset": "filesystem", "paths": []}, "a: preset filesystem: paths: List should have at least 1 item"),
        ({"preset": "github", "token": 5}, "a: preset github: token: Input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_preset_is_told(server: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SessionSpec(mcp_servers={"a": server})
    assert words in str(caught.value)
