"""The file, the environment, the command line: what each may say, and how a mistake in it is told."""

import pytest

from carrel.errors import InvalidSettings
from carrel.settings.names import leaves

SECRETS = [leaf for leaf in leaves() if leaf.secret]


def test_the_later_source_wins(load, monkeypatch):
    text = "port: 1\nlimits:\n  max_sessions: 1\n  max_sessions_per_user: 1\nhost: ::1\n"
    monkeypatch.setenv("CARREL_PORT", "2")
    monkeypatch.setenv("CARREL_LIMITS__MAX_SESSIONS", "2")
    settings = load(text, overrides={"port": 3, "limits": {"sandbox_cpus": 3}}, assignments=["drain_seconds=4"])
    assert (settings.port, settings.host, settings.drain_seconds) == (3, "::1", 4)
    limits = settings.limits
    assert (limits.max_sessions, limits.max_sessions_per_user, limits.sandbox_cpus) == (2, 1, 3)


def test_without_a_file_the_data_folders_is_read(tmp_path, monkeypatch):
    from carrel.settings import load_settings

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.yaml").write_text("port: 7\n")
    monkeypatch.setenv("CARREL_DATA", "here")
    assert load_settings().port == 7
    assert load_settings().data == tmp_path / "here"
    assert load_settings(overrides={"data": tmp_path}).port == 8000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "config.yaml:1: there is no setting 'prot'. Did you mean 'port'?"),
        ("\nlimits:\n  max_session: 1", "config.yaml:3: there is no setting 'limits.max_session'. "),
        ("limits:\n  max_session: 1", "Did you mean 'limits.max_sessions'?"),
        ("max_sessions: 1", "Did you mean 'limits.max_sessions'?"),
        ("budgets: {user: {max_dollars: 1}}", "Did you mean 'budgets.user.max_"),
        ("dialects: {claude-http: {port: 1}}", "Did you mean 'dialects.claude-agent-http."),
        ("api: {max_session: 1}", "Did you mean 'api.max_sessions'?"),
        ("qqqqqqqqqq: 1", "`carrel settings` lists them all."),
        ("limits: 3", "config.yaml:1: limits is a group of settings"),
        ("port: 1\nport: 2", "config.yaml:2: port is there twice, first in line 1."),
        ("- port", "must have a setting a line"),
        ("a: [", "config.yaml:1 is not valid YAML: "),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(load, text, words):
    with pytest.raises(InvalidSettings) as told:
        load(text)
    assert words in told.value.message


def test_what_is_wrong_with_a_file_is_told_without_quoting_it(load):
    with pytest.raises(InvalidSettings) as told:
        load('static_token: "planted-secret-in-a-file\n')
    assert "planted" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CARREL_PROT", "1", "environment variable CARREL_PROT. Did you mean 'CARREL_PORT'?"),
        ("CARREL_LIMITS_MAX_SESSIONS", "1", "Did you mean 'CARREL_LIMITS__MAX_SESSIONS'?"),
        ("CARREL_ANTHROPIC_API_KEY", "x", "Did you mean 'ANTHROPIC_API_KEY'?"),
        ("CLAUDE_AGENT_MAX_SESSION", "1", "Did you mean 'CLAUDE_AGENT_MAX_SESSIONS'?"),
        ("CARREL_LIMITS", "3", "limits is a group of settings"),
        ("CARREL_LIMITS", "{", "CARREL_LIMITS: is not valid JSON"),
        ("CARREL_LIMITS", '{"max_session": 1}', "Did you mean 'limits.max_sessions'?"),
        ("CARREL_MCP_SERVERS", "{", "CARREL_MCP_SERVERS: is not valid JSON; it wants a mapping"),
    ],
)
def test_a_mistake_in_the_environment_is_told_with_its_name(load, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as told:
        load()
    assert words in told.value.message


def test_variables_that_are_not_ours_are_left_alone(load, monkeypatch):
    for name in ("CLAUDE_AGENT_SDK_VERSION", "CARREL_SANDBOX", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_ENTRYPOINT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CARREL_PORT", "")
    assert load().port == 8000


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("prot=1", "--set prot: there is no such setting. Did you mean 'port'?"),
        ("port", "--set wants NAME=VALUE"),
        ("=1", "--set wants NAME=VALUE"),
        ("limits=3", "limits is a group of settings"),
        ("static_token=planted-secret", "everyone on this host can read a command line"),
        ("static_token=planted-secret", "--set static_token_file=FILE"),
        ("port=x", 'port (--set port): "x" is not allowed; it wants a whole number, at least 0, at most 65535.'),
    ],
)
def test_a_mistake_on_the_command_line_is_told(load, assignment, words):
    with pytest.raises(InvalidSettings) as told:
        load(assignments=[assignment])
    assert words in told.value.message
    assert "planted" not in told.value.message


