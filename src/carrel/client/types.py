"""What the server tells, as its clients see it. A newer server may tell more: what is not known here is kept as it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from carrel.model import Budget, Failure, TurnStatus, Usage
from carrel.protocol.events import EVENT_TYPES, EventData

__all__ = [
    "ApiKey",
    "Artifact",
    "BudgetState",
    "BudgetStates",
    "Change",
    "Delta",
    "Diff",
    "Environment",
    "EnvironmentStatus",
    "Event",
    "FileEntry",
    "Frame",
    "Interaction",
    "Message",
    "NamedWorkspace",
    "NetworkReport",
    "NetworkRequest",
    "Page",
    "Patch",
    "Secret",
    "Session",
    "Snapshot",
    "Turn",
    "UnpackedArchive",
    "UsageReport",
    "UsageRow",
    "User",
]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Session(_Told):
    """A durable conversation with its files."""

    id: str
    status: str
    """One of `carrel.model.SessionStatus`, or a word that only a newer server knows."""
    stop_reason: str | None = None
    title: str | None = None
    created_at: datetime
    last_active_at: datetime
    turn_count: int = 0
    last_seq: int = 0
    cost_usd: float | None = None
    usage: Usage = Usage()
    budget: Budget | None = None
    metadata: dict[str, Any] = {}
    environment: str = "default"
    environment_version: int = 0
    forked_from: str | None = None
    error: Failure | None = None


class Turn(_Told):
    """One prompt and all that follows until the agent is idle again."""

    id: str
    session_id: str
    number: int = 0
    status: str
    """One of `carrel.model.TurnStatus`, or a word that only a newer server knows."""
    stop_reason: str | None = None
    error: Failure | None = None
    structured_output: Any = None
    usage: Usage = Usage()
    cost_usd: float | None = None
    num_turns: int = 0
    duration_ms: int | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None


class NamedWorkspace(_Told):
    """A persistent workspace: files that sessions open by a name."""

    id: str
    name: str
    mode: str
    quota_mb: int | None = None
    size_bytes: int | None = None
    created_at: datetime
    last_used_at: datetime


class Environment(_Told):
    """A version of an environment, which sessions are opened in by its name."""

    name: str
    version: int
    spec: dict[str, Any]
    """What the environment says; what nobody has named is left out."""
    created_at: datetime
    created_by: str | None = None


class Snapshot(_Told):
    """The files of a session as they were at one moment."""

    id: str
    session_id: str
    reason: str
    turn_id: str | None = None
    seq: int
    exact: bool = True
    size_bytes: int
    stored_bytes: int
    files: int
    created_at: datetime


class Artifact(_Told):
    """A file that a session has published: kept as it was then."""

    id: str
    session_id: str
    path: str
    size: int
    sha256: str
    created_at: datetime


class UnpackedArchive(_Told):
    """What came of an archive."""

    members: int
    bytes: int
    links_left_out: int = 0


class Change(_Told):
    """What has changed at one path."""

    path: str
    kind: str
    """added, changed or removed."""
    type: str
    size_before: int | None = None
    size_after: int | None = None


class Diff(_Told):
    """What has changed since a snapshot."""

    snapshot_id: str
    changes: list[Change]
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """What has changed since git's last commit."""

    content: bytes
    truncated: bool
    """Whether there is more than is told."""


class NetworkRequest(_Told):
    """What a session has asked for, with what verdict, and how often."""

    host: str
    port: int
    verdict: str
    reason: str
    count: int
    first_at: datetime
    last_at: datetime


class NetworkReport(_Told):
    """What a session may reach beside the gateway, and what it has asked for."""

    policy: str | dict[str, Any]
    recorded: bool
    data: list[NetworkRequest]
    next_cursor: str | None = None


class Interaction(_Told):
    """Something that waits for a person, or has."""

    id: str
    session_id: str
    turn_id: str | None = None
    kind: str
    tool: str
    tool_use_id: str | None = None
    input: dict[str, Any]
    reason: str | None = None
    status: str
    """One of `carrel.model.InteractionStatus`, or a word that only a newer server knows."""
    answer: dict[str, Any] | None = None
    answered_by: str | None = None
    created_at: datetime
    expires_at: datetime | None = None
    resolved_at: datetime | None = None


