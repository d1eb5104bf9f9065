"""Every setting, read once: defaults, then `config.yaml`, then the environment, then the command line.

The only module that reads the environment.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from carrel.errors import InvalidSettings, UnsafeConfiguration
from carrel.model import Isolation, Network

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def _outside(name: str, default: Any, description: str, **more: Any) -> Any:
    """A setting that the world knows under a name of its own."""
    alias = AliasChoices(name, name.lower())
    return Field(default=default, validation_alias=alias, description=description, **more)


class Settings(BaseSettings):
    """How this installation runs."""

    model_config = SettingsConfigDict(
        env_prefix="CARREL_", frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True
    )

    host: str = Field(default="127.0.0.1", description="The address the API listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="The port the API listens on; 0 for any free one.")
    data: Path = Field(default=Path("carrel-data"), description="The folder that holds everything.")
    auth: Literal["key", "none"] = Field(default="key", description="`none`: no key is wanted; on loopback only.")
    allow_insecure: bool = Field(default=False, description="Permits what would be refused as unsafe. Logged at start.")
    memory: bool = Field(default=False, description="Keeps the database in memory: nothing outlives the server.")
    durability: Literal["process", "power"] = Field(
        default="process", description="What stored events survive: a killed process, or a power cut too."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="What is logged.")

    model_upstream: str = Field(
        default="anthropic",
        description="Where the model is: `anthropic`, `scripted`, `scripted:FILE`, or a URL.",
    )
    anthropic_api_key: SecretStr | None = _outside("ANTHROPIC_API_KEY", None, "The model's API key.")
    anthropic_auth_token: SecretStr | None = _outside("ANTHROPIC_AUTH_TOKEN", None, "Or a bearer token.")
    claude_code_oauth_token: SecretStr | None = _outside("CLAUDE_CODE_OAUTH_TOKEN", None, "Or a subscription's token.")
    anthropic_base_url: str = _outside("ANTHROPIC_BASE_URL", "https://api.anthropic.com", "The API's address.")
    anthropic_model: str | None = _outside("ANTHROPIC_MODEL", None, "The model of sessions that name none.")

    isolation: Isolation | None = Field(
        default=None, description="`bubblewrap` (default), `container` (we are in one), or `none`."
    )
    network: Network = Field(default=Network.GATEWAY_ONLY, description="What agents reach: `gateway-only` or `host`.")
    allow_bypass_without_isolation: bool = Field(
        default=False, description="Permits bypassPermissions where nothing isolates the agent."
    )
    read_only_paths: list[str] = Field(default=[], description="More of the host that sandboxes may read.")
    first_sandbox_uid: int = Field(
        default=700_000, ge=1000, description="As root, session N's agent runs as the user with this id plus N."
    )
    cli_path: Path | None = Field(default=None, description="Another Claude Code program than the one we bring.")

    idle_timeout_seconds: float = Field(default=600.0, gt=0, description="After it an idle session's process is freed.")
    launch_timeout_seconds: float = Field(default=60.0, gt=0, description="How long an agent may take to start.")
    reconnect_window_seconds: float = Field(default=300.0, gt=0, description="How long a runner awaits its gateway.")
    drain_seconds: float = Field(default=10.0, ge=0, description="At shutdown: how long running turns may finish.")
    max_queued_turns: int = Field(default=100, ge=1, description="Turns that may wait in one session.")
    max_frame_bytes: int = Field(default=64 * 2**20, ge=2**20, description="The largest message of an agent's.")
    max_file_bytes: int = Field(default=2**30, ge=1, description="The largest file that can be uploaded.")
    outbox_memory_bytes: int = Field(default=64 * 2**20, ge=1, description="What a runner keeps unstored in memory.")
    outbox_disk_bytes: int = Field(default=2**30, ge=0, description="And after that on disk.")
    stream_buffer_bytes: int = Field(default=4 * 2**20, ge=1, description="What waits for a viewer that is slow.")
    heartbeat_seconds: float = Field(default=15.0, gt=0, description="How often a silent stream shows it lives.")
    kill_at: str | None = Field(default=None, description="For the kill suite: `POINT` or `POINT:VISITS`.")

    config_file: ClassVar[Path | None] = None

    @field_validator("data")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("model_upstream")
    @classmethod
    def _known_upstream(cls, value: str) -> str:
        if value in ("anthropic", "scripted") or value.startswith(("scripted:", "http://", "https://")):
            return value
        raise ValueError("must be anthropic, scripted, scripted:FILE or a URL")

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if self.auth == "none" and not self.allow_insecure:
            if self.host not in _LOOPBACK:
                raise UnsafeConfiguration(
                    f"auth none on {self.host} would let anyone in. Keep the key, listen on 127.0.0.1, or set "
                    "allow_insecure: true."
                )
            if self.network is Network.HOST:
                raise UnsafeConfiguration(
                    "auth none with network host would let an agent drive this server. Keep the key, use network "
                    "gateway-only, or set allow_insecure: true."
                )
            if self.isolation in (Isolation.NONE, Isolation.CONTAINER):
                raise UnsafeConfiguration(
                    f"auth none with isolation {self.isolation} would let an agent drive this server. Keep the key, "
                    "isolate by bubblewrap, or set allow_insecure: true."
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line wins over the environment, the environment over the file."""
        return init_settings, env_settings


