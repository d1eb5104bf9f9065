"""Environments: what an operator writes down once, so that sessions can be opened in it by a name."""

from __future__ import annotations

import re
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import to_json

from carrel.hostnames import HostPattern
from carrel.model import SECRET_NAME, Budget, Failure, Principal, SandboxTemplate
from carrel.protocol.spec import EnvName, GivenBudget, NoNul, Options, SessionSpec

__all__ = [
    "CUSTOM_SERVER",
    "DEFAULT_ENVIRONMENT",
    "ENVIRONMENT_NAME",
    "SECRET_NAME",
    "CustomTool",
    "Environment",
    "EnvironmentLimits",
    "EnvironmentSpec",
    "EnvironmentStatus",
    "Secret",
    "SecretUse",
    "secrets_in",
    "smaller_budget",
    "with_secrets",
]

ENVIRONMENT_NAME: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""What the name of an environment looks like."""
DEFAULT_ENVIRONMENT: Final = "default"
"""The environment of sessions that name none. Until somebody writes it, it is what the settings say: version 0."""
CUSTOM_SERVER: Final = "custom"
"""The name of the MCP server by which agents find the tools that their environment declares."""

_ROLE = r"^(admin|user|user:[A-Za-z0-9_-]{1,64})$"
_REFERENCE = re.compile(r"\$\{secret:([^}]*)\}")
_SERVER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HIDDEN = "[not shown]"


class SecretUse(Options):
    """A secret that the environment's sessions use, by its name."""

    name: str = Field(pattern=SECRET_NAME, description="Which secret.")
    expose: Literal["gateway", "env"] = Field(
        default="gateway",
        description="`gateway`: it stays outside of sandboxes, where the gateway adds it to headers of MCP servers. `env`: "
        "every agent of the environment holds it, in a variable.",
    )
    variable: EnvName | None = Field(default=None, description="With `env`: the variable; default: the secret's name.")
    git_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="With `gateway`: hosts of git repositories that sessions may have it sent to, such as `git.example.com`.",
    )

    @field_validator("git_hosts")
    @classmethod
    def _in_one_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(HostPattern.parse(each)) for each in value))

    @property
    def variable_name(self) -> str:
        """The variable that an agent finds it in."""
        return self.variable or self.name

    @model_validator(mode="after")
    def _variable_of_exposed(self) -> SecretUse:
        if self.expose == "env":
            if self.git_hosts:
                raise ValueError(f"{self.name}: git_hosts belongs to expose: gateway")
            SessionSpec(env_vars={self.variable_name: ""})
        elif self.variable is not None:
            raise ValueError(f"{self.name}: variable belongs to expose: env")
        return self


