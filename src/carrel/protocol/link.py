"""The frames between a runner and its gateway.

The runner dials. Every frame of the runner's but `hello`, `delta` and `want_transcript` has a number `n`, counted from
1 for the life of the sandbox; it is kept and sent again until the gateway acknowledges it, after the commit that stored
it. Commands of the gateway carry an id, and a repeat of one is dropped by the runner.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic_core import to_json

from carrel.model import Failure, Frozen, InteractionKind, PermissionMode, StopReason, TurnStatus
from carrel.protocol.events import NewEvent
from carrel.protocol.permissions import PermissionRules
from carrel.protocol.spec import SessionSpec

PROTOCOL_VERSION = 1

# ------------------------------------------------------------------------------------------------- runner to gateway


class OpenBlock(Frozen):
    """The text so far of a block that is being made."""

    turn_id: str | None = None
    kind: str
    message_id: str
    block: int
    text: str
    parent_tool_use_id: str | None = None


class Hello(Frozen):
    """The first frame of every connection."""

    kind: Literal["hello"] = "hello"
    version: int = PROTOCOL_VERSION
    sandbox_id: str
    token: str
    generation: int
    last_acked: int = Field(description="The highest number known to be stored.")
    bound: bool = Field(description="Whether `bind` was received before.")
    last_turn: str | None = Field(default=None, description="The last turn received by `start_turn`.")
    running_turn: str | None = Field(default=None, description="The turn at work now, agent's own ones included.")
    background_tasks: int = 0
    model: str | None = Field(default=None, description="The model it was last told to use.")
    permission_mode: str | None = Field(default=None, description="The permission mode it was last told to use.")
    pending_asks: list[str] = []


class EventFrame(Frozen):
    """A fact for the session's log."""

    kind: Literal["event"] = "event"
    n: int
    event: NewEvent


class TranscriptFrame(Frozen):
    """Lines of the agent's own transcript, each a JSON text, exactly as the agent wrote them."""

    kind: Literal["transcript"] = "transcript"
    n: int
    agent_session_id: str
    subpath: str = Field(default="", description="Of a sub-agent's transcript; empty for the main one.")
    turn_id: str | None = None
    lines: list[str]


class AgentReady(Frozen):
    """The agent is connected and can be given a turn."""

    kind: Literal["agent_ready"] = "agent_ready"
    n: int
    resumed_turn: str | None = Field(default=None, description="The interrupted turn it goes on with.")


class AgentFailed(Frozen):
    """The agent could not be started, or ended by itself and cannot go on."""

    kind: Literal["agent_failed"] = "agent_failed"
    n: int
    failure: Failure
    operator_detail: str = ""


class AgentSession(Frozen):
    """The agent's own id for the conversation, which a later agent needs to take it up."""

    kind: Literal["agent_session"] = "agent_session"
    n: int
    agent_session_id: str


class Ask(Frozen):
    """A call of a tool waits for a person."""

    kind: Literal["ask"] = "ask"
    n: int
    interaction_id: str
    turn_id: str | None
    at: datetime
    about: InteractionKind
    tool: str
    tool_use_id: str | None = None
    input: dict[str, Any]
    reason: str | None = None
    lone: bool = Field(default=False, description="The one call of its message, by the main agent.")
    expires_seconds: float | None = None
    remind_seconds: float | None = None


class Parked(Frozen):
    """A call that could not be held any longer was denied; the answer is kept for the next such call."""

    kind: Literal["parked"] = "parked"
    n: int
    interaction_id: str


class Deferred(Frozen):
    """The agent has put its call off and has nothing more to do until it is answered: its process may end."""

    kind: Literal["deferred"] = "deferred"
    n: int
    turn_id: str
    interaction_id: str | None = None


class Taken(Frozen):
    """The agent is about to act on an answer, and does so as soon as this is stored: it is never acted on again."""

    kind: Literal["taken"] = "taken"
    n: int
    interaction_id: str


class TurnBegun(Frozen):
    """The agent began a run by itself."""

    kind: Literal["turn_begun"] = "turn_begun"
    n: int
    turn_id: str
    at: datetime


class TurnEnded(Frozen):
    """The agent ended a turn."""

    kind: Literal["turn_ended"] = "turn_ended"
    n: int
    turn_id: str
    at: datetime
    status: TurnStatus
    stop_reason: StopReason
    failure: Failure | None = None
    structured_output: Any = None
    num_turns: int = 0


class Activity(Frozen):
    """How many background shells and agents are at work; a session with any is not put to sleep."""

    kind: Literal["activity"] = "activity"
    n: int
    background_tasks: int


class Ended(Frozen):
    """The last frame: the agent has ended and everything of it was sent."""

    kind: Literal["ended"] = "ended"
    n: int


class DeltaFrame(Frozen):
    """A piece of a message that is being made. Not numbered, not kept."""

    kind: Literal["delta"] = "delta"
    delta: str = Field(description="text, thinking, tool_input or reset.")
    turn_id: str | None = None
    message_id: str
    block: int = 0
    offset: int = 0
    text: str = ""
    parent_tool_use_id: str | None = None


