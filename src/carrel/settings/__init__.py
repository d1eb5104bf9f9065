"""Every setting, read once: defaults, then `config.yaml`, then the environment, then the command line.

| module | what |
|---|---|
| `model.py` | the settings, and what is refused of them |
| `names.py` | what each is called and may be |
| `aliases.py` | the names that older services have for them |
| `sources.py` | the file, the environment, the command line; the only reader of the environment |
| `loading.py` | from there to one frozen object |
| `pages.py` | the commented example file and docs/settings.md |
"""

from carrel.settings.loading import SettingLine, describe, load_settings
from carrel.settings.model import (
    Budgets,
    Database,
    DialectSettings,
    Jwt,
    Limits,
    Observability,
    Plugin,
    RateLimits,
    SessionDefaults,
    Settings,
    Users,
)
from carrel.settings.sources import provider_environment

__all__ = [
    "Budgets",
    "Database",
    "DialectSettings",
    "Jwt",
    "Limits",
    "Observability",
    "Plugin",
    "RateLimits",
    "SessionDefaults",
    "SettingLine",
    "Settings",
    "Users",
    "describe",
    "load_settings",
    "provider_environment",
]
