"""Two texts made from the model: a commented `config.yaml`, and docs/settings.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

import yaml
from pydantic import BaseModel

from carrel.settings.aliases import ALIASES, OLD_DEFAULTS
from carrel.settings.loading import shown
from carrel.settings.model import Settings
from carrel.settings.names import Leaf, is_whole, leaves

__all__ = ["documentation", "example"]

_WIDTH = 116
_HIDDEN = frozenset({"kill_at"})
"""For our own tests."""

_SHOWN_AS = {
    "mcp_servers": {
        "files": {"type": "stdio", "command": "python3", "args": ["/srv/mcp/files.py"], "env": {"ROOT": "/workspace"}},
        "docs": {"type": "http", "url": "https://docs.example.com/mcp", "headers": {"X-Team": "blue"}},
    },
    "plugins": [{"type": "local", "path": "/srv/plugins/review"}],
    "dialects": {
        "claude-agent-http": {"port": 8000, "host": "127.0.0.1", "auth": "keys"},
        "claudecode-api": {"port": 3001, "auth": "keys"},
        "sdk-server": {"port": 3000},
    },
}
"""What is empty unless somebody says something, shown once in a comment."""


def example() -> str:
    """A whole `config.yaml` with every setting at its default and its meaning above it."""
    lines = [
        "# Carrel's settings: every one, at its default. Keep the lines you change and remove the rest.",
        "# An environment variable wins over this file, the command line over both; `carrel settings` shows what holds.",
        "# A secret can stand in a file of its own: `static_token_file: /run/secrets/token` in place of `static_token`.",
        "",
    ]
    lines += _group(Settings, Settings(), "")
    return "\n".join(lines) + "\n"


def _group(model: type[BaseModel], values: BaseModel, indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name in _HIDDEN:
            continue
        value = field.get_default(call_default_factory=True)
        opened = isinstance(value, BaseModel) and not is_whole(field)
        leaf = Leaf(name, field)
        description = field.description or ""
        if not opened and name not in _SHOWN_AS:
            description += f" ({leaf.allowed})"
        yield from (f"{indent}# {line}" for line in textwrap.wrap(description, _WIDTH - len(indent)))
        if opened:
            yield f"{indent}{name}:"
            yield from _group(type(value), value, indent + "  ")
            continue
        if name in _SHOWN_AS:
            text = yaml.safe_dump({name: _SHOWN_AS[name]}, sort_keys=False)
            yield from (f"{indent}#   {line}" for line in text.splitlines())
        if isinstance(value, list):
            yield f"{indent}{name}: {yaml.safe_dump(value, default_flow_style=True).strip()}"
        else:
            yield f"{indent}{yaml.safe_dump({name: _plain(value)}, sort_keys=False).strip()}"
        if not indent:
            yield ""
    if indent == "  ":
        yield ""


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, PurePath) else value


def documentation() -> str:
    """docs/settings.md, whole."""
    return "\n".join([_INTRODUCTION, *_table(), _ALIASES, *_alias_table(), _AFTER])


def _table() -> Iterator[str]:
    yield "| setting | default | meaning | allowed |"
    yield "|---|---|---|---|"
    for leaf in leaves():
        if leaf.name in _HIDDEN:
            continue
        default = f"`{shown(leaf, leaf.default)}`" if leaf.default is not None else ""
        yield f"| `{leaf.name}` | {default} | {_cell(leaf.description)} | {_cell(leaf.allowed)} |"


def _alias_table() -> Iterator[str]:
    yield "| there | here |"
    yield "|---|---|"
    by_setting: dict[str, list[str]] = {}
    for alias in ALIASES.values():
        by_setting.setdefault(alias.of, []).append(f"`{alias.name}`")
    for name, names in by_setting.items():
        if name.startswith("session."):
            yield f"| `{name}`, {', '.join(names)} | `memory` and `database.url` |"
        else:
            yield f"| {', '.join(names)} | `{name}` |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_INTRODUCTION = """\
# Settings

This page is made from the code (`carrel settings --docs`); a test holds it up to date.

Settings come from four places, and the later wins: the **default**, the **file** (`--config FILE`, else that
of `CARREL_CONFIG`, else `DATA/config.yaml`), the **environment**, the **command line**. They are read once, when the
server starts.

```yaml
# config.yaml
limits:
  max_sessions: 20
```

```sh
CARREL_LIMITS__MAX_SESSIONS=20 carrel serve      # CARREL_ and the name in capitals; two underscores for the dot
carrel serve --set limits.max_sessions=20        # any setting; may be repeated
carrel settings                                  # what holds, and where it was said; secrets are not shown
carrel settings --example > config.yaml          # every setting with its default and its meaning
```

- A **list** in a variable is separated by commas, or JSON: `CARREL_CORS_ORIGINS=https://a.example,https://b.example`.
  A mapping, and a whole group, is JSON: `CARREL_MCP_SERVERS='{"files": {"command": "/usr/bin/files-mcp"}}'`.
- `null` is no value: `CARREL_LIMITS__SANDBOX_MEMORY_MB=null` takes the limit away. An empty variable says nothing.
- **Secrets** can come from files: add `_FILE` to the variable (`ANTHROPIC_API_KEY_FILE=/run/secrets/key`,
  `CARREL_JWT__SECRET_FILE`, `CARREL_DATABASE__URL_FILE`, …) or `_file` to the name (`jwt: {secret_file: …}`). Both the
  secret and its file in one place are an error.
- **A wrong name** is an error that says which one you may have meant and where it stands, in the file as in variables
  that begin with `CARREL_` or `CLAUDE_AGENT_`. So is a name twice, or a setting under two names with two values.
- **What is unsafe is refused** unless `allow_insecure: true`, which is logged at every start: no authentication beyond
  loopback or where agents reach the server; `*` in `cors_origins`. Secrets out of examples, and short ones, are always
  refused.

## Every setting

The variables of the settings that begin with `anthropic_` and of `claude_code_oauth_token` have no `CARREL_` before
them: `ANTHROPIC_API_KEY`.
"""

_ALIASES = """
## The names of claude-agent-http, and others

A `config.yaml` and an environment of claude-agent-http work as they are. Its names set ours; both at once are an error
where they disagree.
"""

_OLD_DEFAULTS = ", ".join(f"`{name}` {value}" for name, value in OLD_DEFAULTS["claude-agent-http"].items())

_AFTER = f"""
- `session.storage` is `memory`, `sqlite` (in `session.sqlite_path`) or `postgresql`, which the `session.pg_` names
  describe: `localhost`, 5432, database `claude_agent`, user `postgres` unless they are given. They say nothing without it.
- `api.host` and `api.port` are the listener of that dialect and switch it on; `api.host` alone means port 8000. Where both
  would have 8000, the dialect keeps it and Carrel's own API moves to 8100.
- `PORT` and `API_PORT` count only where their dialect is switched on, and give way to any other name.
- Where the dialect is switched on, its old limits hold for the server unless others are given: {_OLD_DEFAULTS}.
"""