class OpenBlocks(Frozen):
    """Right after `hello`: every open block's text so far."""

    kind: Literal["open_blocks"] = "open_blocks"
    blocks: list[OpenBlock]


class WantTranscript(Frozen):
    """The agent's transcript is not on this disk; the gateway is to send it."""

    kind: Literal["want_transcript"] = "want_transcript"


NumberedFrame = (
    EventFrame
    | TranscriptFrame
    | AgentReady
    | AgentFailed
    | AgentSession
    | Ask
    | Parked
    | Deferred
    | Taken
    | TurnBegun
    | TurnEnded
    | Activity
    | Ended
)
RunnerFrame = NumberedFrame | Hello | DeltaFrame | OpenBlocks | WantTranscript
RUNNER_FRAME: TypeAdapter[RunnerFrame] = TypeAdapter(Annotated[RunnerFrame, Field(discriminator="kind")])

# ------------------------------------------------------------------------------------------------- gateway to runner


class Answer(Frozen):
    """What became of an interaction: what the call that waits for it is to do."""

    kind: Literal["answer"] = "answer"
    id: str
    interaction_id: str
    allow: bool
    input: dict[str, Any] | None = Field(default=None, description="In place of what the tool would be called with.")
    permission_mode: PermissionMode | None = Field(default=None, description="Of a plan: the mode from here on.")
    message: str = ""


class Asked(Frozen):
    """What an earlier agent of the session has asked, for a call that has not happened yet."""

    interaction_id: str
    tool_use_id: str | None = None
    input_digest: str
    answer: Answer | None = Field(default=None, description="None: it is still pending.")


class Bind(Frozen):
    """Gives the sandbox its session."""

    kind: Literal["bind"] = "bind"
    id: str
    session_id: str
    spec: SessionSpec
    tools: bool = Field(default=False, description="Whether the agent has the gateway's tools.")
    permission_mode: str
    agent_session_id: str | None = Field(default=None, description="The conversation to take up.")
    reconcile: bool = Field(default=False, description="Send the transcript on disk: the last sandbox was lost.")
    resume_turn: str | None = Field(default=None, description="The interrupted turn that the agent is to go on with.")
    asked: list[Asked] = []
    defer_after_seconds: float | None = Field(
        default=None, description="How long a process is held for a lone call that waits; None: as for any other."
    )
    live_hold_seconds: float = Field(default=3600.0, description="How long it is held for any call that waits.")
    trace: dict[str, str] = Field(
        default={}, description="`traceparent` and `tracestate` that the agent is started with."
    )


class StartTurn(Frozen):
    """Hands the agent a prompt."""

    kind: Literal["start_turn"] = "start_turn"
    id: str
    turn_id: str
    content: list[dict[str, Any]]
    max_turns: int | None = None
    model: str | None = None


class Interrupt(Frozen):
    """Ends the turn at work."""

    kind: Literal["interrupt"] = "interrupt"
    id: str
    turn_id: str
    reason: StopReason


class SetModel(Frozen):
    """Another model from here on; None for the default."""

    kind: Literal["set_model"] = "set_model"
    id: str
    model: str | None = None


class SetPermissionMode(Frozen):
    """Another permission mode from here on."""

    kind: Literal["set_permission_mode"] = "set_permission_mode"
    id: str
    mode: str


class SetPermissionRules(Frozen):
    """Other rules about calls of tools from here on."""

    kind: Literal["set_permission_rules"] = "set_permission_rules"
    id: str
    rules: PermissionRules


class Transcript(Frozen):
    """The lines the runner asked for, in several frames; the last one says so."""

    kind: Literal["transcript"] = "transcript"
    subpath: str = ""
    lines: list[str]
    last: bool = False


class Ack(Frozen):
    """Everything up to `n` is stored."""

    kind: Literal["ack"] = "ack"
    n: int


class Shutdown(Frozen):
    """End the agent, send what is left, and end."""

    kind: Literal["shutdown"] = "shutdown"
    id: str
    reason: str = ""


class Refused(Frozen):
    """This runner is not wanted any more: a newer generation has its session, or the session is gone."""

    kind: Literal["refused"] = "refused"
    reason: str


Command = Bind | StartTurn | Interrupt | Answer | SetModel | SetPermissionMode | SetPermissionRules | Shutdown
GatewayFrame = Command | Transcript | Ack | Refused
GATEWAY_FRAME: TypeAdapter[GatewayFrame] = TypeAdapter(Annotated[GatewayFrame, Field(discriminator="kind")])


def digest_of(tool: str, given: dict[str, Any]) -> str:
    """The SHA-256 of a call, in hexadecimal digits: an answer holds for this call alone."""
    return sha256(to_json([tool, _sorted(given)], inf_nan_mode="strings")).hexdigest()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return [[key, _sorted(value[key])] for key in sorted(value)]
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value