class CustomTool(Options):
    """A tool that is an address: the gateway sends it what the agent calls it with, and what it answers is the result."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Agents call it `mcp__custom__NAME`.")
    description: NoNul = Field(min_length=1, max_length=10_000, description="What it does, for the agent.")
    input_schema: dict[str, Any] = Field(
        description="A JSON schema of type `object`: what it takes. A call that does not fit is not sent.",
        json_schema_extra={"required": ["type"], "properties": {"type": {"const": "object"}}},
    )
    url: str = Field(
        max_length=2000,
        pattern=r"^(https://|http://(localhost|127\.0\.0\.1)[:/])",
        description="Where it is; plain http on this host alone, and private addresses as `egress.private_networks` says.",
    )
    timeout_seconds: float = Field(default=30.0, strict=True, gt=0, le=600, description="The longest it may take.")
    signed_with: str | None = Field(
        default=None, pattern=SECRET_NAME, description="The secret that requests are signed with (Standard Webhooks)."
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            if not parts.hostname or parts.port == 0:
                raise ValueError("no host, or port 0")
        except ValueError:
            raise ValueError("it is no address such as https://shop.example.com/price") from None
        return value

    @field_validator("input_schema")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type") != "object":
            raise ValueError("its type must be object")
        return value


class EnvironmentLimits(Options):
    """How much there may be in an environment. null: what holds without it."""

    max_sessions: int | None = Field(default=None, strict=True, ge=0, le=10**9, description="Sessions in all.")
    max_sessions_per_user: int | None = Field(
        default=None, strict=True, ge=0, le=10**9, description="Sessions of one user."
    )
    session_budget: GivenBudget | None = Field(
        default=None, description="What a session may spend in all; one that names a budget may name a smaller one."
    )


class EnvironmentSpec(Options):
    """What an environment is: how its sandboxes are made, how its agents are set up, and who may open sessions in it."""

    description: NoNul | None = Field(default=None, max_length=1000, description="What it is for, for people.")
    runtime: str | None = Field(
        default=None,
        max_length=64,
        description="Where its sandboxes run, such as `local` or `docker`; null: the default.",
    )
    sandbox: SandboxTemplate = Field(default=SandboxTemplate(), description="How its sandboxes are made.")
    options: SessionSpec = Field(default=SessionSpec(), description="How its agents are set up, in a session's words.")
    secrets: tuple[SecretUse, ...] = Field(default=(), max_length=100, description="The secrets it uses, by name.")
    custom_tools: tuple[CustomTool, ...] = Field(
        default=(), max_length=100, description="Tools of its agents that are addresses of yours."
    )
    limits: EnvironmentLimits = Field(default=EnvironmentLimits(), description="How much there may be in it.")
    warm_pool: Annotated[int, Field(strict=True, ge=0, le=1000)] = Field(
        default=0, description="How many connected agents are kept ready for sessions to come."
    )
    idle_timeout_seconds: float | None = Field(
        default=None,
        gt=0,
        le=10**7,
        description="After it an idle session's sandbox is freed; null: as the settings say.",
    )
    allowed_roles: tuple[Annotated[str, StringConstraints(pattern=_ROLE)], ...] = Field(
        default=("user",),
        max_length=1000,
        description="Who may open sessions in it: `user` (everybody), `admin`, `user:ID`. An admin always may.",
    )

    @field_validator("sandbox")
    @classmethod
    def _no_variables_of_ours(cls, value: SandboxTemplate) -> SandboxTemplate:
        SessionSpec(env_vars=value.variables)
        return value

    @model_validator(mode="after")
    def _secrets_fit(self) -> EnvironmentSpec:
        names = [use.name for use in self.secrets]
        if len(set(names)) != len(names):
            raise ValueError("secrets: each is named once")
        variables = [use.variable_name for use in self.secrets if use.expose == "env"]
        taken = {*self.sandbox.variables, *(self.options.env_vars or {})}
        if len(set(variables)) != len(variables) or taken & set(variables):
            raise ValueError("secrets: two things would stand in the same variable")
        for name, server in self.gateway_servers.items():
            if not _SERVER_NAME.fullmatch(name):
                raise ValueError(f"options.mcp_servers.{name}: beside a secret, a name is letters, digits, _ and -")
            if not server["url"].startswith(("http://", "https://")):
                raise ValueError(f"options.mcp_servers.{name}: url begins with https:// or http://")
        for name, server in (self.options.mcp_servers or {}).items():
            rest = {key: value for key, value in server.items() if key != "headers"}
            if secrets_in(rest) or (secrets_in(server) and server.get("type") != "http"):
                raise ValueError(
                    f"options.mcp_servers.{name}: a secret can stand in the headers of a server of type http alone"
                )
            for secret in secrets_in(server):
                if secret not in names:
                    raise ValueError(f"options.mcp_servers.{name}: the secret {secret} is not among secrets")
        tools = [tool.name for tool in self.custom_tools]
        if len(set(tools)) != len(tools):
            raise ValueError("custom_tools: each name is taken once")
        if tools and CUSTOM_SERVER in (self.options.mcp_servers or {}):
            raise ValueError(f"options.mcp_servers.{CUSTOM_SERVER}: the name is that of the custom tools")
        for tool in self.custom_tools:
            if tool.signed_with is not None and tool.signed_with not in names:
                raise ValueError(f"custom_tools: the secret {tool.signed_with} is not among secrets")
        headers = secrets_in({name: server["headers"] for name, server in self.gateway_servers.items()})
        headers += [tool.signed_with for tool in self.custom_tools if tool.signed_with is not None]
        for use in self.secrets:
            if use.expose == "gateway" and use.name not in headers and not use.git_hosts:
                raise ValueError(
                    f"secrets: {use.name} stands in no header of an MCP server; say expose: env to hand it to agents"
                )
        if self.options.network is not None:
            raise ValueError("options.network: what sandboxes reach stands in sandbox.network")
        without_servers = self.options.model_dump(mode="json", exclude={"mcp_servers"}, exclude_none=True)
        if secrets_in(without_servers) or secrets_in(self.sandbox.variables):
            raise ValueError("a secret can stand in the headers of MCP servers of type http alone")
        return self

    @property
    def gateway_servers(self) -> dict[str, dict[str, Any]]:
        """The MCP servers that agents reach by the gateway alone, because it adds secrets to their headers."""
        servers = self.options.mcp_servers or {}
        return {
            name: server
            for name, server in servers.items()
            if server.get("type") == "http" and secrets_in(server.get("headers"))
        }

    @property
    def behind_gateway(self) -> list[str]:
        """The names of all MCP servers that agents reach by the gateway alone."""
        return [*self.gateway_servers, *([CUSTOM_SERVER] if self.custom_tools else [])]

    @property
    def digest(self) -> str:
        """The same for the same content, so that what is applied twice makes one version."""
        return sha256(to_json(_sorted(self.model_dump(mode="json", exclude_none=True)))).hexdigest()

    def admits(self, principal: Principal) -> bool:
        """Whether the caller may open sessions in it, and read it."""
        if principal.is_admin or "user" in self.allowed_roles:
            return True
        return f"user:{principal.user}" in self.allowed_roles

    def without_inner_facts(self) -> EnvironmentSpec:
        """What a user who is no admin is shown: no folders of the host, no values of variables, no headers."""
        hidden = dict.fromkeys(self.sandbox.variables, _HIDDEN)
        sandbox = self.sandbox.model_copy(update={"mounts": (), "plugins": None, "variables": hidden})
        servers = self.options.mcp_servers
        shown = None if servers is None else {name: _without_values(server) for name, server in servers.items()}
        variables = self.options.env_vars
        options = self.options.model_copy(
            update={
                "mcp_servers": shown,
                "env_vars": None if variables is None else dict.fromkeys(variables, _HIDDEN),
            }
        )
        tools = tuple(tool.model_copy(update={"url": _HIDDEN}) for tool in self.custom_tools)
        return self.model_copy(update={"sandbox": sandbox, "options": options, "custom_tools": tools})


class Environment(BaseModel):
    """A version of an environment. It never changes; a change makes the next one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(pattern=ENVIRONMENT_NAME)
    version: int = Field(ge=0, description="Counts from 1; 0 is `default` as the settings say.")
    spec: EnvironmentSpec
    created_at: datetime
    created_by: str | None = Field(default=None, description="The user who wrote this version.")


