"""Sessions, turns and sandboxes: what they are and how they may change. No I/O.

ARCHITECTURE.md draws these tables; a test holds the drawing against them.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from carrel import hostnames

# ---------------------------------------------------------------------------------------------------------- states


class SessionStatus(StrEnum):
    """What a session is doing, in one word."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    STOPPED = "stopped"
    FAILED = "failed"


class StopReason(StrEnum):
    """Why the last turn of a session ended, or why the session itself did."""

    END_TURN = "end_turn"
    REQUIRES_ACTION = "requires_action"
    BUDGET_REACHED = "budget_reached"
    MAX_TURNS = "max_turns"
    INTERRUPTED = "interrupted"
    TIMEOUT = "timeout"
    SANDBOX_LOST = "sandbox_lost"
    ERROR = "error"


class TurnStatus(StrEnum):
    """Where a turn is between its prompt and its end."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """True when nothing more can happen to the turn."""
        return self not in _LIVE_TURN


_LIVE_TURN: Final = frozenset({TurnStatus.QUEUED, TurnStatus.RUNNING, TurnStatus.WAITING})


class TurnOrigin(StrEnum):
    """Who began the turn: a prompt, or the agent itself (a background task of its ended)."""

    PROMPT = "prompt"
    AGENT = "agent"


class SandboxStatus(StrEnum):
    """Where a sandbox is in its life. On disk this is a claim until the runtime confirms it."""

    LAUNCHING = "launching"
    LIVE = "live"
    ENDING = "ending"
    GONE = "gone"


class OnSandboxLost(StrEnum):
    """What happens to a running turn whose sandbox dies: it fails, or a new agent takes it up again."""

    FAIL = "fail"
    CONTINUE = "continue"


class OnDisconnect(StrEnum):
    """What happens to a turn whose requester goes away."""

    CONTINUE = "continue"
    INTERRUPT = "interrupt"


class PermissionMode(StrEnum):
    """Claude Code's permission modes."""

    DEFAULT = "default"
    ACCEPT_EDITS = "acceptEdits"
    PLAN = "plan"
    DONT_ASK = "dontAsk"
    AUTO = "auto"
    BYPASS = "bypassPermissions"


class ChildFiles(StrEnum):
    """Whose files a child works on: its parent's own, a copy of them as they were, or none."""

    INHERIT = "inherit"
    CLONE = "clone"
    EPHEMERAL = "ephemeral"


class OnParentEnd(StrEnum):
    """What becomes of a child whose parent is stopped. With a parent that is deleted it goes in any case."""

    STOP = "stop"
    KEEP = "keep"


class Isolation(StrEnum):
    """What stands between an agent and the host it runs on."""

    BUBBLEWRAP = "bubblewrap"
    CONTAINER = "container"
    NONE = "none"


# ------------------------------------------------------------------------------------------------------ transitions