class Secret(_Told):
    """A secret of environments, without its value."""

    name: str
    key_id: str
    created_at: datetime
    updated_at: datetime
    updated_by: str | None = None


class EnvironmentStatus(_Told):
    """How an environment does, as it is now."""

    name: str
    version: int
    running: bool
    """Whether it takes prompts."""
    warm_wanted: int
    """How many connected agents its warm pool is to have."""
    warm: int
    starting: int
    sessions: int
    live_sessions: int
    """Those that have a sandbox, or are getting one."""
    problems: list[Failure]


class FileEntry(_Told):
    """An entry of a session's workspace."""

    path: str
    type: str
    size: int
    modified_at: datetime
    mode: int | str | None = None


class ApiKey(_Told):
    """A key of a user's."""

    id: str
    user_id: str
    name: str | None = None
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    key: str | None = Field(default=None, repr=False)
    """The key itself, in the answer to its making alone."""


class User(_Told):
    """Somebody sessions belong to."""

    id: str
    disabled: bool = False
    budget: Budget | None = None
    daily_budget: Budget | None = None
    max_sessions: int | None = None
    created_at: datetime


class Message(_Told):
    """What somebody said in a session, with all that belongs to it."""

    id: str
    seq: int
    turn_id: str | None = None
    role: str
    at: datetime
    content: list[dict[str, Any]]
    """Blocks in the shape of the Messages API."""
    model: str | None = None
    parent_tool_use_id: str | None = None
    complete: bool = True
    """False while more may be added to it."""


class UsageRow(_Told):
    """What a group of model requests took; the names it is grouped by are among its attributes."""

    user: str | None = None
    session: str | None = None
    turn: str | None = None
    model: str | None = None
    day: str | None = None
    requests: int
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cost_usd: float | None = None


class UsageReport(_Told):
    """Sums of usage, by group, and of all of them."""

    data: list[UsageRow]
    total: UsageRow
    next_cursor: str | None = None


class BudgetState(_Told):
    """A budget, and what is left of it; None where there is no limit."""

    kind: str
    id: str
    budget: Budget
    spent_usd: float = 0.0
    spent_tokens: int = 0
    reserved_usd: float = 0.0
    reserved_tokens: int = 0
    left_usd: float | None = None
    left_tokens: int | None = None
    resets_at: datetime | None = None


class BudgetStates(_Told):
    """Every budget that holds."""

    data: list[BudgetState]


class Page(_Told):
    """One page of a list."""

    data: list[Any]
    next_cursor: str | None = None


class Event(_Told):
    """A frozen fact of a session. `seq` numbers them from 1 without gaps."""

    seq: int
    type: str
    turn_id: str | None = None
    at: datetime
    data: dict[str, Any]

    @property
    def fact(self) -> EventData | None:
        """What the event says, as the class of its type; None for a type that only a newer server knows."""
        known = EVENT_TYPES.get(self.type)
        return None if known is None else known.model_validate(self.data, extra="ignore")

    @property
    def ends_turn(self) -> bool:
        """Whether this is the end of its turn."""
        return self.type == "turn.completed"

    @property
    def succeeded(self) -> bool:
        """Whether this is the end of a turn that went well."""
        return self.ends_turn and self.data.get("status") == TurnStatus.SUCCEEDED


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of a message that is being made. Its characters begin at `offset` of the message's block.

    The kind is `text`, `thinking` or `tool_input`; or `reset`, which takes back every piece of the message so far.
    """

    kind: str
    turn_id: str | None
    message_id: str
    block: int = 0
    offset: int = 0
    text: str = ""
    parent_tool_use_id: str | None = None

    @classmethod
    def of(cls, value: dict[str, Any]) -> Delta:
        """Read it from its JSON object."""
        return cls(
            kind=value["kind"],
            turn_id=value.get("turn_id"),
            message_id=value["message_id"],
            block=value.get("block", 0),
            offset=value.get("offset", 0),
            text=value.get("text", ""),
            parent_tool_use_id=value.get("parent_tool_use_id"),
        )


Frame = Event | Delta
"""What a stream yields."""