class EnvironmentStatus(BaseModel):
    """How an environment does, as it is now."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    version: int = Field(description="The newest; it is what new sessions and the warm pool are of.")
    running: bool = Field(description="Whether it takes prompts.")
    warm_wanted: int = Field(description="How many connected agents its warm pool is to have.")
    warm: int = Field(description="How many it has.")
    starting: int = Field(description="How many are being started for it.")
    sessions: int = Field(description="Sessions of all versions.")
    live_sessions: int = Field(description="Those of them that have a sandbox, or are getting one.")
    problems: list[Failure] = Field(description="What would keep a session from working as it should.")


class Secret(BaseModel):
    """A secret as it is kept: sealed. Its value is never told again."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(pattern=SECRET_NAME)
    key_id: str = Field(description="Which of the operator's keys it is sealed with.")
    sealed: str = Field(exclude=True, repr=False)
    created_at: datetime
    updated_at: datetime
    updated_by: str | None = Field(default=None, description="The user who set it last.")


def secrets_in(value: Any) -> list[str]:
    """The names of the secrets that `${secret:NAME}` stands for, anywhere in a value."""
    if isinstance(value, str):
        return _REFERENCE.findall(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [name for part in parts for name in secrets_in(part)]


def with_secrets(text: str, values: dict[str, str]) -> str:
    """The text with secrets in the place of their names. Raises KeyError for one that is not among `values`."""
    return _REFERENCE.sub(lambda found: values[found.group(1)], text)


def smaller_budget(one: Budget | None, other: Budget | None) -> Budget | None:
    """The budget that keeps to both."""
    if one is None or other is None:
        return one or other
    return Budget(max_usd=_least(one.max_usd, other.max_usd), max_tokens=_least(one.max_tokens, other.max_tokens))


def _least(one: Any, other: Any) -> Any:
    return min((value for value in (one, other) if value is not None), default=None)


def _without_values(server: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dict.fromkeys(value, _HIDDEN) if key in ("headers", "env") and isinstance(value, dict) else value
        for key, value in server.items()
    }


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