SESSION_TRANSITIONS: Final[dict[str, tuple[SessionStatus, SessionStatus, str]]] = {
    "A": (SessionStatus.IDLE, SessionStatus.STARTING, "a turn waits and no sandbox is at hand"),
    "B": (SessionStatus.STARTING, SessionStatus.READY, "the agent is connected"),
    "C": (SessionStatus.READY, SessionStatus.RUNNING, "a turn starts"),
    "D": (SessionStatus.RUNNING, SessionStatus.READY, "the turn ends"),
    "E": (SessionStatus.RUNNING, SessionStatus.WAITING, "the turn waits for a person"),
    "F": (SessionStatus.WAITING, SessionStatus.RUNNING, "the person has answered"),
    "G": (SessionStatus.READY, SessionStatus.IDLE, "idle_timeout passed, or the sandbox was lost between turns"),
    "H": (SessionStatus.STARTING, SessionStatus.IDLE, "the sandbox was lost before its agent was connected"),
    "I": (SessionStatus.RUNNING, SessionStatus.IDLE, "the sandbox was lost in mid-turn"),
    "J": (SessionStatus.STARTING, SessionStatus.FAILED, "the sandbox or its agent could not be started"),
    "K": (SessionStatus.IDLE, SessionStatus.STOPPED, "stop"),
    "L": (SessionStatus.STARTING, SessionStatus.STOPPED, "stop"),
    "M": (SessionStatus.READY, SessionStatus.STOPPED, "stop"),
    "N": (SessionStatus.RUNNING, SessionStatus.STOPPED, "stop"),
    "O": (SessionStatus.WAITING, SessionStatus.STOPPED, "stop"),
    "P": (SessionStatus.FAILED, SessionStatus.STOPPED, "stop"),
    "Q": (SessionStatus.STOPPED, SessionStatus.IDLE, "resume"),
    "R": (SessionStatus.FAILED, SessionStatus.IDLE, "resume"),
    "S": (SessionStatus.WAITING, SessionStatus.READY, "the turn ends while it waits"),
    "T": (
        SessionStatus.WAITING,
        SessionStatus.IDLE,
        "the sandbox was lost while the turn waited, or the turn ended while it had none",
    ),
    "U": (SessionStatus.WAITING, SessionStatus.STARTING, "the person has answered, and the process had ended"),
}
"""Every change a session's status may make, by the letter ARCHITECTURE.md uses for it."""

TURN_TRANSITIONS: Final[dict[TurnStatus, frozenset[TurnStatus]]] = {
    TurnStatus.QUEUED: frozenset({TurnStatus.RUNNING, TurnStatus.CANCELLED, TurnStatus.EXPIRED, TurnStatus.FAILED}),
    TurnStatus.RUNNING: frozenset(
        {TurnStatus.WAITING, TurnStatus.SUCCEEDED, TurnStatus.FAILED, TurnStatus.INTERRUPTED}
    ),
    TurnStatus.WAITING: frozenset(
        {TurnStatus.RUNNING, TurnStatus.SUCCEEDED, TurnStatus.FAILED, TurnStatus.INTERRUPTED}
    ),
    TurnStatus.SUCCEEDED: frozenset(),
    TurnStatus.FAILED: frozenset(),
    TurnStatus.INTERRUPTED: frozenset(),
    TurnStatus.CANCELLED: frozenset(),
    TurnStatus.EXPIRED: frozenset(),
}
"""Every change a turn's status may make."""

_SESSION_EDGES: Final = frozenset((before, after) for before, after, _ in SESSION_TRANSITIONS.values())


def session_may_become(before: SessionStatus, after: SessionStatus) -> bool:
    """Whether a session may go from `before` to `after`."""
    return (before, after) in _SESSION_EDGES


def turn_may_become(before: TurnStatus, after: TurnStatus) -> bool:
    """Whether a turn may go from `before` to `after`."""
    return after in TURN_TRANSITIONS[before]


# --------------------------------------------------------------------------------------------------------- entities


class Frozen(BaseModel):
    """A value that never changes once made."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Usage(Frozen):
    """Tokens a model took in and gave out."""

    input_tokens: int = Field(default=0, ge=0, description="Tokens read that were in no cache.")
    output_tokens: int = Field(default=0, ge=0, description="Tokens written.")
    cache_creation_input_tokens: int = Field(default=0, ge=0, description="Tokens read and put into the cache.")
    cache_read_input_tokens: int = Field(default=0, ge=0, description="Tokens read from the cache.")

    @property
    def total(self) -> int:
        """Tokens of every kind, added up."""
        return self.input_tokens + self.output_tokens + self.cache_creation_input_tokens + self.cache_read_input_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_creation_input_tokens=self.cache_creation_input_tokens + other.cache_creation_input_tokens,
            cache_read_input_tokens=self.cache_read_input_tokens + other.cache_read_input_tokens,
        )


class Budget(Frozen):
    """What may be spent at most; None: no limit."""

    max_usd: float | None = Field(default=None, ge=0, le=1_000_000, description="US dollars.")
    max_tokens: int | None = Field(default=None, ge=0, le=10**12, description="Tokens of every kind, added up.")

    @property
    def unlimited(self) -> bool:
        """True when nothing is limited."""
        return self.max_usd is None and self.max_tokens is None


class Failure(Frozen):
    """Why a turn failed, in words a user may read and a code a program may match."""

    code: str = Field(description="A stable word, such as `sandbox_lost`.")
    message: str = Field(description="What happened and what to do about it.")


WORKSPACE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What the name of a persistent workspace looks like."""