@dataclass(frozen=True)
class SettingLine:
    """A setting as `carrel settings` shows it."""

    name: str
    value: str
    source: str
    description: str


_SECRET = "********"


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read every setting.

    Args:
        config: the YAML file; without it, `DATA/config.yaml` is read where it exists.
        overrides: what the command line says; values of None say nothing.

    Raises:
        InvalidSettings: a value is wrong, or the file has a name that is not one of ours.
        UnsafeConfiguration: the settings together are unsafe.
    """
    settings, _ = _load(config, overrides)
    return settings


def describe(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> list[SettingLine]:
    """Every setting with its value, where the value comes from, and what it means. Secrets are not shown.

    Raises:
        InvalidSettings: as `load_settings`.
        UnsafeConfiguration: as `load_settings`.
    """
    settings, sources = _load(config, overrides)
    lines = []
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        shown = _SECRET if isinstance(value, SecretStr) else _plain(value)
        lines.append(SettingLine(name, shown, sources.get(name, "default"), field.description or ""))
    return lines


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _load(config: Path | None, overrides: Mapping[str, Any] | None) -> tuple[Settings, dict[str, str]]:
    said = {name: value for name, value in (overrides or {}).items() if value is not None}
    try:
        path = config or _default_file(said)
        from_file = _read(path) if path is not None else {}

        class Loaded(Settings):
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], *sources: Any, **named: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                first = named.get("init_settings") or sources[0]
                environment = named.get("env_settings") or sources[1]
                return first, environment, InitSettingsSource(settings_cls, init_kwargs=from_file)

        loaded = Loaded(**said)
    except ValidationError as error:
        raise InvalidSettings(_explain(error)) from error
    sources = dict.fromkeys(from_file, f"{path}")
    sources |= dict.fromkeys(_from_environment(), "environment")
    sources |= dict.fromkeys(said, "command line")
    return loaded, sources


def _default_file(said: Mapping[str, Any]) -> Path | None:
    path: Path = Settings(**{"data": said["data"]} if "data" in said else {}).data / "config.yaml"
    return path if path.is_file() else None


def _from_environment() -> set[str]:
    import os

    found = set()
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names = [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []
        if any(os.environ.get(known) for known in [*names, f"CARREL_{name.upper()}"]):
            found.add(name)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidSettings(f"The file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InvalidSettings(f"{path} is not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidSettings(f"{path} must have a setting a line, such as `port: 8000`.")
    for name in value:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(str(name), Settings.model_fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " `carrel settings` lists them all."
            raise InvalidSettings(f"{path}: there is no setting {name!r}.{hint}")
    return value


def _explain(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
