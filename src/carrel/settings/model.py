"""Every setting there is, and what is refused of them.

How they are read stands in `sources.py`; the older services' names for them in `aliases.py`.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from carrel import __version__
from carrel.errors import UnsafeConfiguration
from carrel.model import Budget, HostFolder, Isolation, NetworkPolicy, PermissionMode
from carrel.protocol.spec import SessionSpec

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PUBLISHED_SECRETS = frozenset(
    {
        "0123456789abcdef",
        "change-me",
        "change-this-in-production",
        "change-this-secret",
        "changeme",
        "default",
        "dev-secret",
        "development",
        "example",
        "jwt-secret",
        "jwtsecret",
        "my-secret",
        "mysecret",
        "password",
        "secret",
        "supersecret",
        "test",
        "your-api-token",
        "your-jwt-secret",
        "your-secret",
        "your-secret-key",
        "your-secret-key-change-in-production",
        "your-super-secret-key",
    }
)
"""Secrets out of examples and documentation, in small letters with `-` between words."""

_PUBLISHED_OBJECT_KEYS = frozenset(
    {
        "access-key",
        "accesskey",
        "admin",
        "changeme",
        "garage",
        "minio",
        "minio123",
        "minioadmin",
        "miniopassword",
        "password",
        "rustfsadmin",
        "secret-key",
        "secretkey",
        "test",
        "your-access-key",
        "your-secret-key",
    }
)
"""What servers that speak S3 are delivered with, and what their guides show."""


def _outside(name: str, default: Any, description: str, **more: Any) -> Any:
    """A setting that the world knows under a name of its own."""
    return Field(default=default, description=description, json_schema_extra={"variable": name}, **more)


def _strong(value: SecretStr | None, least_bytes: int) -> SecretStr | None:
    """The secret, unless anybody could guess it. What is wrong is told without it."""
    if value is None:
        return None
    text = value.get_secret_value()
    if re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") in _PUBLISHED_SECRETS:
        raise ValueError("is a secret out of an example, which everybody knows; make one: openssl rand -base64 48")
    if len(text.encode()) < least_bytes:
        raise ValueError(f"is shorter than {least_bytes} bytes; make one: openssl rand -base64 48")
    return value


def _networks(value: list[str]) -> list[str]:
    for address in value:
        try:
            ipaddress.ip_network(address, strict=False)
        except ValueError as error:
            raise ValueError(
                f"{address!r} is no address; write one such as 10.0.0.7, or a network such as 10.0.0.0/8"
            ) from error
    return value


class Group(BaseModel):
    """Settings that belong together: `limits: {max_sessions: 20}`, or `CARREL_LIMITS__MAX_SESSIONS=20`."""

    # Hidden: a secret that is wrong must not be told in a traceback.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)


class Users(Group):
    """Where users' own directories are."""

    base_dir: Path | None = Field(default=None, description="The folder of all of them; default: DATA/users.")
    auto_create_dir: bool = Field(default=True, description="Whether a directory that is not there is made.")


class Limits(Group):
    """How much there may be at once. None: no limit."""

    max_sessions: int | None = Field(default=None, ge=1, description="Sessions in all.")
    max_sessions_per_user: int | None = Field(default=None, ge=1, description="Sessions of one user.")
    max_depth: int = Field(default=5, ge=0, description="Sessions above one; 0: none begins another.")
    max_children: int = Field(default=10, ge=0, description="Sessions that one has begun; stopped ones do not count.")
    max_tree: int = Field(default=50, ge=0, description="Sessions below the first of a tree; likewise.")
    max_concurrent_turns: int | None = Field(default=None, ge=1, description="Turns at work in all; others wait.")
    max_waiting_turns: int = Field(default=1000, ge=1, description="Turns that may wait, in all sessions together.")
    memory_mb: int | None = Field(
        default=None, ge=64, description="All sandboxes together: above it idle ones are freed, then new work waits."
    )
    memory_wait_seconds: float = Field(default=30.0, ge=0, description="How long new work waits for memory.")
    disk_reserve_mb: int = Field(
        default=64, ge=0, description="Room in the data folder that is given back when agents have filled the disk."
    )
    sandbox_memory_mb: int | None = Field(default=4096, ge=256, description="One sandbox; above it, it is ended.")
    sandbox_processes: int | None = Field(default=512, ge=16, description="Processes and threads of one sandbox.")
    sandbox_cpus: float | None = Field(default=None, gt=0, description="CPUs that one sandbox may use.")
    sandbox_disk_mb: int | None = Field(
        default=None, ge=16, description="Mebibytes that one session's workspace and home may take; above, it is ended."
    )
    sandbox_caps: Literal["auto", "cgroup", "watchdog"] = Field(
        default="auto", description="What holds a sandbox to these: control groups, or a look each second, or the best."
    )