SECRET_NAME = r"^[A-Za-z_][A-Za-z0-9_-]{0,127}$"
"""What the name of a secret looks like."""
REPOSITORY = r"^(https?://[A-Za-z0-9._-]{1,253}(:[0-9]{1,5})?|file://)(/[A-Za-z0-9._~+%@-]+)+/?$"
"""What the address of a git repository looks like: without names, passwords, queries."""
GIT_REF = r"^[A-Za-z0-9_][A-Za-z0-9_./+@-]{0,199}$"
"""What a branch, a tag or a commit looks like."""


class WorkspaceMode(StrEnum):
    """How many sessions work in a persistent workspace at once: one, while the others wait, or any number."""

    LOCK = "lock"
    SHARE = "share"


class Workspace(Frozen):
    """Where a session's files live."""

    type: Literal["ephemeral", "user", "persistent", "git"] = Field(
        default="ephemeral",
        description="`ephemeral`: deleted with the session. `user`: a directory of its user's, which outlives it. "
        "`persistent`: a workspace with a name, which outlives it and can be opened again. `git`: as `ephemeral`, and "
        "begun with a clone of a repository.",
    )
    subdir: str | None = Field(
        default=None, max_length=200, description="Of type `user`: a directory below the user's own; without it, that."
    )
    name: str | None = Field(
        default=None, pattern=WORKSPACE_NAME, description="Of type `persistent`: which one; made where there is none."
    )

    repo: str | None = Field(
        default=None, max_length=2000, pattern=REPOSITORY, description="Of type `git`: the repository's https address."
    )
    ref: str | None = Field(
        default=None, pattern=GIT_REF, description="Its branch, tag or commit; default: the branch it names itself."
    )
    depth: int | None = Field(
        default=None, strict=True, ge=1, le=1_000_000, description="How many commits back; default: all of them."
    )
    credential: str | None = Field(
        default=None,
        pattern=SECRET_NAME,
        description="A secret of the session's environment that opens it: `USER:PASSWORD`, or a token alone.",
    )

    @property
    def is_own(self) -> bool:
        """Whether the files are the session's alone, and go with it."""
        return self.type in ("ephemeral", "git")

    @model_validator(mode="after")
    def _repo_of_git(self) -> Workspace:
        if (self.repo is not None) != (self.type == "git"):
            raise ValueError("a workspace of type git has a repo, and no other has one")
        if self.repo is None and (self.ref, self.depth, self.credential) != (None, None, None):
            raise ValueError("ref, depth and credential belong to a workspace of type git")
        if ".." in (self.ref or ""):
            raise ValueError("ref must be a branch, a tag or a commit")
        return self

    @model_validator(mode="after")
    def _name_of_persistent(self) -> Workspace:
        if (self.name is not None) != (self.type == "persistent"):
            raise ValueError("a workspace of type persistent has a name, and no other has one")
        return self

    @model_validator(mode="after")
    def _subdir_of_user(self) -> Workspace:
        if self.subdir is None:
            return self
        if self.type != "user":
            raise ValueError("subdir belongs to a workspace of type user")
        parts = self.subdir.split("/")
        if (
            self.subdir.startswith("/")
            or any(part in ("", ".", "..") for part in parts)
            or not self.subdir.isprintable()
        ):
            raise ValueError("subdir must be a relative path without empty parts, '.' or '..'")
        return self