def test_a_secrets_file_on_the_command_line(load, tmp_path):
    (tmp_path / "token").write_text("a-token-that-is-long-enough\n")
    settings = load(assignments=[f"static_token_file={tmp_path}/token"])
    assert settings.static_token.get_secret_value() == "a-token-that-is-long-enough"


def test_an_override_that_is_no_setting_is_told(load):
    with pytest.raises(InvalidSettings, match=r"there is no setting 'limits.max_session'"):
        load(overrides={"limits": {"max_session": 1}})
    with pytest.raises(InvalidSettings, match="limits is a group of settings"):
        load(overrides={"limits": 3})


def test_lists_mappings_and_nothing_in_variables(load, monkeypatch):
    monkeypatch.setenv("CARREL_CORS_ORIGINS", "https://a.example, https://b.example")
    monkeypatch.setenv("CARREL_READ_ONLY_PATHS", '["/srv/a,b"]')
    monkeypatch.setenv("CARREL_MCP_SERVERS", '{"files": {"command": "x"}}')
    monkeypatch.setenv("CARREL_LIMITS__SANDBOX_MEMORY_MB", "null")
    monkeypatch.setenv("CARREL_BUDGETS__USER", '{"max_usd": 2.5}')
    monkeypatch.setenv("carrel_memory", "yes")
    settings = load()
    assert settings.cors_origins == ["https://a.example", "https://b.example"]
    assert settings.read_only_paths == ["/srv/a,b"]
    assert settings.mcp_servers == {"files": {"command": "x"}}
    assert settings.limits.sandbox_memory_mb is None
    assert settings.budgets.user.max_usd == 2.5
    assert settings.memory


@pytest.mark.parametrize("leaf", SECRETS, ids=lambda leaf: leaf.name)
def test_every_secret_can_come_from_a_file(load, told, tmp_path, monkeypatch, leaf):
    secret = "postgresql://carrel:planted-secret-that-is-long-enough@db/carrel"
    (tmp_path / "secret").write_text(secret + "\n")
    monkeypatch.setenv(f"{leaf.variable}_FILE", str(tmp_path / "secret"))
    value = load()
    for part in leaf.name.split("."):
        value = getattr(value, part)
    assert value.get_secret_value() == secret
    assert told()[leaf.name].value == "********"
    monkeypatch.setenv(leaf.variable, secret)
    with pytest.raises(InvalidSettings) as both:
        load()
    assert f"{leaf.variable} and {leaf.variable}_FILE are both given" in both.value.message
    monkeypatch.delenv(leaf.variable)
    monkeypatch.delenv(f"{leaf.variable}_FILE")
    *path, last = leaf.name.split(".")
    assert told("".join(f"{name}: {{" for name in path) + f"{last}_file: {tmp_path}/secret" + "}" * len(path))[
        leaf.name
    ].source.endswith(f"config.yaml:1 ({leaf.name}_file)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\n", "is empty"),
        (b"\xff", "not a text"),
        (b"x" * 70_000, "too large"),
    ],
)
def test_a_secrets_file_that_is_none(load, tmp_path, content, words):
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    with pytest.raises(InvalidSettings, match=words):
        load(f"static_token_file: {tmp_path}/secret")
    with pytest.raises(InvalidSettings, match="wants a file's path"):
        load("static_token_file: 3")


def test_a_file_that_cannot_be_read(tmp_path):
    from carrel.settings import load_settings

    with pytest.raises(InvalidSettings, match="cannot be read: Is a directory"):
        load_settings(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(InvalidSettings, match="is not UTF-8"):
        load_settings(tmp_path / "config.yaml")


def test_yamls_own_shorthands(load):
    settings = load("defaults: &d\n  model: opus\nbudgets:\n  user: &b {max_usd: 3}\n  session: *b\n")
    assert settings.budgets.session.max_usd == 3
    assert load("budgets:\n  user: &b {max_usd: 3}\n  turn: {<<: *b, max_tokens: 4}\n").budgets.turn.max_usd == 3