class Budgets(Group):
    """What may be spent unless a session, a turn or a user says otherwise. None: no limit."""

    turn: Budget = Field(default=Budget(), description="One turn.")
    session: Budget = Field(default=Budget(), description="One session.")
    user: Budget = Field(default=Budget(), description="One user, in all.")
    user_day: Budget = Field(default=Budget(), description="One user, a day (UTC).")


class RateLimits(Group):
    """How many requests there may be, such as `600/minute`. None: no limit."""

    per_key: str | None = Field(default=None, description="Of one caller.")
    per_address: str | None = Field(default=None, description="Of one address, before it is known who calls.")

    @field_validator("per_key", "per_address")
    @classmethod
    def _is_rate(cls, value: str | None) -> str | None:
        if value is None:
            return None
        from limits import parse_many

        try:
            parse_many(value)
        except ValueError as error:
            raise ValueError("must be a rate such as 600/minute, or several: 10/second; 600/minute") from error
        return value


class Jwt(Group):
    """Who may vouch for callers by JSON Web Tokens."""

    secret: SecretStr | None = Field(default=None, description="HS256: the shared secret, of at least 32 bytes.")
    jwks_url: str | None = Field(default=None, description="RS256, ES256: where the keys are.")
    issuer: str | None = Field(default=None, description="Must be the token's `iss`; without jwks_url, asked for keys.")
    audience: str | None = Field(default=None, description="Must be among the token's `aud`.")
    leeway_seconds: float = Field(default=30.0, ge=0, le=600, description="How far clocks may differ.")
    user_claim: str = Field(default="sub", description="The claim that names the user.")
    scope_claim: str = Field(default="scope", description="The claim with the scopes; without it, read and write.")

    @field_validator("secret")
    @classmethod
    def _strong_secret(cls, value: SecretStr | None) -> SecretStr | None:
        return _strong(value, 32)


class SessionDefaults(Group):
    """The options of sessions that do not name them."""

    system_prompt: str | None = Field(default=None, description="Replaces Claude Code's system prompt.")
    permission_mode: PermissionMode | None = Field(default=None, description="The permission mode.")
    allowed_tools: list[str] | None = Field(default=None, description="Tools that may be used without asking.")
    disallowed_tools: list[str] | None = Field(default=None, description="Tools that may not be used.")
    setting_sources: list[Literal["user", "project", "local"]] | None = Field(
        default=None, description="Which settings files are read."
    )
    model: str | None = Field(default=None, description="The model; wins over ANTHROPIC_MODEL.")
    max_turns: int | None = Field(default=None, ge=1, description="Model requests a turn may make.")
    ttl_seconds: int | None = Field(
        default=None,
        ge=0,
        le=10**9,
        description="Deleted when unused for so long; 0: never. Unset, never too, but for a dialect with another default.",
    )


class Egress(Group):
    """The proxy behind which the names of `network: {allow: [...]}` lie."""

    private_networks: list[str] = Field(
        default=[],
        description="Private networks that a name may lead to, such as 10.20.0.0/16 for a mirror of packages in it.",
    )
    max_connections: int = Field(default=64, ge=1, description="Connections of one sandbox at once.")
    idle_seconds: float = Field(default=120.0, gt=0, description="After so long without a byte a connection is ended.")
    max_mb: int = Field(default=4096, ge=1, description="What one connection carries at most, each way.")

    @field_validator("private_networks")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        return _networks(value)


