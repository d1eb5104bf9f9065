"""The options of a session and of a turn, as a caller writes them.

Each option of a session says when a change of it takes effect: `live` at once, `launch` when the agent is next started.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from carrel.model import (
    Budget,
    ChildFiles,
    GivenNetwork,
    OnDisconnect,
    OnParentEnd,
    OnSandboxLost,
    PermissionMode,
    Workspace,
)
from carrel.protocol.permissions import PermissionRules
from carrel.protocol.presets import PRESETS, written_out

MAX_PROMPT_CHARS = 10_000_000
MAX_METADATA_BYTES = 65_536

EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
ToolRule = Annotated[str, StringConstraints(min_length=1, max_length=2_000)]
NoNul = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]

_RESERVED_ENV = (
    "ANTHROPIC_",
    "CLAUDE_",
    "CARREL_",
    "LD_",
    "NODE_OPTIONS",
    "BUN_",
    "PATH",
    "HOME",
    "IS_SANDBOX",
    "DISABLE_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)


McpServer = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "stdio"},
                        "command": {"type": "string"},
                        "args": {"type": "array", "items": {"type": "string"}},
                        "env": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                    "required": ["command"],
                },
                {
                    "type": "object",
                    "properties": {
                        "type": {"enum": ["sse", "http"]},
                        "url": {"type": "string"},
                        "headers": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                    "required": ["type", "url"],
                },
                {"type": "object", "properties": {"preset": {"enum": list(PRESETS)}}, "required": ["preset"]},
            ]
        }
    ),
]


class GivenBudget(Budget):
    """What may be spent at most; null: no limit."""

    model_config = ConfigDict(strict=True)  # in settings a number may be a text, in JSON it may not


class _Agent(BaseModel):
    """A sub-agent, in Claude Code's own words (`AgentDefinition` of the Agent SDK)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    description: str
    prompt: str
    tools: list[str] | None = None
    disallowedTools: list[str] | None = None
    model: str | None = None
    skills: list[str] | None = None
    memory: Literal["user", "project", "local"] | None = None
    mcpServers: list[str | dict[str, Any]] | None = None
    initialPrompt: str | None = None
    maxTurns: int | None = None
    background: bool | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | int | None = None
    permissionMode: Literal["default", "acceptEdits", "plan", "bypassPermissions", "dontAsk", "auto"] | None = None


AgentDefinition = Annotated[dict[str, Any], WithJsonSchema(_Agent.model_json_schema())]


