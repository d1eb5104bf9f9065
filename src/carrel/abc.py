"""Every contract a plug-in may implement, and every contract the heart stands on.

    Runtime            where agents run: local processes, containers, pods
    EventBus           who hears of a frame, now; the store is the truth, the bus a hint
    Store              rows, in transactions; one `Transaction` with a role per table family
    CredentialSource   the real key of the model, for the model gateway alone

An implementation is good when the conformance suite of its contract (`carrel.testing.conformance`) passes over it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from carrel.model import Sandbox, Session, SessionStatus, Turn, Usage
from carrel.protocol.events import Delta, NewEvent, StoredEvent

__all__ = [
    "CredentialSource",
    "EventBus",
    "EventRows",
    "Frame",
    "IdempotencyRecord",
    "IdempotencyRows",
    "LaunchSpec",
    "Page",
    "Runtime",
    "SandboxRows",
    "SessionFilter",
    "SessionRows",
    "Store",
    "Subscription",
    "Transaction",
    "TranscriptRows",
    "TurnRows",
    "UsageRecord",
    "UsageRows",
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
    home: str
    owner: tuple[int, int] | None


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

    @abstractmethod
    def launch(self, spec: LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Start a sandbox whose runner will dial the gateway.

        Yields serialisable checkpoints. Each is stored before the next step is taken, so that a gateway that dies in
        between can still find and end what was begun. After the last one the runner is on its way.

        Raises:
            SandboxLaunchFailed: it could not be started; what was begun is ended by `terminate` with the last checkpoint.
        """

    @abstractmethod
    async def terminate(self, state: Mapping[str, Any]) -> None:
        """End the sandbox of this checkpoint and every process in it. May be called at any time, and again.

        When it returns, nothing of the sandbox runs.
        """

    @abstractmethod
    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """For each sandbox id, whether its runner is alive now. Says False only when it is confirmed gone."""

    @abstractmethod
    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """Every sandbox of this installation that has anything left on this host: id to a state `terminate` takes."""

    @abstractmethod
    def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        """The lines its runner and agent have written so far; none where there is nothing."""


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


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list, and the cursor of the next part (None at the end)."""

    items: Sequence[T]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class SessionFilter:
    """Which sessions a list shows."""

    owner: str | None = None
    status: SessionStatus | None = None


@dataclass(frozen=True, kw_only=True)
class UsageRecord:
    """What one answered model request took."""

    id: str
    session_id: str
    turn_id: str | None
    model: str
    usage: Usage
    cost_usd: float | None
    at: datetime


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
        """Delete the session and every row that belongs to it."""

    @abstractmethod
    def page(self, which: SessionFilter, *, cursor: str | None, limit: int) -> Page[Session]:
        """Newest first. Raises InvalidCursor."""

    @abstractmethod
    def unsettled(self, now: datetime) -> Sequence[str]:
        """The ids of sessions that look alive, have turns queued, are being deleted, or whose time to live is over."""

    @abstractmethod
    def deleting(self, session_id: str) -> bool:
        """Whether the session is deleted and something of it is still to be removed."""

    @abstractmethod
    def mark_deleting(self, session_id: str) -> None:
        """From now on the session is not found; what is left of it is still to be removed."""


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


class UsageRows(ABC):
    """What model requests took."""

    @abstractmethod
    def add(self, record: UsageRecord) -> None:
        """Store a record."""

    @abstractmethod
    def of_turn(self, turn_id: str) -> tuple[Usage, float | None, int]:
        """The sums of a turn: tokens, cost (None where any part of it is unknown), and how many requests."""


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


class Transaction(ABC):
    """Rows as one transaction sees them. Not to be used after it has ended."""

    sessions: SessionRows
    turns: TurnRows
    events: EventRows
    transcripts: TranscriptRows
    sandboxes: SandboxRows
    usage: UsageRows
    idempotency: IdempotencyRows


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

        The events it appended are published after the commit, in the order of commits, before this returns.
        """


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