class GitSettings(Group):
    """What workspaces of type `git` may be cloned from."""

    protocols: list[Literal["https", "http"]] = Field(
        default=["https"], description="By what repositories are cloned; none: `file://` at most."
    )
    folders: list[Path] = Field(
        default=[], description="Folders of this server below which `file://` repositories may be cloned by every user."
    )
    private_networks: list[str] = Field(
        default=[], description="Private networks that a repository's host may be in, such as 10.20.0.0/16."
    )
    timeout_seconds: float = Field(default=300.0, gt=0, le=86_400, description="How long a clone may take.")
    max_mb: int = Field(default=4096, ge=1, description="The most that one may hold, its history included.")

    @field_validator("private_networks")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        return _networks(value)

    @field_validator("folders")
    @classmethod
    def _absolute(cls, value: list[Path]) -> list[Path]:
        return [each.expanduser().absolute() for each in value]


class SnapshotSettings(Group):
    """How the files of sessions are kept."""

    enabled: bool = Field(default=True, description="Whether files are kept after each turn; without, nothing is.")
    keep: int = Field(default=100, ge=1, description="How many of one workspace are kept; the oldest go first.")
    keep_days: float | None = Field(
        default=None, gt=0, description="After so many days they go; the newest of a workspace stays."
    )
    keep_mb: int | None = Field(
        default=None,
        ge=1,
        description="What those of one workspace may take; beyond it the oldest go, but for the newest.",
    )
    keep_mb_per_user: int | None = Field(
        default=None, ge=1, description="The same of all that belong to one user's sessions."
    )
    max_mb: int = Field(default=4096, ge=1, description="The most that one may hold; larger workspaces are not kept.")
    ignored: list[str] = Field(
        default=[], description="Patterns of names, or of paths in the workspace, that are not kept: `node_modules`."
    )