class Options(BaseModel):
    """Options that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _applies(
    when: Literal["live", "launch"], description: str, schema: dict[str, Any] | None = None, **constraints: Any
) -> Any:
    """An option that takes effect at a certain time; `schema` says in JSON Schema what a validator below checks."""
    extra = {"x-applies": when, **(schema or {})}
    return Field(default=None, description=description, json_schema_extra=extra, **constraints)


def _unless_both(*names: str) -> dict[str, Any]:
    return {"not": {"required": list(names), "properties": {name: {"type": "string"} for name in names}}}


class SessionSpec(Options):
    """How a session's agent is set up. Every field is optional and has Claude Code's own default."""

    model_config = ConfigDict(json_schema_extra=_unless_both("system_prompt", "append_system_prompt"))

    system_prompt: NoNul | None = _applies("launch", "Replaces Claude Code's system prompt.", max_length=1_000_000)
    append_system_prompt: NoNul | None = _applies(
        "launch", "Added to Claude Code's system prompt.", max_length=1_000_000
    )
    model: NoNul | None = _applies("live", "The model, or an alias such as `opus`.", min_length=1, max_length=200)
    fallback_model: NoNul | None = _applies(
        "launch", "Used when the model is overloaded.", min_length=1, max_length=200
    )
    permission_mode: PermissionMode | None = _applies("live", "Default: `bypassPermissions` in an isolated sandbox.")
    tools: list[ToolRule] | None = _applies("launch", "The tools that exist for the agent; `[]` for none.")
    allowed_tools: list[ToolRule] | None = _applies("launch", "The tools it may use without asking.")
    disallowed_tools: list[ToolRule] | None = _applies("launch", "The tools it may not use.")
    permissions: PermissionRules | None = _applies(
        "launch", "Rules for calls of tools, in Claude Code's syntax; they hold in every mode, `deny` before all."
    )
    ask_expires_seconds: float | None = _applies(
        "launch",
        "What asks a person is denied after so long; 0: at once, nobody is there to ask. Default: it waits for ever.",
        strict=True,
        ge=0,
        le=315_360_000,
    )
    ask_remind_seconds: float | None = _applies(
        "launch",
        "How often people are told again of what still waits for them. Default: never.",
        strict=True,
        ge=1,
        le=315_360_000,
    )
    defer_after_seconds: float | None = _applies(
        "launch",
        "How long its process is kept for a call that waits for a person; then it ends, and the answer wakes it.",
        strict=True,
        ge=0,
        le=315_360_000,
    )
    mcp_servers: dict[str, McpServer] | None = _applies(
        "launch", "MCP servers by name (stdio, sse, http, or a preset)."
    )
    agents: dict[str, AgentDefinition] | None = _applies("launch", "Sub-agents by name.")
    skills: list[str] | Literal["all"] | None = _applies("launch", "The skills to enable, or `all`.")
    setting_sources: list[Literal["user", "project", "local"]] | None = _applies(
        "launch", "Which settings files of the sandbox are read."
    )
    session_tools: StrictBool | None = _applies(
        "launch", "Whether its agent can begin children and ask people, by tools `mcp__carrel__…`; default: it cannot."
    )
    max_turns: int | None = _applies("launch", "Model requests a turn may make.", ge=1, le=100_000)
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = _applies("launch", "How hard the model tries.")
    thinking: dict[str, Any] | None = _applies(
        "launch",
        'Such as `{"type": "adaptive"}`.',
        {
            "required": ["type"],
            "properties": {"type": {"enum": ["adaptive", "enabled", "disabled"]}},
            "if": {"properties": {"type": {"const": "enabled"}}, "required": ["type"]},
            "then": {"properties": {"budget_tokens": {"type": "integer"}}, "required": ["budget_tokens"]},
        },
    )
    output_format: dict[str, Any] | None = _applies(
        "launch",
        '`{"type": "json_schema", "schema": {…}}`.',
        {
            "required": ["type", "schema"],
            "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
        },
    )
    network: GivenNetwork | None = _applies(
        "launch", "What its commands reach: no more than they would without this. `gateway-only`, or names to allow."
    )
    env_vars: dict[EnvName, NoNul] | None = _applies("launch", "Variables for the agent's commands; never secrets.")

    @field_validator("env_vars")
    @classmethod
    def _not_ours(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name in value or {}:
            if name.upper().startswith(_RESERVED_ENV):
                raise ValueError(f"{name} is set by Carrel and cannot be given here")
        return value

    @field_validator("output_format")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and (value.get("type") != "json_schema" or not isinstance(value.get("schema"), dict)):
            raise ValueError('must be {"type": "json_schema", "schema": {…}}')
        return value

    @field_validator("thinking")
    @classmethod
    def _is_thinking(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        kind = value.get("type")
        if kind not in ("adaptive", "enabled", "disabled"):
            raise ValueError("type must be adaptive, enabled or disabled")
        if kind == "enabled" and type(value.get("budget_tokens")) is not int:
            raise ValueError("enabled needs budget_tokens, a whole number")
        return value

    @field_validator("mcp_servers")
    @classmethod
    def _are_servers(cls, value: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        servers: dict[str, dict[str, Any]] = {}
        for name, given in (value or {}).items():
            if name == "carrel":
                raise ValueError("carrel is the name of Carrel's own server; give another")
            try:
                server = servers[name] = written_out(given)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            kind = server.get("type", "stdio")
            needed = "command" if kind == "stdio" else "url"
            if kind not in ("stdio", "sse", "http"):
                raise ValueError(f"{name}: type must be stdio, sse or http")
            if not isinstance(server.get(needed), str):
                raise ValueError(f"{name}: a {kind} server needs {needed}")
            args, env = server.get("args", []), server.get("env" if kind == "stdio" else "headers", {})
            if kind == "stdio" and not (isinstance(args, list) and all(isinstance(item, str) for item in args)):
                raise ValueError(f"{name}: args must be a list of texts")
            if not (isinstance(env, dict) and all(isinstance(item, str) for item in env.values())):
                raise ValueError(f"{name}: env and headers must be texts by their names")
        return None if value is None else servers

    @field_validator("agents")
    @classmethod
    def _are_agents(cls, value: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        for name, agent in (value or {}).items():
            try:
                _Agent.model_validate(agent)
            except ValidationError as error:
                wrong = error.errors()[0]
                where = ".".join(str(part) for part in wrong["loc"])
                raise ValueError(
                    f"{name}: {where}: {wrong['msg']}; an agent needs a description and a prompt"
                ) from error
        return value

    def permission_rules(self) -> PermissionRules:
        """Every rule that these options hold, put together."""
        given = self.permissions or PermissionRules()
        return PermissionRules.model_construct(
            allow=(*given.allow, *(self.allowed_tools or ())),
            ask=given.ask,
            deny=(*given.deny, *(self.disallowed_tools or ())),
        )

    @model_validator(mode="after")
    def _one_prompt(self) -> SessionSpec:
        if self.system_prompt is not None and self.append_system_prompt is not None:
            raise ValueError("give system_prompt or append_system_prompt, not both")
        return self


LIVE_FIELDS = frozenset(
    name
    for name, field in SessionSpec.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("x-applies") == "live"
)
"""The options of a session that take effect at once; all others apply when its agent is next started."""


class _Described(Options):
    title: NoNul | None = Field(default=None, max_length=500, description="A name for people.")
    metadata: dict[str, Any] | None = Field(default=None, description="Anything of yours, as JSON up to 64 KiB.")
    budget: GivenBudget | None = Field(
        default=None, description="What it may spend in all; default: what the settings say."
    )

    @field_validator("metadata")
    @classmethod
    def _bounded(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        from pydantic_core import to_json

        if value is not None and len(to_json(value)) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is larger than {MAX_METADATA_BYTES} bytes")
        return value


class CreateSession(SessionSpec, _Described):
    """The body of `POST /sessions`."""

    environment: str = Field(
        default="default", max_length=64, description="The environment it is opened in, by name; it keeps the version."
    )
    workspace: Workspace | None = Field(default=None, description="Where its files live.")
    ttl_seconds: int | None = Field(
        default=None, ge=1, le=3_153_600_000, description="Deleted when unused for so long; default: never."
    )

    def spec(self) -> SessionSpec:
        """The part that the agent is started with."""
        return SessionSpec.model_validate(self.model_dump(include=set(SessionSpec.model_fields), exclude_none=True))


class UpdateSession(SessionSpec, _Described):
    """The body of `PATCH /sessions/{id}`: what is given is changed, `null` goes back to the default."""

    environment: str | None = _applies(
        "launch", "Another environment, or the newest version of its own; null: `default`.", max_length=64
    )
    environment_version: int | None = _applies(
        "launch", "Another version of its environment; null: the newest.", ge=0, le=10**9
    )


class CreateChild(_Described):
    """The body of `POST /sessions/{id}/children`."""

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        pattern=r"\S",
        description="What the child is to do; it is handed over once, whatever happens.",
    )
    environment: str | None = Field(
        default=None, max_length=64, description="Another environment, with no more rights; null: its parent's."
    )
    options: SessionSpec = Field(
        default=SessionSpec(), description="Its own options; what it does not name is as its parent has it."
    )
    workspace: ChildFiles = Field(
        default=ChildFiles.INHERIT,
        description="`inherit`: its parent's files. `clone`: a copy of them as they are now, which "
        "`POST /sessions/{id}/patch/apply` brings back. `ephemeral`: an empty folder.",
    )
    context: dict[str, Any] = Field(default={}, description="What it is handed, by name, as JSON up to 64 KiB.")
    task_type: NoNul | None = Field(default=None, max_length=100, description="A word for what it is for.")
    timeout_seconds: float | None = Field(
        default=None, gt=0, le=604_800, description="Interrupts its first turn; never later than its parent's."
    )
    on_parent_end: OnParentEnd = Field(
        default=OnParentEnd.STOP, description="When its parent is stopped: `stop` it too, or `keep` it at work."
    )

    @field_validator("context")
    @classmethod
    def _context_bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        from pydantic_core import to_json

        if len(to_json(value)) > MAX_METADATA_BYTES:
            raise ValueError(f"context is larger than {MAX_METADATA_BYTES} bytes")
        return value


class _Block(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class TextBlock(_Block):
    """A text of a prompt."""

    type: Literal["text"]
    text: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")


class Source(_Block):
    """Where an image or a document comes from: `{"type": "base64", "media_type": "image/png", "data": "…"}`."""

    type: Literal["base64", "url", "file", "text", "content"]


class ImageBlock(_Block):
    """An image of a prompt."""

    type: Literal["image"]
    source: Source


class DocumentBlock(_Block):
    """A document of a prompt."""

    type: Literal["document"]
    source: Source


ContentBlock = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]
"""A block of a prompt, in the shape of the Messages API. A text block without a text would hang the agent (tried)."""


class TurnOptions(Options):
    """How one turn is run."""

    timeout_seconds: float | None = Field(default=None, gt=0, le=604_800, description="Interrupts the turn after it.")
    queue_timeout_seconds: float | None = Field(
        default=None, gt=0, le=604_800, description="Gives up waiting after it."
    )
    on_disconnect: OnDisconnect = Field(default=OnDisconnect.CONTINUE, description="If the requester goes away.")
    on_sandbox_lost: OnSandboxLost = Field(default=OnSandboxLost.FAIL, description="If the sandbox dies in mid-turn.")
    max_turns: int | None = Field(default=None, ge=1, le=100_000, description="Model requests this turn may make.")
    model: NoNul | None = Field(default=None, min_length=1, max_length=200, description="The model from here on.")
    budget: GivenBudget | None = Field(default=None, description="What it may spend; default: what the settings say.")


class CreateTurn(TurnOptions):
    """The body of `POST /sessions/{id}/turns`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["content"], "properties": {"content": {"type": "array"}}},
            ]
        }
    )

    prompt: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        description="The prompt's text.",
        json_schema_extra={"pattern": r"\S"},
    )
    content: list[ContentBlock] | None = Field(default=None, min_length=1, description="In place of `prompt`: blocks.")
    wait: StrictBool = Field(default=False, description="Answer when the turn has ended, with its result.")

    @model_validator(mode="after")
    def _one_of_two(self) -> CreateTurn:
        if (self.prompt is None) == (self.content is None):
            raise ValueError("give either prompt or content")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is blank")
        return self

    def blocks(self) -> list[dict[str, Any]]:
        """The prompt as blocks of the Messages API."""
        if self.content is not None:
            return [block.model_dump() for block in self.content]
        return [{"type": "text", "text": self.prompt}]

    def options(self) -> TurnOptions:
        """The part that says how the turn is run."""
        return TurnOptions.model_validate(self.model_dump(include=set(TurnOptions.model_fields)))


class Query(CreateTurn, CreateSession):
    """The body of `POST /query`: a session's options and a turn's, together."""

    def turn(self) -> CreateTurn:
        """The turn to run in the one-off session."""
        return CreateTurn.model_validate(self.model_dump(include=set(CreateTurn.model_fields), exclude_none=True))

    def session(self) -> CreateSession:
        """The one-off session."""
        fields = set(CreateSession.model_fields)
        return CreateSession.model_validate(self.model_dump(include=fields, exclude_none=True))
