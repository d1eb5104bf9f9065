"""The older services' names set our settings."""

import pytest

from carrel.errors import InvalidSettings
from carrel.settings.aliases import ALIASES
from carrel.settings.sources import known

# What dialects.md lists of claude-agent-http, written out a second time: a name that gets lost in the table is missed.
FILE = """
user: {base_dir: /srv/users, auto_create_dir: false}
session: {storage: sqlite, ttl: 60, sqlite_path: /srv/db/sessions.db, pg_host: db, pg_port: 5433, pg_database: d,
          pg_user: u, pg_password: p}
api: {host: '::1', port: 9001, cors_origins: [https://a.example], max_sessions: 21, max_sessions_per_user: 6,
      max_concurrent_requests: 7, memory_limit_mb: 7000, idle_session_timeout: 601}
defaults: {system_prompt: Be brief., permission_mode: acceptEdits, allowed_tools: [Bash], setting_sources: [user],
           cli_path: /bin/true, model: opus, max_turns: 51, max_budget_usd: 1.5}
mcp_servers:
  one: {type: stdio, command: x, args: [y], env: {A: b}}
  two: {type: sse, url: http://two}
plugins: [{type: local, path: /usr}]
"""
ENVIRONMENT = {
    "USER_BASE_DIR": "/srv/users",
    "USER_AUTO_CREATE_DIR": "false",
    "SESSION_STORAGE": "sqlite",
    "SESSION_TTL": "60",
    "SESSION_SQLITE_PATH": "/srv/db/sessions.db",
    "SESSION_PG_HOST": "db",
    "SESSION_PG_PORT": "5433",
    "SESSION_PG_DATABASE": "d",
    "SESSION_PG_USER": "u",
    "SESSION_PG_PASSWORD": "p",
    "API_HOST": "::1",
    "API_PORT": "9001",
    "MAX_SESSIONS": "21",
    "MAX_SESSIONS_PER_USER": "6",
    "MAX_CONCURRENT": "7",
    "MEMORY_LIMIT_MB": "7000",
    "IDLE_SESSION_TIMEOUT": "601",
    "CLI_PATH": "/bin/true",
    "DEFAULTS_MODEL": "opus",
    "DEFAULTS_MAX_TURNS": "51",
    "DEFAULTS_MAX_BUDGET_USD": "1.5",
}


def check(settings):
    assert (str(settings.users.base_dir), settings.users.auto_create_dir) == ("/srv/users", False)
    assert (settings.memory, settings.database.url) == (False, None)
    assert str(settings.database.path) == "/srv/db/sessions.db"
    dialect = settings.dialects["claude-agent-http"]
    assert (dialect.host, dialect.port, dialect.auth) == ("::1", 9001, "keys")
    assert (settings.limits.max_sessions, settings.limits.max_sessions_per_user) == (21, 6)
    assert (settings.limits.max_concurrent_turns, settings.limits.memory_mb) == (7, 7000)
    assert settings.idle_timeout_seconds == 601
    assert str(settings.cli_path) == "/bin/true"
    assert (settings.defaults.model, settings.defaults.max_turns, settings.defaults.ttl_seconds) == ("opus", 51, 60)
    assert settings.budgets.session.max_usd == 1.5


def test_sessions_that_never_expire(load):
    assert load("session: {ttl: 0}").defaults.ttl_seconds == 0


def test_its_file(load):
    settings = load(FILE)
    check(settings)
    assert settings.cors_origins == ["https://a.example"]
    assert (settings.defaults.system_prompt, settings.defaults.permission_mode) == ("Be brief.", "acceptEdits")
    assert (settings.defaults.allowed_tools, settings.defaults.setting_sources) == (["Bash"], ["user"])
    assert sorted(settings.mcp_servers) == ["one", "two"]
    assert settings.plugins[0].path == "/usr"


