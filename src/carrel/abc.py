"""Every contract a plug-in may implement, and every contract the heart stands on.

    Runtime            where agents run: local processes, containers, pods
    EventBus           who hears of a frame, now; the store is the truth, the bus a hint
    Store              rows, in transactions; one `Transaction` with a role per table family
    ObjectStore        large things that are written once: snapshots, artifacts
    CredentialSource   the real key of the model, for the model gateway alone
    Observer           told of what happens, for metrics and traces; never asked

An implementation is good when the conformance suite of its contract (`carrel.testing.conformance`) passes over it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from carrel.errors import CarrelError, StoreOutcomeUnknown, StoreUnavailable
from carrel.model import (
    ApiKey,
    Artifact,
    Interaction,
    InteractionStatus,
    NamedWorkspace,
    PermissionRule,
    RuleScope,
    Sandbox,
    SandboxTemplate,
    Session,
    SessionStatus,
    Snapshot,
    Ticket,
    Turn,
    Usage,
    User,
)
from carrel.protocol.environments import Environment, Secret
from carrel.protocol.events import Delta, NewEvent, StoredEvent

__all__ = [
    "OTHER_HOSTS",
    "ArtifactRows",
    "AuditFilter",
    "AuditRecord",
    "AuditRows",
    "CountRows",
    "CredentialSource",
    "DoomedRows",
    "EnvironmentRows",
    "EventBus",
    "EventRows",
    "Excess",
    "Frame",
    "IdempotencyRecord",
    "IdempotencyRows",
    "InteractionFilter",
    "InteractionRows",
    "KeyRows",
    "LaunchSpec",
    "NetworkRequest",
    "NetworkRows",
    "ObjectInfo",
    "ObjectStore",
    "Observer",
    "Page",
    "PoolRows",
    "Reservation",
    "RuleFilter",
    "RuleRows",
    "Runtime",
    "SandboxRows",
    "SandboxUsage",
    "SecretRows",
    "SessionFilter",
    "SessionRows",
    "SnapshotRows",
    "Store",
    "Subscription",
    "TicketRows",
    "Transaction",
    "TranscriptRows",
    "TreeRows",
    "TurnRows",
    "UsageFilter",
    "UsageRecord",
    "UsageRows",
    "UsageSum",
    "UserRows",
    "WaitingTurn",
    "WorkspaceRows",
]

# ---------------------------------------------------------------------------------------------------------- runtimes


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """What a runtime needs to make a sandbox. The tokens are secrets and are never part of a checkpoint."""

    sandbox_id: str
    session_id: str
    session_number: int
    generation: int
    link_token: str = field(repr=False)
    agent_token: str = field(repr=False)
    workspace: str
    workspace_within: str | None = None
    """The last folder above the workspace that no agent can change; from there on no link is followed."""
    home: str
    owner: tuple[int, int] | None
    template: SandboxTemplate = field(default_factory=SandboxTemplate)
    mcp: bool = False
    """Whether the agent needs a road to MCP servers that the gateway answers for."""


class Excess(StrEnum):
    """What a sandbox has taken too much of."""

    MEMORY = "memory"
    PROCESSES = "processes"
    DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class SandboxUsage:
    """What a sandbox takes: its agent and all that it has started, however deep."""

    memory_bytes: int
    """Of memory that could not be given back at once; swap counts too. What processes share counts once."""
    processes: int
    """Their threads count too."""
    cpu_seconds: float
    """Since its launch."""
    excess: Excess | None = None
    """The cap it has met, if it has: it is to be ended."""


class Runtime(ABC):
    """Makes and ends sandboxes. It keeps no state of its own: what it must remember is in its checkpoints."""

    name: str
    """The word it is chosen by, and under which its checkpoints are stored."""

    isolated: bool
    """Whether an agent here is walled off well enough to act without asking."""

    @abstractmethod
    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Make ready to launch; called once, before anything else. Closing is registered with `exit_stack`.

        Raises:
            OperatorError: this machine cannot run such sandboxes; the message says what to do.
        """

    def check(self, template: SandboxTemplate) -> None:  # noqa: B027  (most can make whatever is asked of them)
        """Look whether such sandboxes could be made here, as far as that can be known without making one.

        Raises:
            ValidationFailed: they could not; the message says what of the template is not to be had here.
        """

    def finds(self, command: str) -> bool | None:
        """Whether there is such a command in a sandbox; None where that cannot be known without making one."""
        return None

    async def lacks(self, template: SandboxTemplate) -> CarrelError | None:
        """What would keep such a sandbox from being launched at this moment, as far as can be seen without one."""
        return None

    @abstractmethod
    def launch(self, spec: LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Start a sandbox whose runner will dial the gateway.

        Yields serialisable checkpoints. Each is stored before the next step is taken, so that a gateway that dies in
        between can still find and end what was begun. After the last one the runner is on its way.

        Raises:
            SandboxLaunchFailed: it could not be started; what was begun is ended by `terminate` with the last checkpoint.
            DiskFull: likewise, for want of room on a disk.
            RuntimeUnavailable: likewise, because whoever makes sandboxes does not answer.
        """

    @abstractmethod
    async def terminate(self, state: Mapping[str, Any]) -> None:
        """End the sandbox of this checkpoint and every process in it. May be called at any time, and again.

        When it returns, nothing of the sandbox runs.

        Raises:
            RuntimeUnavailable: whoever would end it does not answer; to be called again.
        """

    @abstractmethod
    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """For each sandbox id, whether its runner is alive now. Says False only when it is confirmed gone.

        It is not, and True is the answer, while nobody can tell: a launch was cut short and may come to something yet,
        or who would know does not answer.
        """

    @abstractmethod
    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, SandboxUsage]:
        """What each sandbox takes now, by its id; one of which nothing runs is left out. Called every second.

        One that has ended of a cap may be told of, with that cap, until it is terminated.

        Raises:
            RuntimeUnavailable: whoever would know does not answer.
        """

    @abstractmethod
    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """Every sandbox of this installation that has anything left on this host: id to a state `terminate` takes."""

    @abstractmethod
    def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        """The lines its runner and agent have written so far; none where there is nothing."""

    async def watch(self, heard: Callable[[str], None]) -> None:  # noqa: B027  (most have nothing to tell)
        """Tell of sandboxes to which something has happened from outside, by their ids, as soon as it is known.

        It is a hint to look, nothing is promised of it. Called once, after `start`; runs until it is cancelled, or
        ends at once where there is nothing to tell: a runner that is gone is missed by its connection anyhow.
        """


# --------------------------------------------------------------------------------------------------------------- bus

Frame = StoredEvent | Delta


class Subscription(ABC):
    """One viewer's view of a session, bounded in bytes."""

    @abstractmethod
    async def get(self, timeout_seconds: float) -> list[Frame] | None:
        """Wait for frames and take all there are; none when the time is over.

        None: frames were lost to the bound, read the store and go on.
        """


class EventBus(ABC):
    """Carries frames to whoever watches a session. It may lose, double or reorder them; their `seq` mends that."""

    @abstractmethod
    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Make ready; closing is registered with `exit_stack`."""

    @abstractmethod
    def publish(self, session_id: str, frames: Sequence[Frame]) -> None:
        """Hand frames to every subscription of the session. Never waits for any of them."""

    @abstractmethod
    def subscribe(self, session_id: str, *, max_bytes: int) -> AbstractAsyncContextManager[Subscription]:
        """Hear of every frame of the session from now on; at most `max_bytes` wait to be taken."""


# ------------------------------------------------------------------------------------------------------------- store


T = TypeVar("T")

_STORE_AWAY_SECONDS = 0.5


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list, and the cursor of the next part (None at the end)."""

    items: Sequence[T]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class SessionFilter:
    """Which sessions a list shows."""

    owner: str | None = None
    """None: everybody's."""
    session_id: str | None = None
    status: SessionStatus | None = None
    text: str | None = None
    """Only those with this in their title or in what was said, in any case of letters."""
    environment: str | None = None


@dataclass(frozen=True, kw_only=True)
class WaitingTurn:
    """The first queued turn of a session that has none at work."""

    turn_id: str
    session_id: str
    owner: str
    created_at: datetime
    running: int
    """How many turns of the same owner are at work."""
    last_started_at: datetime | None
    """When a turn of the same owner last started."""


@dataclass(frozen=True, kw_only=True)
class UsageRecord:
    """What one answered model request took."""

    id: str
    session_id: str
    user_id: str
    turn_id: str | None
    model: str
    usage: Usage
    cost_usd: float | None
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What a model request that is under way may come to at most."""

    id: str
    session_id: str
    user_id: str
    turn_id: str | None
    model: str
    tokens: int
    cost_usd: float | None
    at: datetime


@dataclass(frozen=True, kw_only=True)
class UsageFilter:
    """Which requests are summed up; None: all."""

    user_id: str | None = None
    session_id: str | None = None
    tree_of: str | None = None
    """This session, and all that are or were below it."""
    turn_id: str | None = None
    model: str | None = None
    since: datetime | None = None
    """From this instant on."""
    until: datetime | None = None
    """And before this one."""


@dataclass(frozen=True, kw_only=True)
class UsageSum:
    """What a group of requests took. Settled ones only."""

    group: Mapping[str, str]
    """The values of what is grouped by: `user`, `session`, `turn`, `model`, `day` (such as `2026-11-21`)."""
    requests: int
    usage: Usage
    cost_usd: float | None
    """None where the price of any of them is not known."""
    known_cost_usd: float
    """What those of a known price cost."""


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """Who did what to which object, from where, with what outcome. Never a secret."""

    id: str
    at: datetime
    principal: str
    user_id: str | None
    action: str
    object_type: str | None
    object_id: str | None
    address: str | None
    request_id: str | None
    outcome: int
    """A status of HTTP."""
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AuditFilter:
    """Which records a list shows; None: all."""

    user_id: str | None = None
    principal: str | None = None
    action: str | None = None
    object_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class IdempotencyRecord:
    """A request that carried an Idempotency-Key, and its answer once there is one."""

    principal: str
    key: str
    fingerprint: str
    boot_id: str
    object_id: str | None
    status: int | None
    body: str | None
    created_at: datetime


OTHER_HOSTS = "*"
"""The host under which the rest is counted where a session has asked for too many."""


@dataclass(frozen=True, kw_only=True)
class NetworkRequest:
    """How often a session's sandboxes have asked the egress proxy for one port of one host, with what verdict."""

    id: str
    session_id: str
    host: str
    port: int
    verdict: str
    """`allowed` or `refused`."""
    reason: str
    """A stable word."""
    count: int
    first_at: datetime
    last_at: datetime


class SessionRows(ABC):
    """Sessions."""

    @abstractmethod
    def next_number(self) -> int:
        """A number no session of this installation has had."""

    @abstractmethod
    def add(self, session: Session) -> None:
        """Store a new session."""

    @abstractmethod
    def get(self, session_id: str) -> Session | None:
        """The session, or None."""

    @abstractmethod
    def update(self, session_id: str, **changes: Any) -> Session:
        """Change columns. Raises SessionNotFound where the session is gone."""

    @abstractmethod
    def remove(self, session_id: str) -> None:
        """Delete the session and every row that belongs to it; what it has spent and reserved stays."""

    @abstractmethod
    def page(self, which: SessionFilter, *, cursor: str | None, limit: int) -> Page[Session]:
        """Newest first; none that waits in a warm pool. Raises InvalidCursor."""

    @abstractmethod
    def unsettled(self, now: datetime) -> Sequence[str]:
        """The ids of sessions that look alive, have turns queued, are being deleted or put back, or whose time is over.

        Those that wait in a warm pool are among them.
        """

    @abstractmethod
    def deleting(self, session_id: str) -> bool:
        """Whether the session is deleted and something of it is still to be removed."""

    @abstractmethod
    def mark_deleting(self, session_id: str) -> None:
        """From now on the session is not found; what is left of it is still to be removed."""


class PoolRows(ABC):
    """Sessions that wait in a warm pool: they are nobody's yet."""

    @abstractmethod
    def waiting(self) -> Sequence[Session]:
        """Those of every pool, oldest first; deleted ones are not among them."""

    @abstractmethod
    def take(self, pool: str) -> Session | None:
        """Take the oldest whose agent is connected out of this pool; None where there is none.

        Of two transactions at once, no two take the same.
        """


class TreeRows(ABC):
    """Who has begun whom. Deleted sessions are in no answer but that of `left`."""

    @abstractmethod
    def add(self, child: Session) -> None:
        """Note that a session that has just been stored is below all of its lineage."""

    @abstractmethod
    def above(self, session: Session) -> Sequence[Session]:
        """The sessions above, the nearest first. They are not held."""

    @abstractmethod
    def children(self, session_id: str) -> Sequence[Session]:
        """Those that the session has begun, oldest first."""

    @abstractmethod
    def below(self, session_id: str) -> Sequence[Session]:
        """All that are below the session, each behind its parent, in the order in which they were made."""

    @abstractmethod
    def live_children(self, session_id: str) -> int:
        """How many of those that the session has begun are neither stopped nor failed."""

    @abstractmethod
    def live_below(self, session_id: str) -> int:
        """The same, of all that are below it."""

    @abstractmethod
    def left(self, session_id: str) -> Sequence[str]:
        """The ids of those that the session has begun and of which anything is still there, be they deleted or not."""


class TurnRows(ABC):
    """Turns."""

    @abstractmethod
    def add(self, turn: Turn) -> None:
        """Store a new turn."""

    @abstractmethod
    def get(self, turn_id: str) -> Turn | None:
        """The turn, or None."""

    @abstractmethod
    def update(self, turn_id: str, **changes: Any) -> Turn:
        """Change columns. Raises TurnNotFound."""

    @abstractmethod
    def page(self, session_id: str, *, cursor: str | None, limit: int) -> Page[Turn]:
        """Newest first. Raises InvalidCursor."""

    @abstractmethod
    def queued(self, session_id: str) -> Sequence[Turn]:
        """The turns that wait, in order."""

    @abstractmethod
    def live(self, session_id: str) -> Turn | None:
        """The one turn that runs or waits for a person, or None."""

    @abstractmethod
    def next_number(self, session_id: str) -> int:
        """The number of the session's next turn."""


class CountRows(ABC):
    """What limits are held against."""

    @abstractmethod
    def sessions(self, owner: str | None = None) -> int:
        """How many sessions there are, of everybody or of one owner; deleted ones and those in warm pools do not count."""

    @abstractmethod
    def busy(self) -> int:
        """How many sessions have a turn at work, or a sandbox starting for one."""

    @abstractmethod
    def queued_turns(self) -> int:
        """How many turns wait, in all sessions."""

    @abstractmethod
    def waiting_turns(self) -> Sequence[WaitingTurn]:
        """The first queued turn of every session that has none at work and no sandbox starting, oldest first."""


class EventRows(ABC):
    """The event log."""

    @abstractmethod
    def append(self, session_id: str, events: Iterable[NewEvent]) -> list[StoredEvent]:
        """Number and store events. Raises SessionNotFound."""

    @abstractmethod
    def page(
        self, session_id: str, *, after: int, limit: int, turn_id: str | None = None, max_bytes: int | None = None
    ) -> list[StoredEvent]:
        """Events with a higher `seq` than `after`, in order; fewer than `limit` when they pass `max_bytes`."""

    @abstractmethod
    def completed(
        self, session_id: str, *, turn_id: str | None = None, upto: int | None = None
    ) -> tuple[str, int] | None:
        """The last turn that has ended, and the number of the event that says so: this turn, or up to that number."""


class TranscriptRows(ABC):
    """The agent's own transcripts, line by line, as it wrote them."""

    @abstractmethod
    def append(self, session_id: str, *, subpath: str, turn_id: str | None, lines: Sequence[str]) -> None:
        """Store lines in order; one whose uuid is known already is left out."""

    @abstractmethod
    def subpaths(self, session_id: str) -> Sequence[str]:
        """The main transcript (empty) and the sub-agents' ones."""

    @abstractmethod
    def page(self, session_id: str, subpath: str, *, after: int, limit: int) -> list[tuple[int, str]]:
        """Lines after a position, in order, each with its position."""

    @abstractmethod
    def copy(self, source: str, target: str, *, up_to_turn: str | None, replace: tuple[str, str] | None) -> None:
        """Copy a session's transcripts to another, to the end of a turn, with one id in them put for another."""

    @abstractmethod
    def rewind(self, session_id: str, *, to_turn: str, replace: tuple[str, str] | None) -> None:
        """Forget what came after a turn, and put one id in the rest for another."""


@dataclass(frozen=True, kw_only=True)
class InteractionFilter:
    """Which interactions a list shows; None: all."""

    owner: str | None = None
    session_id: str | None = None
    turn_id: str | None = None
    status: InteractionStatus | None = None
    tree: str | None = None
    """Those of the tree of sessions that begins with this one."""


class InteractionRows(ABC):
    """What waits for a person, or has."""

    @abstractmethod
    def add(self, interaction: Interaction) -> bool:
        """Store a new one. False where one with its id is there."""

    @abstractmethod
    def get(self, interaction_id: str) -> Interaction | None:
        """The interaction, or None."""

    @abstractmethod
    def resolve(self, interaction_id: str, **changes: Any) -> Interaction | None:
        """Change the columns of one that is pending, its status among them; None where it is not pending any more."""

    @abstractmethod
    def update(self, interaction_id: str, **changes: Any) -> Interaction | None:
        """Change columns, whatever its status; None where there is none."""

    @abstractmethod
    def page(self, which: InteractionFilter, *, cursor: str | None, limit: int) -> Page[Interaction]:
        """Oldest first. Raises InvalidCursor."""

    @abstractmethod
    def pending(self, session_id: str) -> Sequence[Interaction]:
        """All of a session's that wait, oldest first."""

    @abstractmethod
    def untaken(self, session_id: str) -> Sequence[Interaction]:
        """All of a session's that wait, or whose answer no agent has acted on, oldest first; none that is withdrawn."""


@dataclass(frozen=True)
class RuleFilter:
    """Which rules a list shows; None: all."""

    owner: str | None = None
    scope: RuleScope | None = None
    target: str | None = None


class RuleRows(ABC):
    """Rules about calls of tools that people have written."""

    @abstractmethod
    def add(self, rule: PermissionRule) -> None:
        """Store a new one."""

    @abstractmethod
    def get(self, rule_id: str) -> PermissionRule | None:
        """The rule, or None."""

    @abstractmethod
    def remove(self, rule_id: str) -> None:
        """Delete it; nothing happens where it is not there."""

    @abstractmethod
    def forget(self, scope: RuleScope, target: str) -> None:
        """Delete all that hold for something that is gone."""

    @abstractmethod
    def holding(self, targets: Sequence[tuple[RuleScope, str]]) -> Sequence[PermissionRule]:
        """All that hold for any of these, oldest first."""

    @abstractmethod
    def page(self, which: RuleFilter, *, cursor: str | None, limit: int) -> Page[PermissionRule]:
        """Oldest first. Raises InvalidCursor."""


class SandboxRows(ABC):
    """Sandboxes."""

    @abstractmethod
    def add(self, sandbox: Sandbox) -> None:
        """Store a new sandbox."""

    @abstractmethod
    def get(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox, or None."""

    @abstractmethod
    def by_agent_token(self, token_hash: str) -> Sandbox | None:
        """The sandbox that is not gone and whose agent holds this token."""

    @abstractmethod
    def update(self, sandbox_id: str, **changes: Any) -> None:
        """Change columns; nothing happens where the sandbox is not there."""

    @abstractmethod
    def current(self, session_id: str) -> Sandbox | None:
        """The session's newest sandbox that is not gone, or None."""

    @abstractmethod
    def not_gone(self) -> Sequence[Sandbox]:
        """Every sandbox that is not known to be gone."""

    @abstractmethod
    def advance(self, sandbox_id: str, n: int) -> int:
        """Say that frames up to `n` are stored. Answers the mark before; it never goes back."""

    @abstractmethod
    def in_workspace(self, workspace_id: str) -> Sequence[Sandbox]:
        """Every sandbox of a session that works in this persistent workspace and is not known to be gone."""


class UsageRows(ABC):
    """What model requests took."""

    @abstractmethod
    def add(self, record: UsageRecord) -> None:
        """Store a record."""

    @abstractmethod
    def of_turn(self, turn_id: str) -> tuple[Usage, float | None, int]:
        """The sums of a turn: tokens, cost (None where any part of it is unknown), and how many requests."""

    @abstractmethod
    def sums(self, which: UsageFilter, group_by: Sequence[str] = ()) -> Sequence[UsageSum]:
        """Sums by `user`, `session`, `turn`, `model` or `day` (UTC), in the order of their names; one without any."""

    @abstractmethod
    def reserve(self, reservation: Reservation) -> None:
        """Store a reservation."""

    @abstractmethod
    def release(self, reservation_id: str) -> Reservation | None:
        """Take a reservation away, and answer it; None where it is not there."""

    @abstractmethod
    def reserved(self, which: UsageFilter) -> tuple[int, float]:
        """The tokens and US dollars that are reserved now."""

    @abstractmethod
    def stale(self, before: datetime) -> Sequence[Reservation]:
        """Reservations made before: their requests ended without a word."""


class IdempotencyRows(ABC):
    """Requests that may be sent twice."""

    @abstractmethod
    def reserve(self, record: IdempotencyRecord) -> IdempotencyRecord | None:
        """Store the record, unless one with its principal and key is there: then answer that one."""

    @abstractmethod
    def update(self, principal: str, key: str, **changes: Any) -> None:
        """Change columns."""

    @abstractmethod
    def remove(self, principal: str, key: str) -> None:
        """Forget the request."""

    @abstractmethod
    def prune(self, before: datetime) -> None:
        """Forget every request made before."""


class UserRows(ABC):
    """Users."""

    @abstractmethod
    def ensure(self, user_id: str, at: datetime) -> User:
        """The user, made now where there is none."""

    @abstractmethod
    def get(self, user_id: str) -> User | None:
        """The user, or None."""

    @abstractmethod
    def lock(self, user_id: str) -> User | None:
        """The user; until this transaction ends, no other one gets past this line for the same user."""

    @abstractmethod
    def update(self, user_id: str, **changes: Any) -> User:
        """Change columns. Raises UserNotFound."""

    @abstractmethod
    def page(self, *, cursor: str | None, limit: int) -> Page[User]:
        """By id. Raises InvalidCursor."""


class KeyRows(ABC):
    """API keys."""

    @abstractmethod
    def add(self, key: ApiKey) -> None:
        """Store a new key."""

    @abstractmethod
    def get(self, key_id: str) -> ApiKey | None:
        """The key, or None."""

    @abstractmethod
    def by_hash(self, key_hash: str) -> tuple[ApiKey, User] | None:
        """The key with this hash and its user, or None."""

    @abstractmethod
    def update(self, key_id: str, **changes: Any) -> ApiKey:
        """Change columns. Raises KeyNotFound."""

    @abstractmethod
    def page(self, user_id: str | None, *, cursor: str | None, limit: int) -> Page[ApiKey]:
        """Newest first, of one user or of all. Raises InvalidCursor."""


class TicketRows(ABC):
    """Tickets."""

    @abstractmethod
    def add(self, ticket: Ticket) -> None:
        """Store a new ticket."""

    @abstractmethod
    def get(self, ticket_hash: str) -> Ticket | None:
        """The ticket as it is, be it good or not; None where it is not there."""

    @abstractmethod
    def take(self, ticket_hash: str, now: datetime) -> Ticket | None:
        """The ticket, if it is still good. One that is not reusable is good for this one call."""

    @abstractmethod
    def prune(self, before: datetime) -> None:
        """Forget every ticket that expired before."""


class AuditRows(ABC):
    """The audit log."""

    @abstractmethod
    def add(self, records: Sequence[AuditRecord]) -> None:
        """Store records."""

    @abstractmethod
    def page(self, which: AuditFilter, *, cursor: str | None, limit: int) -> Page[AuditRecord]:
        """Newest first. Raises InvalidCursor."""

    @abstractmethod
    def prune(self, before: datetime) -> None:
        """Forget every record made before."""


class WorkspaceRows(ABC):
    """Persistent workspaces. One that is being deleted is not there any more for `get`, `named` and `page`."""

    @abstractmethod
    def add(self, workspace: NamedWorkspace) -> bool:
        """Store a new workspace. False where its user has one of this name, which may be one that is being deleted."""

    @abstractmethod
    def get(self, workspace_id: str) -> NamedWorkspace | None:
        """The workspace, or None. In a writing transaction, nobody else changes it before that has ended."""

    @abstractmethod
    def named(self, owner: str, name: str) -> NamedWorkspace | None:
        """The user's workspace of this name, or None."""

    @abstractmethod
    def update(self, workspace_id: str, **changes: Any) -> NamedWorkspace:
        """Change columns; `deleting=True` begins its deletion. Raises WorkspaceNotFound."""

    @abstractmethod
    def page(self, owner: str | None, *, cursor: str | None, limit: int) -> Page[NamedWorkspace]:
        """Newest first, of one user or of all. Raises InvalidCursor."""

    @abstractmethod
    def sessions(self, workspace_id: str) -> Sequence[str]:
        """The ids of sessions that have it, those that are being deleted too."""

    @abstractmethod
    def deleting(self) -> Sequence[str]:
        """The ids of workspaces that are deleted and something of which is still to be removed."""

    @abstractmethod
    def remove(self, workspace_id: str) -> None:
        """Delete the row."""


class EnvironmentRows(ABC):
    """Environments, each with its versions, which never change."""

    @abstractmethod
    def add(self, environment: Environment) -> bool:
        """Store a new version. False where it is there already."""

    @abstractmethod
    def get(self, name: str, version: int | None = None) -> Environment | None:
        """A version of the environment, by default the newest; None where it is not there."""

    @abstractmethod
    def versions(self, name: str) -> Sequence[Environment]:
        """Every version of the environment, newest first."""

    @abstractmethod
    def page(self, *, cursor: str | None, limit: int) -> Page[Environment]:
        """The newest version of each environment, by name. Raises InvalidCursor."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the environment with all of its versions."""

    @abstractmethod
    def sessions(self, name: str, owner: str | None = None) -> int:
        """How many sessions are in it, of everybody or of one owner; deleted ones and those in warm pools do not count."""

    @abstractmethod
    def with_sandbox(self, name: str) -> Sequence[str]:
        """The ids of sessions in it that have a sandbox or are getting one; not those in warm pools."""

    @abstractmethod
    def stopped(self) -> Sequence[str]:
        """The names of those that take no prompts, sorted; it need not be written to be stopped."""

    @abstractmethod
    def set_stopped(self, name: str, stopped: bool) -> None:
        """Have the environment take no prompts from here on, or take them again."""


class SecretRows(ABC):
    """Secrets, sealed."""

    @abstractmethod
    def put(self, secret: Secret) -> None:
        """Store a secret, in the place of the one of its name if there is one."""

    @abstractmethod
    def get(self, name: str) -> Secret | None:
        """The secret, or None."""

    @abstractmethod
    def all(self) -> Sequence[Secret]:
        """Every secret, by name."""

    @abstractmethod
    def remove(self, name: str) -> bool:
        """Delete it. False where it is not there."""


class SnapshotRows(ABC):
    """Snapshots of sessions' files. They have no part in a session's deletion: some outlive it with its workspace."""

    @abstractmethod
    def add(self, snapshot: Snapshot) -> None:
        """Store a new snapshot."""

    @abstractmethod
    def get(self, snapshot_id: str) -> Snapshot | None:
        """The snapshot, or None."""

    @abstractmethod
    def page(self, session_id: str, *, cursor: str | None, limit: int) -> Page[Snapshot]:
        """A session's, newest first. Raises InvalidCursor."""

    @abstractmethod
    def of_files(
        self, *, session_id: str | None = None, workspace_id: str | None = None, owner: str | None = None
    ) -> Sequence[Snapshot]:
        """Every snapshot of a session, of all sessions in one persistent workspace, or of one user, newest first."""

    @abstractmethod
    def older(self, before: datetime, *, limit: int) -> Sequence[Snapshot]:
        """So many of those taken before a moment, but never the newest of the same files; the oldest first."""

    @abstractmethod
    def of_turn(self, turn_id: str) -> Snapshot | None:
        """The newest that was taken after this turn, or None."""

    @abstractmethod
    def remove(self, snapshot_ids: Sequence[str]) -> Sequence[str]:
        """Delete rows. Answers the objects that no row has any more."""

    @abstractmethod
    def due(self) -> Sequence[str]:
        """The ids of sessions whose files are still to be kept."""


class ArtifactRows(ABC):
    """Files that sessions have published."""

    @abstractmethod
    def add(self, artifact: Artifact) -> None:
        """Store a new artifact."""

    @abstractmethod
    def get(self, artifact_id: str) -> Artifact | None:
        """The artifact, or None."""

    @abstractmethod
    def page(self, session_id: str, *, cursor: str | None, limit: int) -> Page[Artifact]:
        """A session's, newest first. Raises InvalidCursor."""

    @abstractmethod
    def remove(self, artifact_id: str) -> None:
        """Delete the row."""


class DoomedRows(ABC):
    """Objects that are still to be deleted: whatever stands under a prefix. So that none is forgotten while the object
    store is away."""

    @abstractmethod
    def add(self, prefix: str) -> None:
        """From now on nothing refers to objects whose keys begin so."""

    @abstractmethod
    def some(self, limit: int) -> Sequence[str]:
        """So many of the prefixes."""

    @abstractmethod
    def remove(self, prefix: str) -> None:
        """They are deleted."""


class NetworkRows(ABC):
    """What sandboxes asked the egress proxy for."""

    @abstractmethod
    def add(self, requests: Sequence[NetworkRequest], *, most: int = 1000) -> None:
        """Add to what is counted. A session's kinds of requests beyond `most` are counted as of OTHER_HOSTS, port 0.

        Those of sessions that are not there are left out.
        """

    @abstractmethod
    def page(self, session_id: str, *, cursor: str | None, limit: int) -> Page[NetworkRequest]:
        """A session's, what was first asked for last at the front. Raises InvalidCursor."""


class Transaction(ABC):
    """Rows as one transaction sees them. Not to be used after it has ended."""

    sessions: SessionRows
    pools: PoolRows
    trees: TreeRows
    turns: TurnRows
    counts: CountRows
    events: EventRows
    transcripts: TranscriptRows
    interactions: InteractionRows
    rules: RuleRows
    sandboxes: SandboxRows
    usage: UsageRows
    idempotency: IdempotencyRows
    users: UserRows
    keys: KeyRows
    tickets: TicketRows
    audit: AuditRows
    workspaces: WorkspaceRows
    snapshots: SnapshotRows
    artifacts: ArtifactRows
    doomed: DoomedRows
    network: NetworkRows
    environments: EnvironmentRows
    secrets: SecretRows

    @abstractmethod
    def lock(self, name: str) -> None:
        """Until this transaction ends, no other one gets past this line with the same name.

        Locks are taken in one order, or two transactions could wait for each other: a session's row (which reading it
        in a writing transaction locks), then a user's, then names.
        """


class Store(ABC):
    """Keeps rows. The only durable memory there is.

    A transaction is a plain function over a `Transaction`: it may run in another thread, so it touches rows and its own
    arguments and nothing else, and it never waits.
    """

    @abstractmethod
    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Open, and bring the schema up to date; closing is registered with `exit_stack`.

        Raises:
            MigrationRequired: the schema is newer than this release knows.
        """

    @abstractmethod
    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run a transaction that changes nothing, and answer what it answers."""

    @abstractmethod
    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run a transaction: committed when `work` returns, rolled back when it raises. Answers what it answers.

        The events it appended are published after the commit, in the order of commits, before this returns. A store
        that is reached over a network may run `work` more than once; all but its last run leave nothing.

        Raises:
            StoreUnavailable: the store was away for too long, and nothing of this is stored.
            StoreOutcomeUnknown: it went away in the middle of the commit, and is away still.
        """

    async def write_surely(self, work: Callable[[Transaction], T]) -> T:
        """As `write`, for as long as it takes: for what must not be lost and has nobody to send it again."""
        while True:
            try:
                return await self.write(work)
            except StoreOutcomeUnknown as error:
                if error.outcome is None:
                    raise
                try:
                    answer: T = await error.outcome
                except StoreUnavailable:
                    continue
                return answer
            except StoreUnavailable:
                await asyncio.sleep(_STORE_AWAY_SECONDS)


# ----------------------------------------------------------------------------------------------------------- objects


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What is known of one object."""

    key: str
    size: int
    """Bytes of its content, whatever it takes in the store."""
    stored_at: datetime
    sha256: str | None = None
    """Of its content, in hexadecimal; None in a listing."""


class ObjectStore(ABC):
    """Keeps large things that are written once and read rarely.

    A key is components of `[A-Za-z0-9._-]`, joined by `/`, none of them beginning with a dot; no key is the beginning
    of another one's folders. Other keys raise ValueError. What is read is what was stored, or an error: content carries
    its SHA-256, and each part that is read is checked. Every method may be called at the same time as any other.

    Every method raises `ObjectStoreUnavailable` where the store does not answer as it should, within a bounded time;
    all may then be repeated.
    """

    @abstractmethod
    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Make ready; called once, before anything else. Closing is registered with `exit_stack`.

        A store that is away is no reason to fail.

        Raises:
            OperatorError: what it is told can never work; the message says what to do.
        """

    @abstractmethod
    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> ObjectInfo:
        """Store an object whole; nobody ever sees a part of it. What was there under the key is replaced.

        What `chunks` raises is passed on, and then nothing is changed. No more of it is held than a few parts.
        """

    @abstractmethod
    def get(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The content from byte `start` up to `end`, or what there is of that, in pieces.

        What was given before an error is true. The end of the whole is given only if the checksum of the whole holds.

        Raises:
            ObjectNotFound: there is none.
            ObjectDamaged: it is not what was stored.
            ObjectKeyMissing: it is encrypted, and not with a key that is set.
        """

    @abstractmethod
    async def stat(self, key: str) -> ObjectInfo:
        """What is known of an object. Raises as `get` does."""

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object in the folder `prefix`, however deep, in no order; the empty prefix lists all."""

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""


# ------------------------------------------------------------------------------------------------------- credentials


class CredentialSource(ABC):
    """Knows the real credential of the model. Only the model gateway asks."""

    @abstractmethod
    def headers(self) -> Mapping[str, str]:
        """The headers that carry the credential.

        Raises:
            MissingCredential: none is set; the message says how to set one.
        """

    @abstractmethod
    def describe(self) -> str:
        """Which credential is used, by name and never by value."""


# --------------------------------------------------------------------------------------------------------- observers


class Observer:
    """Told of what happens, in the event loop's thread. It answers nothing, never waits and never raises.

    Every method may be left out: this class itself is the observer that looks away.
    """

    def stored(self, events: Sequence[StoredEvent]) -> None:
        """Events were committed; each is told once, in the order of commits, before anyone else hears of it."""

    def first_delta(self, session_id: str, turn_id: str | None) -> None:
        """The first piece of a message of this turn has arrived."""

    def delivered(self, frames: Sequence[Frame]) -> None:
        """A viewer is being handed frames that have just happened; those that it catches up on are not told."""

    def linked(self, session_id: str, *, again: bool) -> None:
        """A runner has connected; `again`: it had been connected before."""
