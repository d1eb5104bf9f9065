"""The names that older services have for our settings: one table, and what a name alone cannot say.

A YAML name and the variable beside it set the same thing. `session.storage` and the `session.pg_` names have no
setting of ours each: together they say where rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from pydantic import Field, SecretStr

from carrel.settings.model import Group

__all__ = ["ALIASES", "OLD_DEFAULTS", "OLD_PORTS", "Alias", "OldSession", "database_url"]


@dataclass(frozen=True)
class Alias:
    """Another name of a setting."""

    name: str
    of: str
    ambient: bool = False
    """A name that others use for things of their own: it gives way to any other name of the setting."""
    dialect: str | None = None
    """It counts only where this dialect is switched on otherwise."""


class OldSession(Group):
    """`session.` of claude-agent-http, with its defaults."""

    storage: Literal["memory", "sqlite", "postgresql"] | None = Field(default=None, description="Where rows are.")
    pg_host: str = Field(default="localhost", description="PostgreSQL: the host.")
    pg_port: int = Field(default=5432, ge=1, le=65535, description="PostgreSQL: the port.")
    pg_database: str = Field(default="claude_agent", description="PostgreSQL: the database.")
    pg_user: str = Field(default="postgres", description="PostgreSQL: the user.")
    pg_password: SecretStr | None = Field(default=None, description="PostgreSQL: the password.")


def database_url(old: OldSession) -> str:
    """The address that the `session.pg_` names say together."""
    password = f":{quote(old.pg_password.get_secret_value(), safe='')}" if old.pg_password else ""
    host = f"[{old.pg_host}]" if ":" in old.pg_host else old.pg_host
    return (
        f"postgresql://{quote(old.pg_user, safe='')}{password}@{host}:{old.pg_port}/{quote(old.pg_database, safe='')}"
    )


_CLAUDE_AGENT_HTTP: tuple[tuple[str | None, str | None, str], ...] = (
    ("user.base_dir", "CLAUDE_AGENT_USER_BASE_DIR", "users.base_dir"),
    ("user.auto_create_dir", "CLAUDE_AGENT_USER_AUTO_CREATE_DIR", "users.auto_create_dir"),
    (None, "CLAUDE_AGENT_SESSION_STORAGE", "session.storage"),
    ("session.ttl", "CLAUDE_AGENT_SESSION_TTL", "defaults.ttl_seconds"),
    ("session.sqlite_path", "CLAUDE_AGENT_SESSION_SQLITE_PATH", "database.path"),
    (None, "CLAUDE_AGENT_SESSION_PG_HOST", "session.pg_host"),
    (None, "CLAUDE_AGENT_SESSION_PG_PORT", "session.pg_port"),
    (None, "CLAUDE_AGENT_SESSION_PG_DATABASE", "session.pg_database"),
    (None, "CLAUDE_AGENT_SESSION_PG_USER", "session.pg_user"),
    (None, "CLAUDE_AGENT_SESSION_PG_PASSWORD", "session.pg_password"),
    ("api.host", "CLAUDE_AGENT_API_HOST", "dialects.claude-agent-http.host"),
    ("api.port", "CLAUDE_AGENT_API_PORT", "dialects.claude-agent-http.port"),
    ("api.cors_origins", None, "cors_origins"),
    ("api.max_sessions", "CLAUDE_AGENT_MAX_SESSIONS", "limits.max_sessions"),
    ("api.max_sessions_per_user", "CLAUDE_AGENT_MAX_SESSIONS_PER_USER", "limits.max_sessions_per_user"),
    ("api.max_concurrent_requests", "CLAUDE_AGENT_MAX_CONCURRENT", "limits.max_concurrent_turns"),
    ("api.memory_limit_mb", "CLAUDE_AGENT_MEMORY_LIMIT_MB", "limits.memory_mb"),
    ("api.idle_session_timeout", "CLAUDE_AGENT_IDLE_SESSION_TIMEOUT", "idle_timeout_seconds"),
    ("defaults.cli_path", "CLAUDE_AGENT_CLI_PATH", "cli_path"),
    ("defaults.max_budget_usd", "CLAUDE_AGENT_DEFAULTS_MAX_BUDGET_USD", "budgets.session.max_usd"),
    (None, "CLAUDE_AGENT_DEFAULTS_MODEL", "defaults.model"),
    (None, "CLAUDE_AGENT_DEFAULTS_MAX_TURNS", "defaults.max_turns"),
)

_AMBIENT = (
    Alias("API_PORT", "dialects.claude-agent-http.port", ambient=True, dialect="claude-agent-http"),
    Alias("API_TOKEN", "static_token", ambient=True, dialect="claudecode-api"),
    Alias("ALLOWED_ORIGINS", "cors_origins", ambient=True, dialect="claudecode-api"),
    Alias("PORT", "dialects.sdk-server.port", ambient=True, dialect="sdk-server"),
    Alias("CLAUDE_CODE_SESSION", "claude_code_oauth_token", ambient=True),
)

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        *(Alias(name, ours) for names in _CLAUDE_AGENT_HTTP for name in names[:2] if name for ours in names[2:]),
        *_AMBIENT,
    )
}

OLD_DEFAULTS: dict[str, dict[str, int | str]] = {
    "claude-agent-http": {
        "limits.max_concurrent_turns": 5,
        "limits.memory_mb": 7168,
    },
    "claudecode-api": {"dialects.claudecode-api.auth": "static-token"},
}
"""What holds for the server where a dialect is switched on and nobody says otherwise.

How many sessions there may be holds for the dialect's own alone, so that default stands in the dialect.
"""

OLD_PORTS: dict[str, int] = {"claude-agent-http": 8000}
"""Where a dialect listens that is given an address by its older service's name, and no port."""