class NetworkPolicy(Frozen):
    """What a sandbox reaches beside the gateway: nothing, some names through the egress proxy, or everything."""

    mode: Literal["gateway-only", "allow", "open"] = "gateway-only"
    allow: tuple[str, ...] = Field(
        default=(),
        max_length=1000,
        description="Names of hosts; `*.example.org` is every name below it, `example.org:8443` another port than 80 "
        "and 443.",
    )

    @field_validator("allow")
    @classmethod
    def _in_one_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(hostnames.HostPattern.parse(each)) for each in value))

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        """A word, or `{"allow": [...]}`, is how people write it."""
        if isinstance(value, str):
            return {"mode": value}
        if isinstance(value, dict) and "allow" in value and "mode" not in value:
            return {"mode": "allow", **value}
        return value

    @model_serializer
    def _as_written(self) -> str | dict[str, list[str]]:
        return {"allow": list(self.allow)} if self.mode == "allow" else self.mode

    @model_validator(mode="after")
    def _names_only_if_allowed(self) -> NetworkPolicy:
        if bool(self.allow) != (self.mode == "allow"):
            raise ValueError('give "gateway-only", "open", or {"allow": [names]} with at least one name')
        return self

    def permits(self, host: str, port: int) -> bool:
        """Whether the egress proxy may lead to this port of this host, whose name is in its one form."""
        return self.mode == "allow" and hostnames.permits(self.allow, host, port)

    def narrowed(self, wish: NetworkPolicy | None) -> NetworkPolicy:
        """What is within both policies; None wishes for nothing else than this one."""
        if wish is None or wish.mode == "open":
            return self
        if self.mode == "open":
            return wish
        both = hostnames.narrowed(self.allow, wish.allow)
        return NetworkPolicy(mode="allow", allow=both) if both else NetworkPolicy()

    def within(self, wider: NetworkPolicy) -> bool:
        """Whether this one opens nothing that the wider one does not."""
        if wider.mode == "open" or self.mode == "gateway-only":
            return True
        return self.mode == "allow" and hostnames.within(self.allow, wider.allow)

    def __str__(self) -> str:
        return self.mode if self.mode != "allow" else f"allow {', '.join(self.allow)}"


def _written(value: Any) -> Any:
    """Nothing but the forms that are documented: a policy's own fields are not among them."""
    if isinstance(value, str | NetworkPolicy) or (isinstance(value, dict) and value.keys() == {"allow"}):
        return value
    raise ValueError('must be "gateway-only", "open", or {"allow": [names]}')


_NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1000}
GivenNetwork = Annotated[
    NetworkPolicy,
    BeforeValidator(_written),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["gateway-only", "open"]},
                {
                    "type": "object",
                    "properties": {"allow": _NAMES},
                    "required": ["allow"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
"""A policy as people write it."""


GATEWAY_ONLY: Final = NetworkPolicy()


class Resources(Frozen):
    """The most that one sandbox may take; None: what the settings say."""

    memory_mb: int | None = Field(default=None, ge=128, description="Mebibytes of memory; there is no swap beside it.")
    processes: int | None = Field(default=None, ge=16, description="Processes, their threads included.")
    cpus: float | None = Field(default=None, gt=0, le=1024, description="Processor cores.")
    disk_mb: int | None = Field(default=None, ge=16, description="Mebibytes that its workspace and home may take.")


class HostFolder(Frozen):
    """A folder of the host that sandboxes are shown."""

    source: str = Field(pattern="^/", description="Where it is on the host.")
    target: str = Field(pattern="^/", description="Where the sandbox sees it.")
    read_only: bool = True


class SandboxTemplate(Frozen):
    """How a sandbox is made: what the version of an environment says of it, in no runtime's own words."""

    image: str | None = Field(default=None, description="The container image; None: what the settings say.")
    platform: str | None = Field(default=None, description="Such as `linux/arm64`.")
    oci_runtime: str | None = Field(default=None, description="Another runtime of containers, such as `runsc`.")
    mounts: tuple[HostFolder, ...] = ()
    resources: Resources = Resources()
    network: NetworkPolicy | None = Field(default=None, description="None: what the settings say.")
    plugins: tuple[Annotated[str, StringConstraints(pattern="^/", max_length=4096)], ...] | None = Field(
        default=None,
        max_length=100,
        description="Folders of Claude Code's plugins on the server's host, for its agents.",
    )
    variables: dict[str, str] = Field(default={}, repr=False, description="For the environment of the agent.")


class RewoundPart(Frozen):
    """Turns and events that a session has gone back behind: they stay in its log and are no part of its conversation."""

    after_turn: int = Field(description="The number of the turn it went back to.")
    upto_turn: int = Field(description="The number of the last turn of the part.")
    after_seq: int = Field(description="The number of that turn's last event.")
    upto_seq: int = Field(description="The number of the event that says so.")


class Restoring(Frozen):
    """What a session is being put back to: wanted until it is done."""

    snapshot_id: str | None = Field(default=None, description="The files to put back; None: they stay as they are.")
    turn_id: str | None = Field(default=None, description="The turn to go back to; None: the conversation stays.")
    upto_turn: int = Field(default=0, description="The number of the last turn that it goes back behind.")


class NamedWorkspace(Frozen):
    """A persistent workspace: files that sessions open by a name, and that outlive them."""

    id: str
    owner: str = Field(description="The user it belongs to.", exclude=True)
    name: str
    mode: WorkspaceMode = Field(default=WorkspaceMode.LOCK, description="How many sessions work in it at once.")
    quota_mb: int | None = Field(default=None, description="Mebibytes its files may take; None: no limit.")
    size_bytes: int | None = Field(default=None, description="What its files took when they were last looked at.")
    number: int = Field(exclude=True, description="Whose its files are on the host.")
    created_at: datetime
    last_used_at: datetime

    @property
    def over_quota(self) -> bool:
        """Whether its files took more than they may when they were last looked at."""
        return self.quota_mb is not None and (self.size_bytes or 0) > self.quota_mb * 2**20


class SnapshotReason(StrEnum):
    """What a snapshot was taken for."""

    TURN = "turn"
    RELEASE = "release"
    FORK = "fork"
    ASKED = "asked"
    UPLOAD = "upload"


class Snapshot(Frozen):
    """The files of a session as they were at one moment, kept outside of the host that has them."""

    id: str
    session_id: str
    workspace_id: str | None = Field(default=None, exclude=True)
    number: int = Field(exclude=True, description="Orders snapshots: the time, in microseconds.")
    reason: SnapshotReason
    turn_id: str | None = Field(default=None, description="The turn after which it was taken.")
    seq: int = Field(description="The number of the session's newest event then.")
    exact: bool = Field(default=True, description="False: another turn was at work by the time it was taken.")
    key: str = Field(exclude=True, description="The object. Several may have the same: nothing had changed.")
    size_bytes: int = Field(description="What the files take.")
    stored_bytes: int = Field(description="What the object takes.")
    files: int = Field(description="How many files, folders and links there are.")
    created_at: datetime


class Artifact(Frozen):
    """A file that a session has published: kept as it was then."""

    id: str
    session_id: str
    path: str = Field(description="Where it stood in the workspace.")
    size: int
    sha256: str = Field(description="Its content's digest, in hexadecimal.")
    key: str = Field(exclude=True)
    created_at: datetime


class Birth(Frozen):
    """How a child came to be: what its parent has said of it, which never changes."""

    files: ChildFiles = Field(description="Whose files it works on.")
    on_parent_end: OnParentEnd = Field(description="What becomes of it when its parent is stopped.")
    context: dict[str, Any] = Field(default={}, description="What its parent has handed it, by name.")
    task_type: str | None = Field(default=None, description="A word of its parent's for what it is for.")
    turn_id: str = Field(description="Its first turn.")


class Session(Frozen):
    """A durable conversation with its files."""

    id: str = Field(description="The session's id (UUIDv7), never used again.")
    number: int = Field(description="Counts the sessions of this installation from 1.", exclude=True)
    owner: str = Field(description="The user the session belongs to.", exclude=True)
    uid_number: int | None = Field(
        default=None, exclude=True, description="Whose its files are on the host; None: as its own number says."
    )
    status: SessionStatus
    stop_reason: StopReason | None = None
    title: str | None = None
    spec: dict[str, Any] = Field(description="The options the session was made with.")
    workspace: Workspace = Workspace()
    workspace_id: str | None = Field(default=None, exclude=True, description="The persistent workspace it works in.")
    metadata: dict[str, Any] = Field(default_factory=dict)
    environment: str = Field(default="default", description="The environment it is opened in.")
    environment_version: int = Field(
        default=0, description="The version that it keeps; 0: `default`, as the settings say."
    )
    forked_from: str | None = None
    parent_id: str | None = Field(default=None, description="The session that has begun it; null: none has.")
    root_id: str | None = Field(default=None, description="The first session of its tree; null: it is that itself.")
    depth: int = Field(default=0, description="How many sessions are above it.")
    lineage: tuple[str, ...] = Field(
        default=(), exclude=True, description="The sessions above it, the first one first."
    )
    birth: Birth | None = Field(default=None, description="How it came to be, where it is a child.")
    files_of: str | None = Field(
        default=None, exclude=True, description="The session whose own folder it works in; None: its own."
    )
    paused_turn: str | None = Field(
        default=None, exclude=True, description="The turn that a pause has interrupted, to be gone on with."
    )
    agent_session_id: str | None = Field(default=None, exclude=True)
    generation: int = Field(default=0, exclude=True)
    last_seq: int = Field(default=0, description="The number of the session's newest event.")
    turn_count: int = 0
    usage: Usage = Usage()
    cost_usd: float | None = None
    budget: Budget | None = Field(default=None, description="What the session may spend in all.")
    error: Failure | None = None
    rewound: tuple[RewoundPart, ...] = Field(default=(), exclude=True, description="What it has gone back behind.")
    snapshot_due: str | None = Field(
        default=None, exclude=True, description="The turn after which its files are still to be kept, or another word."
    )
    restoring: Restoring | None = Field(default=None, exclude=True, description="What it is being put back to.")
    created_at: datetime
    last_active_at: datetime
    ttl_seconds: int | None = Field(default=None, description="Deleted when unused for so long.")
    expires_at: datetime | None = Field(default=None, description="When it will be deleted if it stays unused.")
    reserved: str | None = Field(
        default=None, exclude=True, description="The warm pool it waits in; it is nobody's, and no caller sees it."
    )


class Turn(Frozen):
    """One prompt and all that follows until the agent is idle again."""

    id: str
    session_id: str
    number: int = Field(description="Counts the turns of the session from 1.")
    origin: TurnOrigin = TurnOrigin.PROMPT
    status: TurnStatus
    stop_reason: StopReason | None = None
    content: Any = Field(default=None, exclude=True)
    options: dict[str, Any] = Field(default_factory=dict, exclude=True)
    error: Failure | None = None
    structured_output: Any = None
    usage: Usage = Usage()
    cost_usd: float | None = None
    num_turns: int = Field(default=0, description="Model requests of the main thread in this turn.")
    duration_ms: int | None = None
    sandbox_id: str | None = Field(default=None, exclude=True)
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    expires_at: datetime | None = Field(default=None, description="When the queue gives the turn up, if ever.")
    deadline_at: datetime | None = Field(default=None, description="When a running turn is interrupted, if ever.")
    interrupt_reason: StopReason | None = Field(default=None, exclude=True)


class InteractionKind(StrEnum):
    """What a person is asked for."""

    PERMISSION = "permission"
    QUESTION = "question"
    PLAN = "plan"


class InteractionStatus(StrEnum):
    """Whether somebody still waits for the answer."""

    PENDING = "pending"
    ANSWERED = "answered"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class Interaction(Frozen):
    """Something that waits for a person, or has."""

    id: str
    session_id: str
    root_session_id: str = Field(
        default="",
        description="The first of its tree of sessions, where it is shown too: its own, if it has no parent.",
    )
    owner: str = Field(exclude=True)
    turn_id: str | None = Field(description="The turn that waits.")
    kind: InteractionKind
    title: str | None = Field(default=None, description="What is asked, in one line for people.")
    tool: str = Field(description="The tool whose call waits.")
    tool_use_id: str | None = None
    input: dict[str, Any] = Field(description="What the tool would be called with.")
    input_digest: str = Field(description="SHA-256 of tool and input; an answer holds for these alone.")
    reason: str | None = Field(default=None, description="Why it is asked: the rule, or what the mode says.")
    suggestions: tuple[str, ...] = Field(
        default=(), description="Rules that would let such calls happen; `remember` writes the first of them."
    )
    options: tuple[dict[str, Any], ...] = Field(
        default=(), description="Answers to choose from: a `label` for people, and the `answer` to send for it."
    )
    status: InteractionStatus = InteractionStatus.PENDING
    answer: dict[str, Any] | None = None
    answered_by: str | None = None
    created_at: datetime
    expires_at: datetime | None = Field(
        default=None, description="After it the call is denied; null: it waits for ever."
    )
    remind_at: datetime | None = Field(default=None, description="When people are told of it again; null: never.")
    remind_seconds: float | None = Field(default=None, exclude=True)
    resolved_at: datetime | None = None
    lone: bool = Field(
        default=False, exclude=True, description="The one call of its message, by the main agent: it needs no process."
    )
    parked: bool = Field(
        default=False, exclude=True, description="Its call was denied meanwhile: the answer is for the next such call."
    )
    taken_at: datetime | None = Field(
        default=None, exclude=True, description="When its agent was to act on the answer. It does so once."
    )

    @model_validator(mode="after")
    def _root_of_one_without_parent(self) -> Interaction:
        if not self.root_session_id:
            object.__setattr__(self, "root_session_id", self.session_id)
        return self


class RuleScope(StrEnum):
    """What a rule about calls of tools holds for."""

    SESSION = "session"
    WORKSPACE = "workspace"
    USER = "user"
    ENVIRONMENT = "environment"


class PermissionRule(Frozen):
    """A rule about calls of tools that was written by itself, or by a person's answer; it can be revoked."""

    id: str
    owner: str | None = Field(exclude=True, description="The user whose it is; None: an admin's to change.")
    scope: RuleScope = Field(description="What it holds for: `target` is the id of such a thing, or its name.")
    target: str
    effect: Literal["allow", "ask", "deny"]
    rule: str = Field(description="In Claude Code's syntax, such as `Bash(git push *)`.")
    interaction_id: str | None = Field(default=None, description="The interaction whose answer has written it.")
    created_by: str
    created_at: datetime


class Sandbox(Frozen):
    """Where one session's agent lives."""

    id: str
    session_id: str
    generation: int
    status: SandboxStatus
    runtime: str
    state: dict[str, Any] = Field(default_factory=dict, description="The runtime's last checkpoint.")
    acked: int = Field(default=0, description="The last frame of the runner that is stored.")
    link_token_hash: str
    agent_token_hash: str
    network: NetworkPolicy | None = Field(default=None, description="What it was launched with; None: `gateway-only`.")
    environment: str | None = Field(
        default=None, description="The version it was launched for, as `name:version`; None: an earlier release's."
    )
    created_at: datetime
    ended_at: datetime | None = None


# ------------------------------------------------------------------------------------------------------------ people


class Scope(StrEnum):
    """What a caller may do with what it owns; `admin` with everybody's, and with users and keys."""

    READ = "sessions:read"
    WRITE = "sessions:write"
    ADMIN = "admin"


USER_ID = r"^[A-Za-z0-9_-]{1,64}$"
"""What a user's id looks like; it is also the name of a directory."""


class Principal(Frozen):
    """Somebody or something that calls."""

    name: str = Field(description="Who calls, for the audit log: `admin`, `key:<id>`, `jwt:<subject>`, `sandbox:<id>`.")
    user: str = Field(description="The user whose things the caller acts on.")
    scopes: frozenset[Scope]
    session_id: str | None = Field(
        default=None, description="The one session, with all below it, that the caller is bound to."
    )
    expires_at: datetime | None = Field(default=None, description="When a stream opened by this caller must end.")

    @property
    def is_admin(self) -> bool:
        """Whether everybody's things are the caller's to see."""
        return Scope.ADMIN in self.scopes and self.session_id is None

    @classmethod
    def of_user(cls, user: str, scopes: frozenset[Scope] = frozenset({Scope.READ, Scope.WRITE})) -> Principal:
        """A caller that is this user, and nothing more."""
        return cls(name=f"user:{user}", user=user, scopes=scopes)

    def may_see(self, session: Session) -> bool:
        """Whether the session exists for this caller; one that waits in a warm pool exists for nobody."""
        if session.reserved is not None:
            return False
        if self.session_id is not None:
            return self.session_id == session.id or self.session_id in session.lineage
        return self.is_admin or session.owner == self.user


ADMIN: Final = Principal(name="admin", user="admin", scopes=frozenset(Scope))
"""The holder of the admin key, and everyone where authentication is off."""


class User(Frozen):
    """Somebody sessions belong to."""

    id: str = Field(pattern=USER_ID)
    disabled: bool = Field(default=False, description="A disabled user's keys open nothing.")
    budget: Budget | None = Field(default=None, description="In all; without it, what the settings say.")
    daily_budget: Budget | None = Field(default=None, description="A day (UTC); without it, what the settings say.")
    max_sessions: int | None = Field(default=None, ge=0, le=10**9, description="Without it, what the settings say.")
    number: int | None = Field(
        default=None, exclude=True, description="Whose the files of their own directory are on the host."
    )
    created_at: datetime


class ApiKey(Frozen):
    """A key of a user's. The key itself is shown once and not kept."""

    id: str
    user_id: str
    name: str | None = Field(default=None, max_length=200, description="What it is for.")
    prefix: str = Field(description="How the key begins, to know it again.")
    hash: str = Field(exclude=True)
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class Ticket(Frozen):
    """Opens one connection, once, for one session; for where a header cannot be sent."""

    hash: str
    principal: Principal
    reusable: bool = Field(default=False, description="A short-lived token for a browser: good until it expires.")
    expires_at: datetime


# --------------------------------------------------------------------------------------------------------- ids, time

_id_lock = threading.Lock()
_last_id_ms = 0
_id_sequence = 0


def new_id() -> str:
    """A new UUIDv7 (RFC 9562): ids made later sort later, also within one millisecond of one process."""
    global _last_id_ms, _id_sequence
    with _id_lock:
        now_ms = time.time_ns() // 1_000_000
        if now_ms > _last_id_ms:
            _last_id_ms, _id_sequence = now_ms, int.from_bytes(os.urandom(2), "big") & 0x7FF
        else:
            _id_sequence += 1
            if _id_sequence > 0xFFF:
                _last_id_ms, _id_sequence = _last_id_ms + 1, 0
        stamp, sequence = _last_id_ms, _id_sequence
    random = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF
    value = (stamp & 0xFFFF_FFFF_FFFF) << 80 | 0x7 << 76 | sequence << 64 | 0b10 << 62 | random
    return str(uuid.UUID(int=value))


def utc_now() -> datetime:
    """The time now, in UTC, with its zone."""
    return datetime.now(UTC)