def test_its_environment(load, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(f"CLAUDE_AGENT_{name}", value)
    check(load())
    assert {f"CLAUDE_AGENT_{name}" for name in ENVIRONMENT} == {
        name for name in ALIASES if name.startswith("CLAUDE_AGENT")
    }


def test_anthropics_environment(load, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "t")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://base")
    monkeypatch.setenv("ANTHROPIC_MODEL", "opus")
    settings = load()
    assert settings.anthropic_api_key.get_secret_value() == "k"
    assert settings.anthropic_auth_token.get_secret_value() == "t"
    assert (settings.anthropic_base_url, settings.anthropic_model) == ("http://base", "opus")


@pytest.mark.parametrize("alias", ALIASES.values(), ids=lambda alias: alias.name)
def test_every_alias_names_a_setting(alias):
    assert alias.of in known.leaves


def test_two_names_for_one_setting(load, told, monkeypatch):
    with pytest.raises(InvalidSettings) as error:
        load("api: {max_sessions: 7}\nlimits: {max_sessions: 8}")
    assert "api.max_sessions (" in error.value.message
    assert "both set limits.max_sessions, and not to the same value" in error.value.message
    assert load("api: {max_sessions: 7}\nlimits: {max_sessions: 7}").limits.max_sessions == 7
    monkeypatch.setenv("CLAUDE_AGENT_MAX_SESSIONS", "9")
    assert told("limits: {max_sessions: 8}")["limits.max_sessions"].source == "CLAUDE_AGENT_MAX_SESSIONS"
    monkeypatch.setenv("CARREL_LIMITS__MAX_SESSIONS", "10")
    with pytest.raises(InvalidSettings, match="CARREL_LIMITS__MAX_SESSIONS and CLAUDE_AGENT_MAX_SESSIONS both set"):
        load()


@pytest.mark.parametrize(
    ("text", "memory", "url"),
    [
        ("session: {storage: memory, pg_host: db}", True, None),
        ("session: {storage: sqlite}", False, None),
        ("session: {storage: postgresql}", False, "postgresql://postgres@localhost:5432/claude_agent"),
        (
            "session: {storage: postgresql, pg_host: db, pg_port: 5433, pg_database: d, pg_user: u, pg_password: 'a@/b'}",
            False,
            "postgresql://u:a%40%2Fb@db:5433/d",
        ),
        ("session: {storage: postgresql, pg_host: '::1'}", False, "postgresql://postgres@[::1]:5432/claude_agent"),
    ],
)
def test_where_rows_are(load, text, memory, url):
    settings = load(text)
    assert settings.memory is memory
    assert (settings.database.url.get_secret_value() if settings.database.url else None) == url


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("session: {storage: mysql}", "it wants one of memory, sqlite, postgresql, or null."),
        ("session: {storage: postgresql, pg_port: x}", "session.pg_port ("),
        ("session: {pg_host: db}", "says nothing without session.storage"),
        ("session: {storage: memory}\nmemory: false", "both set memory"),
        ("session: {storage: postgresql}\ndatabase: {url: 'postgresql://planted@x/y'}", "both set database.url"),
        ("session: {storage: postgresql}\nmemory: true", "both set memory"),
    ],
)
def test_storage_that_contradicts_itself(load, text, words):
    with pytest.raises(InvalidSettings) as told:
        load(text)
    assert words in told.value.message
    assert "planted" not in told.value.message


def test_storage_in_the_environment_wins_over_the_file(load, monkeypatch):
    monkeypatch.setenv("CLAUDE_AGENT_SESSION_STORAGE", "sqlite")
    assert load("database: {url: 'postgresql://x/y'}").database.url is None


def test_a_password_from_a_file(load, tmp_path, monkeypatch):
    (tmp_path / "password").write_text("deep\n")
    monkeypatch.setenv("CLAUDE_AGENT_SESSION_STORAGE", "postgresql")
    monkeypatch.setenv("CLAUDE_AGENT_SESSION_PG_PASSWORD_FILE", str(tmp_path / "password"))
    assert ":deep@" in load().database.url.get_secret_value()


def test_a_dialect_keeps_the_port_its_clients_know(load, told, monkeypatch):
    assert load().port == 8000
    lines = told("api: {port: 8000}")
    assert (lines["port"].value, lines["dialects.claude-agent-http.port"].value) == ("8100", "8000")
    assert lines["port"].source == "moved, because dialects.claude-agent-http.port is 8000"
    assert load("api: {host: '::1'}").dialects["claude-agent-http"].port == 8000
    assert load("dialects: {claude-agent-http: {host: '::1'}}").dialects["claude-agent-http"].port is None
    assert load("port: 8000\napi: {port: 8000}").port == 8100
    with pytest.raises(InvalidSettings, match="are both 9000"):
        load("port: 9000\napi: {port: 9000}")
    monkeypatch.setenv("CLAUDE_AGENT_API_PORT", "8000")
    assert load().port == 8100


def test_ambient_ports_count_where_their_dialect_is_on(load, monkeypatch):
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("API_PORT", "9002")
    assert load().dialects == {}
    on = load("dialects: {sdk-server: {}, claude-agent-http: }").dialects
    assert (on["sdk-server"].port, on["claude-agent-http"].port) == (9001, 9002)
    assert set(load("dialects: {sdk-server: {}}").dialects) == {"sdk-server"}
    monkeypatch.setenv("CLAUDE_AGENT_API_PORT", "9003")
    monkeypatch.setenv("CARREL_DIALECTS__SDK_SERVER__PORT", "9004")
    on = load().dialects
    assert (on["sdk-server"].port, on["claude-agent-http"].port) == (9004, 9003)


def test_a_legacy_session_is_the_token_of_last_resort(load, monkeypatch):
    monkeypatch.setenv("CLAUDE_CODE_SESSION", "old")
    assert load().claude_code_oauth_token.get_secret_value() == "old"
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "new")
    assert load().claude_code_oauth_token.get_secret_value() == "new"


def test_its_old_limits_hold_where_the_dialect_is_on(load, told):
    assert load().limits.max_concurrent_turns is None
    limits = load("dialects: {claude-agent-http: {}}").limits
    assert (limits.max_concurrent_turns, limits.memory_mb) == (5, 7168)
    assert told("api: {port: 1}")["limits.memory_mb"].source == "default of claude-agent-http"
    assert load("api: {port: 1}\nlimits: {max_concurrent_turns: 3}").limits.max_concurrent_turns == 3
    assert load("api: {port: 1}\nlimits: {memory_mb: null}").limits.memory_mb is None
