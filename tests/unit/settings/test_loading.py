"""What is shown of settings: every one, where it was said, and no secret."""

import pytest

from carrel.errors import InvalidSettings
from carrel.settings import Settings, load_settings
from carrel.settings.names import leaves

PLANTED = "planted-secret-that-is-long-enough-for-any-use"


def test_every_setting_is_shown_with_its_meaning(told):
    lines = told()
    assert set(lines) == {leaf.name for leaf in leaves()}
    assert {name.partition(".")[0] for name in lines} == set(Settings.model_fields)
    assert all(line.description and line.source == "default" for line in lines.values())
    assert lines["limits.max_sessions"].variable == "CARREL_LIMITS__MAX_SESSIONS"
    assert lines["dialects.claude-agent-http.port"].variable == "CARREL_DIALECTS__CLAUDE_AGENT_HTTP__PORT"
    assert lines["anthropic_model"].variable == "ANTHROPIC_MODEL"
    assert len({line.variable for line in lines.values()}) == len(lines)


def test_where_it_was_said(told, tmp_path, monkeypatch):
    monkeypatch.setenv("CARREL_HOST", "::1")
    monkeypatch.setenv("CLAUDE_AGENT_SESSION_TTL", "60")
    lines = told(
        "\ndrain_seconds: 3\napi:\n  max_sessions: 4\n",
        overrides={"port": 1, "log_level": None},
        assignments=["limits.memory_mb=99"],
    )
    sources = {name: line.source for name, line in lines.items() if line.source != "default"}
    assert sources == {
        "host": "CARREL_HOST",
        "port": "command line",
        "drain_seconds": f"{tmp_path}/config.yaml:2",
        "limits.max_sessions": f"{tmp_path}/config.yaml:4 (api.max_sessions)",
        "limits.memory_mb": "--set limits.memory_mb",
        "defaults.ttl_seconds": "CLAUDE_AGENT_SESSION_TTL",
    }


def test_the_file_that_the_environment_names(tmp_path, monkeypatch):
    (tmp_path / "named.yaml").write_text("port: 8123")
    (tmp_path / "config.yaml").write_text("port: 8124")
    monkeypatch.setenv("CARREL_DATA", str(tmp_path))
    assert load_settings().port == 8124
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "named.yaml"))
    assert load_settings().port == 8123
    assert load_settings(tmp_path / "config.yaml").port == 8124
    monkeypatch.setenv("CARREL_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(InvalidSettings, match=r"none\.yaml cannot be read"):
        load_settings()


def test_no_secret_is_shown(told, monkeypatch):
    secrets = [leaf for leaf in leaves() if leaf.secret]
    assert len(secrets) >= 6
    for leaf in secrets:
        monkeypatch.setenv(leaf.variable, f"postgresql://{PLANTED}@x/y")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", f"https://me:{PLANTED}@proxy")
    lines = told(
        f"""
        mcp_servers:
          one: {{command: x, args: [--key, {PLANTED}], env: {{KEY: {PLANTED}}}}}
          two: {{type: http, url: "https://u:{PLANTED}@h/p?key={PLANTED}", headers: {{A: {PLANTED}}}}}
        """
    )
    assert PLANTED not in str(lines)
    assert all(lines[leaf.name].value == "********" for leaf in secrets)
    assert '"command":"x"' in lines["mcp_servers"].value
    assert "https://********@h/p" in lines["mcp_servers"].value
    assert lines["anthropic_base_url"].value == "https://********@proxy"
