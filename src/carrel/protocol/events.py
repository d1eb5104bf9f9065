"""Every kind of event of a session, and the deltas between them.

An event is a frozen fact, named in the past tense, numbered by `seq` within its session and stored before anyone sees
it. A delta is a piece of a message that is still being made: never stored, never numbered.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field
from pydantic_core import from_json, to_json

from carrel.model import Failure, Frozen, Interaction, SessionStatus, StopReason, TurnOrigin, TurnStatus, Usage


class EventData(Frozen):
    """What an event says; each kind of event has a class of its own."""

    type: ClassVar[str]


EVENT_TYPES: dict[str, type[EventData]] = {}
"""Every kind of event by its type."""


def _event(name: str) -> Any:
    def register(cls: type[EventData]) -> type[EventData]:
        cls.type = name
        EVENT_TYPES[name] = cls
        return cls

    return register


# ------------------------------------------------------------------------------------------------------- the session


@_event("session.created")
class SessionCreated(EventData):
    """The session was made."""

    title: str | None = Field(default=None, description="Its name for people.")
    forked_from: str | None = Field(default=None, description="The session it is a copy of.")
    forked_at_turn: str | None = Field(default=None, description="The turn up to which it is a copy.")
    parent_id: str | None = Field(default=None, description="The session that has begun it.")


@_event("session.updated")
class SessionUpdated(EventData):
    """Its title, metadata or options were changed."""

    changed: list[str] = Field(description="The names of the fields that changed.")
    at_next_launch: list[str] = Field(default=[], description="Those that apply when the agent is next started.")


@_event("session.status_changed")
class SessionStatusChanged(EventData):
    """Its status went from one word to another."""

    status: SessionStatus
    previous: SessionStatus
    stop_reason: StopReason | None = Field(default=None, description="Why it stopped, where it did.")
    error: Failure | None = Field(default=None, description="Why it failed, where it did.")


@_event("session.rewound")
class SessionRewound(EventData):
    """Conversation and files went back to the end of an earlier turn; nothing was deleted from the log."""

    to_turn_id: str = Field(description="The turn that is now the last one of the conversation.")
    snapshot_id: str | None = Field(default=None, description="The files it has now; None: they stayed as they were.")


@_event("session.deleted")
class SessionDeleted(EventData):
    """The session is gone for good. The last event any viewer sees of it."""


# ------------------------------------------------------------------------------------------------------ its children


@_event("child.created")
class ChildCreated(EventData):
    """The session has begun another one."""

    child_session_id: str
    turn_id: str = Field(description="The child's turn with the prompt it was begun with.")
    task_type: str | None = Field(default=None, description="A word for what it is for.")


@_event("child.ended")
class ChildEnded(EventData):
    """A turn of a session that this one has begun is over."""

    child_session_id: str
    turn_id: str
    status: TurnStatus
    stop_reason: StopReason | None = None
    error: Failure | None = None
    cost_usd: float | None = Field(default=None, description="None where the price of the model is not known.")


# --------------------------------------------------------------------------------------------------------- its files


@_event("workspace.restored")
class WorkspaceRestored(EventData):
    """The files were put back to a snapshot: what was written after it is gone from the workspace."""

    snapshot_id: str
    reason: str = Field(description="lost (they were not there), rewound, or asked.")
    taken_at: datetime = Field(description="When the snapshot was taken.")
    seq: int = Field(description="The number of the session's newest event then: what came later may be lost.")


@_event("workspace.lost")
class WorkspaceLost(EventData):
    """The files were not there, and no snapshot of them could be read: the session goes on with an empty workspace."""

    message: str = Field(description="Why there was nothing to put back.")


@_event("workspace.snapshot_failed")
class WorkspaceSnapshotFailed(EventData):
    """The files could not be kept. It is tried again; told once until it has worked."""

    code: str
    message: str


@_event("workspace.quota_exceeded")
class WorkspaceQuotaExceeded(EventData):
    """The files of a persistent workspace take more than they may; no turn is taken until they do not."""

    size_bytes: int
    quota_mb: int


@_event("workspace.cloned")
class WorkspaceCloned(EventData):
    """The workspace was begun with a clone of a git repository."""

    repo: str
    ref: str | None = Field(
        default=None, description="What was asked for; None: the branch the repository names itself."
    )
    commit: str | None = Field(description="What is checked out; None: the repository is empty.")


@_event("workspace.unpacked")
class WorkspaceUnpacked(EventData):
    """An archive from outside was unpacked into the workspace."""

    path: str = Field(description="The folder in the workspace; empty: the workspace itself.")
    members: int = Field(description="How many files, folders and links it held.")
    bytes: int = Field(description="What its files hold.")


# ----------------------------------------------------------------------------------------------------------- a turn


@_event("turn.queued")
class TurnQueued(EventData):
    """A prompt was accepted."""

    number: int = Field(description="Counts the turns of the session from 1.")
    ahead: int = Field(description="How many turns of the session come before it.")
    place: int = Field(default=0, description="How many turns come before it, of all sessions where they must wait.")


@_event("turn.started")
class TurnStarted(EventData):
    """The agent was given the prompt, or began a run by itself."""

    origin: TurnOrigin = TurnOrigin.PROMPT
    attempt: int = Field(default=1, description="2 and up where a new agent took the turn up again.")


@_event("turn.completed")
class TurnCompleted(EventData):
    """The turn is over. There is no other end event."""

    status: TurnStatus
    stop_reason: StopReason | None = None
    error: Failure | None = None
    structured_output: Any = Field(default=None, description="What output_format asked for.")
    usage: Usage = Usage()
    cost_usd: float | None = Field(default=None, description="None where the price of the model is not known.")
    num_turns: int = Field(default=0, description="Model requests of the main thread.")
    duration_ms: int | None = None


# ------------------------------------------------------------------------------------------------------ what is said


@_event("message.user")
class MessageUser(EventData):
    """What the agent was told: a prompt, or a notice of one of its own background tasks."""

    content: list[dict[str, Any]] = Field(description="Blocks in the shape of the Messages API.")
    parent_tool_use_id: str | None = Field(default=None, description="The call of the sub-agent that was told it.")


@_event("message.assistant")
class MessageAssistant(EventData):
    """A block of text the agent has finished."""

    message_id: str = Field(description="The model's message; its deltas carry the same id.")
    block: int = Field(description="Which block of that message, from 0.")
    text: str
    model: str | None = None
    parent_tool_use_id: str | None = Field(default=None, description="The call of the sub-agent that speaks.")


@_event("message.system")
class MessageSystem(EventData):
    """A notice of the agent's own: a retry of a model request, a compaction, a background task's progress."""

    subtype: str
    data: dict[str, Any] = {}


@_event("thinking")
class Thinking(EventData):
    """A block of thinking the agent has finished."""

    message_id: str
    block: int
    text: str
    parent_tool_use_id: str | None = None


@_event("tool.called")
class ToolCalled(EventData):
    """The agent called a tool."""

    id: str = Field(description="The call's id; its `tool.finished` carries the same.")
    tool: str
    input: dict[str, Any]
    message_id: str | None = None
    block: int | None = None
    parent_tool_use_id: str | None = None


@_event("tool.finished")
class ToolFinished(EventData):
    """A tool gave its result."""

    id: str
    tool: str | None = None
    result: Any = Field(default=None, description="Text, or blocks in the shape of the Messages API.")
    is_error: bool = False
    parent_tool_use_id: str | None = None


@_event("agent.initialised")
class AgentInitialised(EventData):
    """An agent was started, or what it offers changed."""

    model: str | None = None
    tools: list[str] = []
    mcp_servers: list[dict[str, Any]] = Field(default=[], description="Each with its name and status.")
    permission_mode: str | None = None
    skills: list[str] = []
    agent_version: str | None = None


# ------------------------------------------------------------------------------------------------------------ people


@_event("interaction.requested")
class InteractionRequested(EventData):
    """Something waits for a person."""

    interaction_id: str
    kind: str = Field(description="permission, question or plan.")
    tool: str | None = None
    input: dict[str, Any] = {}
    title: str | None = None
    reason: str | None = Field(default=None, description="Why it is asked.")
    expires_at: datetime | None = None


@_event("interaction.reminded")
class InteractionReminded(EventData):
    """Something still waits for a person."""

    interaction_id: str
    remind_at: datetime = Field(description="When people are told again.")


@_event("interaction.resolved")
class InteractionResolved(EventData):
    """What waited for a person no longer does."""

    interaction_id: str
    status: str = Field(description="answered, expired or withdrawn.")
    answer: dict[str, Any] | None = None
    answered_by: str | None = None


# ----------------------------------------------------------------------------------------------------- money, mishaps


@_event("usage.recorded")
class UsageRecorded(EventData):
    """A model request was answered and metered."""

    request_id: str
    model: str
    usage: Usage
    cost_usd: float | None = None


@_event("error")
class ErrorReported(EventData):
    """Something went wrong that did not end the turn by itself."""

    code: str
    message: str


# --------------------------------------------------------------------------------------------------------- envelopes


class NewEvent(Frozen):
    """A fact that is not yet numbered."""

    type: str
    at: datetime
    turn_id: str | None = None
    data: dict[str, Any]

    @classmethod
    def of(cls, data: EventData, *, at: datetime, turn_id: str | None = None) -> NewEvent:
        """Wrap what an event says."""
        return cls(type=data.type, at=at, turn_id=turn_id, data=data.model_dump(mode="json"))


class StoredEvent:
    """An event as it stands in the log. It is serialised once, however many watch."""

    __slots__ = ("_frame", "_json", "at", "raw_data", "seq", "session_id", "turn_id", "type")

    def __init__(
        self, *, session_id: str, seq: int, turn_id: str | None, type: str, at: datetime, raw_data: str
    ) -> None:
        self.session_id = session_id
        self.seq = seq
        self.turn_id = turn_id
        self.type = type
        self.at = at
        self.raw_data = raw_data
        self._json: bytes | None = None
        self._frame: bytes | None = None

    @property
    def data(self) -> dict[str, Any]:
        """What the event says."""
        value: dict[str, Any] = from_json(self.raw_data)
        return value

    def json(self) -> bytes:
        """The event as one JSON object: seq, type, turn_id, at, data."""
        if self._json is None:
            head = to_json({"seq": self.seq, "type": self.type, "turn_id": self.turn_id, "at": self.at})
            self._json = head[:-1] + b',"data":' + self.raw_data.encode() + b"}"
        return self._json

    def sse(self) -> bytes:
        """The event as a frame of a server-sent event stream."""
        if self._frame is None:
            self._frame = b"id: %d\nevent: %s\ndata: %s\n\n" % (self.seq, self.type.encode(), self.json())
        return self._frame

    def __repr__(self) -> str:
        return f"<{self.seq} {self.type} {self.raw_data[:80]}>"


class PendingInteraction:
    """Something that waits for a person, as whoever attaches to its session is told first. It is no event: no `seq`."""

    __slots__ = ("_interaction",)

    def __init__(self, interaction: Interaction) -> None:
        self._interaction = interaction

    def json(self) -> bytes:
        """It as one JSON object: type `interaction.pending`, interaction."""
        return to_json({"type": "interaction.pending", "interaction": self._interaction})

    def sse(self) -> bytes:
        """It as a frame of a server-sent event stream, without an id."""
        return b"event: interaction.pending\ndata: %s\n\n" % self.json()


class DeltaKind(StrEnum):
    """What a delta is a piece of; `reset` takes back every piece of a message that has to be made anew."""

    TEXT = "text"
    THINKING = "thinking"
    TOOL_INPUT = "tool_input"
    RESET = "reset"


class Delta:
    """A piece of a message that is being made."""

    __slots__ = (
        "_json",
        "after",
        "block",
        "kind",
        "message_id",
        "offset",
        "parent_tool_use_id",
        "session_id",
        "text",
        "turn_id",
    )

    def __init__(
        self,
        *,
        session_id: str,
        turn_id: str | None,
        kind: str,
        message_id: str,
        block: int = 0,
        offset: int = 0,
        text: str = "",
        parent_tool_use_id: str | None = None,
        after: int | None = None,
    ) -> None:
        self.session_id = session_id
        self.turn_id = turn_id
        self.kind = kind
        self.message_id = message_id
        self.block = block
        self.offset = offset
        self.text = text
        self.parent_tool_use_id = parent_tool_use_id
        self.after = after
        """The `seq` of the event it comes right after, where that is known; not told to anyone outside."""
        self._json: bytes | None = None

    def json(self) -> bytes:
        """The delta as one JSON object: type `delta`, kind, turn_id, message_id, block, offset (characters), text."""
        if self._json is None:
            value = {
                "type": "delta",
                "kind": self.kind,
                "turn_id": self.turn_id,
                "message_id": self.message_id,
                "block": self.block,
                "offset": self.offset,
                "text": self.text,
            }
            if self.parent_tool_use_id is not None:
                value["parent_tool_use_id"] = self.parent_tool_use_id
            self._json = to_json(value)
        return self._json

    def sse(self) -> bytes:
        """The delta as a frame of a server-sent event stream, without an id."""
        return b"event: delta\ndata: %s\n\n" % self.json()