class ObjectSettings(Group):
    """Where snapshots and artifacts are."""

    kind: Literal["disk", "s3", "gcs", "azure"] = Field(
        default="disk", description="`s3` is whatever speaks like it too: MinIO, Ceph, R2."
    )
    path: Path | None = Field(default=None, description="disk: the folder; default: DATA/objects.")
    bucket: str | None = Field(default=None, description="The bucket, or Azure's container; it must exist.")
    prefix: str | None = Field(default=None, description="The folder in the bucket, where it is not all ours.")
    endpoint: str | None = Field(default=None, description="The server's address, where it is not the provider's own.")
    region: str | None = Field(default=None, description="s3: the region; default: us-east-1.")
    account: str | None = Field(default=None, description="azure: the storage account.")
    access_key: SecretStr | None = Field(
        default=None, description="s3: the access key; without keys those of the machine's role are used."
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description="s3: the secret key. azure: the account's key. gcs: a service account's key, as JSON.",
    )
    encryption_key: SecretStr | None = Field(
        default=None, description="Encrypts what is stored from now on; a text of at least 32 bytes."
    )
    old_encryption_keys: SecretStr | None = Field(
        default=None, description="Earlier encryption keys, with spaces between; what they have closed can be opened."
    )
    accept_unencrypted: bool = Field(
        default=False, description="Whether with an encryption key what was stored without one can be read."
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, description="How long one request may take, and how long one that fails is repeated."
    )

    @field_validator("access_key", "secret_key")
    @classmethod
    def _not_published(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and value.get_secret_value().strip().lower() in _PUBLISHED_OBJECT_KEYS:
            raise ValueError("is the key that servers are delivered with, which everybody knows; set one of your own")
        return value

    @field_validator("encryption_key", "old_encryption_keys")
    @classmethod
    def _are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        for text in [] if value is None else value.get_secret_value().split() or [""]:
            _strong(SecretStr(text), 32)
        return value

    @field_validator("endpoint")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc):
            raise ValueError("must be a URL such as https://minio.example.com:9000")
        return value

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None

    @model_validator(mode="after")
    def _complete(self) -> ObjectSettings:
        if self.kind != "disk" and not self.bucket:
            raise ValueError(f"kind {self.kind} needs a bucket")
        if self.kind == "azure" and not self.account:
            raise ValueError("kind azure needs an account")
        if self.kind == "s3" and (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key belong together; give both or neither")
        return self


class Plugin(Group):
    """A plugin of Claude Code's on this host."""

    type: Literal["local"] = Field(default="local", description="The only type there is.")
    path: str = Field(description="Its folder.")

    @field_validator("path")
    @classmethod
    def _is_plugin(cls, value: str) -> str:
        folder = Path(value).expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        return str(folder)


class Database(Group):
    """Where rows are."""

    url: SecretStr | None = Field(default=None, description="`postgresql://…`; without it, SQLite.")
    path: Path | None = Field(default=None, description="SQLite: the file; default: DATA/carrel.db.")
    pool_size: int = Field(default=10, ge=1, le=200, description="PostgreSQL: connections.")
    statement_timeout_seconds: float = Field(default=30.0, gt=0, description="PostgreSQL: the longest statement.")
    outage_seconds: float = Field(
        default=15.0, ge=0, description="PostgreSQL: how long a request waits for a database that is away."
    )

    @field_validator("url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
        return value

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None


class DialectSettings(Group):
    """An older service that Carrel speaks like."""

    port: int | None = Field(
        default=None, ge=0, le=65535, description="A listener of its own; without it, /compat alone."
    )
    host: str = Field(default="127.0.0.1", description="The address of that listener.")
    auth: Literal["keys", "static-token", "jwt", "none"] = Field(default="keys", description="Who may call it.")


class Docker(Group):
    """Sandboxes that are containers."""

    host: str = Field(
        default="unix:///var/run/docker.sock",
        description="Where the engine is: a socket of this host's, or a proxy's before it (`tcp://socket-proxy:2375`).",
    )
    tls_ca: Path | None = Field(
        default=None, description="An engine at `tcp://` is spoken to by TLS: whose certificate (PEM) its own is of."
    )
    tls_cert: Path | None = Field(default=None, description="Our certificate, by which it knows us (PEM).")
    tls_key: Path | None = Field(default=None, description="The key of our certificate (PEM).")
    image: str = Field(default=f"carrel-sandbox:{__version__}", description="What sandboxes are made of.")
    platform: str | None = Field(default=None, description="Such as `linux/arm64`; default: the engine's own.")
    oci_runtime: str | None = Field(default=None, description="Another runtime of the engine's, such as `runsc`.")
    mounts: list[HostFolder] = Field(default=[], description="Folders of the engine's host that every sandbox sees.")
    tmp_mb: int = Field(default=512, ge=16, description="The most in a sandbox's /tmp; it counts as its memory.")
    shm_mb: int = Field(default=64, ge=1, description="The most in its /dev/shm; likewise.")
    oom_score_adj: int = Field(
        default=500, ge=0, le=1000, description="How readily the host's kernel ends it for want of memory."
    )
    stop_grace_seconds: int = Field(default=10, ge=0, description="What `docker stop` leaves it for its last words.")
    wait_seconds: float = Field(default=30.0, ge=0, description="How long a launch waits for an engine that is away.")
    data_on_host: Path | None = Field(
        default=None,
        description="Where the engine's host has the data folder; default: found out, where we run in a container.",
    )

    @field_validator("host")
    @classmethod
    def _is_local(cls, value: str) -> str:
        if not value.startswith(("unix:///", "tcp://")):
            raise ValueError(
                "must be unix:///PATH, or tcp://HOST:PORT of an engine, or a proxy before it, of this host"
            )
        return value

    @field_validator("tls_ca", "tls_cert", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None

    @model_validator(mode="after")
    def _whole(self) -> Docker:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or neither")
        if self.tls_cert is not None and self.tls_ca is None:
            raise ValueError("tls_cert needs tls_ca: who is told our name is to be known by its own")
        if self.tls_ca is not None and not self.host.startswith("tcp://"):
            raise ValueError("tls_ca is for a host at tcp://HOST:PORT")
        return self


class Observability(Group):
    """What is told to whom."""

    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: readable to a terminal, JSON otherwise."
    )
    tracing: bool = Field(default=False, description="OpenTelemetry traces; where to is said by the OTEL_ variables.")
    audit_prompts: bool = Field(default=False, description="Whether the audit log has the text of prompts.")
    audit_days: int = Field(default=365, ge=1, description="How long the audit log is kept.")


class Settings(Group):
    """How this installation runs."""

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
    credentials: Literal["gateway", "direct"] = Field(
        default="gateway",
        description="`gateway`: the model's credential never enters a sandbox. `direct`: every sandbox holds it and "
        "talks to the provider itself (Bedrock, Vertex); nothing is metered, and network must be host.",
    )
    anthropic_api_key: SecretStr | None = _outside("ANTHROPIC_API_KEY", None, "The model's API key.")
    anthropic_auth_token: SecretStr | None = _outside("ANTHROPIC_AUTH_TOKEN", None, "Or a bearer token.")
    claude_code_oauth_token: SecretStr | None = _outside("CLAUDE_CODE_OAUTH_TOKEN", None, "Or a subscription's token.")
    anthropic_base_url: str = _outside("ANTHROPIC_BASE_URL", "https://api.anthropic.com", "The API's address.")
    anthropic_model: str | None = _outside("ANTHROPIC_MODEL", None, "The model of sessions that name none.")

    runtime: Literal["local", "docker"] = Field(
        default="local", description="What sandboxes are: processes of this host, or containers of a Docker engine."
    )
    runtimes: list[Literal["local", "docker"]] = Field(
        default=[], description="Others that are at hand beside it, for environments to choose from."
    )
    docker: Docker = Field(default=Docker(), description="Sandboxes that are containers.")
    isolation: Isolation | None = Field(
        default=None, description="`bubblewrap` (default), `container` (we are in one), or `none`."
    )
    network: NetworkPolicy = Field(
        default=NetworkPolicy(),
        description="What agents reach: `gateway-only`, `{allow: [names]}` through the egress proxy, or `open` (`host`).",
        json_schema_extra={"whole": True},
    )
    egress: Egress = Field(default=Egress(), description="The egress proxy.")
    allow_bypass_without_isolation: bool = Field(
        default=False, description="Permits bypassPermissions where nothing isolates the agent."
    )
    read_only_paths: list[str] = Field(default=[], description="More of the host that sandboxes may read.")
    first_sandbox_uid: int = Field(
        default=700_000, ge=1000, description="As root, session N's agent runs as the user with this id plus N."
    )
    cli_path: Path | None = Field(default=None, description="Another Claude Code program than the one we bring.")

    idle_timeout_seconds: float = Field(default=600.0, gt=0, description="After it an idle session's process is freed.")
    defer_after_seconds: float = Field(
        default=30.0,
        ge=0,
        description="How long a process is held for a call that waits for a person and can do without.",
    )
    live_hold_seconds: float = Field(
        default=3600.0, gt=0, description="How long it is held for one that cannot; then the call is denied for now."
    )
    warm_pool: int = Field(
        default=0, ge=0, le=1000, description="Sandboxes with a connected agent that wait for new sessions."
    )
    launch_timeout_seconds: float = Field(default=60.0, gt=0, description="How long an agent may take to start.")
    reconnect_window_seconds: float = Field(default=300.0, gt=0, description="How long a runner awaits its gateway.")
    drain_seconds: float = Field(default=10.0, ge=0, description="At shutdown: how long running turns may finish.")
    max_queued_turns: int = Field(default=100, ge=1, description="Turns that may wait in one session.")
    max_frame_bytes: int = Field(default=64 * 2**20, ge=2**20, description="The largest message of an agent's.")
    max_file_bytes: int = Field(default=2**30, ge=1, description="The largest file that can be uploaded.")
    max_archive_bytes: int = Field(
        default=4 * 2**30, ge=1, description="The most that an archive may hold, unpacked, that is uploaded or fetched."
    )
    outbox_memory_bytes: int = Field(default=64 * 2**20, ge=1, description="What a runner keeps unstored in memory.")
    outbox_disk_bytes: int = Field(default=2**30, ge=0, description="And after that on disk.")
    stream_buffer_bytes: int = Field(default=4 * 2**20, ge=1, description="What waits for a viewer that is slow.")
    heartbeat_seconds: float = Field(default=15.0, gt=0, description="How often a silent stream shows it lives.")
    objects: ObjectSettings = Field(default=ObjectSettings(), description="Where snapshots and artifacts are.")
    snapshots: SnapshotSettings = Field(default=SnapshotSettings(), description="How the files of sessions are kept.")
    git: GitSettings = Field(default=GitSettings(), description="Workspaces that begin with a clone of a repository.")
    users: Users = Field(default=Users(), description="Users' own directories.")
    limits: Limits = Field(default=Limits(), description="How much there may be at once.")
    budgets: Budgets = Field(default=Budgets(), description="What may be spent.")
    rate_limits: RateLimits = Field(default=RateLimits(), description="How many requests there may be.")
    jwt: Jwt = Field(default=Jwt(), description="JSON Web Tokens.")
    static_token: SecretStr | None = Field(
        default=None, description="One bearer token, of at least 16 bytes, that may read and write as user `static`."
    )
    cors_origins: list[str] = Field(default=[], description="Pages of these origins may call; none by default.")
    trusted_proxies: list[str] = Field(
        default=[], description="Addresses whose X-Forwarded-For is believed; none by default."
    )
    database: Database = Field(default=Database(), description="Where rows are.")
    secrets_key: SecretStr | None = Field(
        default=None,
        description="The key that secrets of environments are sealed with: 32 bytes in base64. Older ones behind it, with "
        "a comma between, open what they have sealed; it is sealed anew at start. Without it, no secret is kept.",
    )
    defaults: SessionDefaults = Field(default=SessionDefaults(), description="Options of sessions.")
    mcp_servers: dict[str, dict[str, Any]] = Field(default={}, description="MCP servers of every session, by name.")
    plugins: list[Plugin] = Field(default=[], description="Plugins of every session.")
    prices_file: Path | None = Field(default=None, description="A YAML table of prices that wins over the shipped one.")
    dialects: dict[Literal["claude-agent-http", "claudecode-api", "sdk-server"], DialectSettings] = Field(
        default={}, description="Older services that Carrel speaks like."
    )
    observability: Observability = Field(default=Observability(), description="Logs, traces, audit.")
    kill_at: str | None = Field(default=None, description="For the kill suite: `POINT` or `POINT:VISITS`.")

    @field_validator("data")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("network", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """`host` is what `open` was called first; a variable says a list of names in JSON."""
        if value == "host":
            return "open"
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError('is not valid JSON; write it as {"allow": ["example.org"]}') from None
        return value

    @field_validator("model_upstream")
    @classmethod
    def _known_upstream(cls, value: str) -> str:
        if value in ("anthropic", "scripted") or value.startswith(("scripted:", "http://", "https://")):
            return value
        raise ValueError("must be anthropic, scripted, scripted:FILE or a URL")

    @field_validator("static_token")
    @classmethod
    def _strong_token(cls, value: SecretStr | None) -> SecretStr | None:
        return _strong(value, 16)

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is no origin; write one such as https://app.example.com, without a path")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        return _networks(value)

    @field_validator("mcp_servers")
    @classmethod
    def _are_servers(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        try:
            return SessionSpec(mcp_servers=value).mcp_servers or {}
        except ValidationError as error:  # told in our words: its own show what was given, secrets included
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.memory and self.database.url is not None:
            raise ValueError("memory: true and database.url exclude each other; give one of them")
        ports = {"port": self.port} | {
            f"dialects.{name}.port": dialect.port for name, dialect in self.dialects.items() if dialect.port is not None
        }
        for one, other in _pairs(list(ports)):
            if ports[one] == ports[other] != 0:
                raise ValueError(f"{one} and {other} are both {ports[one]}; give each listener a port of its own")
        for name, dialect in self.dialects.items():
            if dialect.auth == "static-token" and self.static_token is None:
                raise ValueError(f"dialects.{name}.auth static-token needs static_token")
            if dialect.auth == "jwt" and not (self.jwt.secret or self.jwt.jwks_url or self.jwt.issuer):
                raise ValueError(f"dialects.{name}.auth jwt needs jwt.secret, jwt.jwks_url or jwt.issuer")
        return self

    @model_validator(mode="after")
    def _direct_can_work(self) -> Settings:
        if self.credentials == "direct":
            if self.network.mode != "open":
                raise ValueError("credentials: direct needs network: host, since each sandbox asks the provider itself")
            if not all(budget.unlimited for budget in dict(self.budgets).values()):
                raise ValueError("budgets cannot hold with credentials: direct, which passes our meter by")
        return self

    @model_validator(mode="after")
    def _network_can_hold(self) -> Settings:
        if self.network.mode == "allow" and self.unwalled is not None:
            raise ValueError(
                f"network: allow cannot hold with isolation {self.isolation}, where agents reach all we do"
            )
        return self

    @model_validator(mode="after")
    def _bypasses_nothing(self) -> Settings:
        if (
            self.defaults.permission_mode is PermissionMode.BYPASS
            and self.unwalled is Isolation.NONE
            and not self.allow_bypass_without_isolation
        ):
            raise UnsafeConfiguration(
                "defaults.permission_mode bypassPermissions with isolation none would let every agent do as it likes "
                "on this host. Use another mode, an isolation, or set allow_bypass_without_isolation: true."
            )
        return self

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if self.allow_insecure:
            return self
        if "*" in self.cors_origins:
            raise UnsafeConfiguration(
                "cors_origins '*' would let every page in the world call with its visitor's credentials. List the "
                "origins of your own pages, such as cors_origins: [https://app.example.com]."
            )
        if self.auth == "none":
            self._refuse_open("auth none", self.host, "Keep the key")
        for name, dialect in self.dialects.items():
            if dialect.auth == "none":
                # It is served on our own listener too, under /compat.
                for host in {self.host, dialect.host if dialect.port is not None else self.host}:
                    self._refuse_open(f"dialects.{name}.auth none", host, "Use another auth")
        return self

    @property
    def unwalled(self) -> Isolation | None:
        """The isolation that is none of agents who are processes beside us; None where every agent has a wall around it."""
        no_wall = self.isolation in (Isolation.NONE, Isolation.CONTAINER)
        return self.isolation if no_wall and "local" in (self.runtime, *self.runtimes) else None

    @property
    def wants_keys(self) -> bool:
        """Whether everybody who calls must say who they are."""
        return self.auth != "none" and all(dialect.auth != "none" for dialect in self.dialects.values())

    def _refuse_open(self, what: str, host: str, instead: str) -> None:
        if host not in _LOOPBACK:
            raise UnsafeConfiguration(
                f"{what} on {host} would let anyone in. {instead}, listen on 127.0.0.1, or set allow_insecure: true."
            )
        if self.network.mode == "open":
            raise UnsafeConfiguration(
                f"{what} with network host would let an agent drive this server. {instead}, use network "
                "gateway-only, or set allow_insecure: true."
            )
        if self.unwalled is not None:
            raise UnsafeConfiguration(
                f"{what} with isolation {self.isolation} would let an agent drive this server. {instead}, "
                "isolate by bubblewrap, or set allow_insecure: true."
            )


def _pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    return ((one, other) for index, one in enumerate(names) for other in names[index + 1 :])
