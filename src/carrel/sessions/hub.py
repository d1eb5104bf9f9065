"""The gateway's end of every link: who is connected, what it sent, what it is told.

Numbered frames are applied in order and acknowledged after the commit that stored them; a frame whose number is not
above the sandbox's mark came twice and is dropped. Deltas keep their place between events.
"""

from __future__ import annotations

import asyncio
import hmac
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final

import structlog
from pydantic import ValidationError
from pydantic_core import to_json

from carrel import abc
from carrel.errors import SandboxLost, StoreUnavailable
from carrel.killpoints import reached
from carrel.model import (
    Failure,
    Interaction,
    InteractionStatus,
    OnSandboxLost,
    Sandbox,
    SandboxStatus,
    Session,
    SessionStatus,
    StopReason,
    Turn,
    TurnStatus,
    utc_now,
)
from carrel.protocol.events import EVENT_TYPES
from carrel.protocol.link import (
    PROTOCOL_VERSION,
    RUNNER_FRAME,
    Ack,
    Activity,
    AgentFailed,
    AgentReady,
    AgentSession,
    Ask,
    Deferred,
    DeltaFrame,
    Ended,
    EventFrame,
    GatewayFrame,
    Hello,
    NumberedFrame,
    OpenBlocks,
    Parked,
    Refused,
    RunnerFrame,
    Taken,
    Transcript,
    TranscriptFrame,
    TurnBegun,
    TurnEnded,
    WantTranscript,
)
from carrel.protocol.permissions import PermissionRules
from carrel.sessions import transitions
from carrel.sessions.asking import answer_frame, interaction_of
from carrel.sessions.live import Live

log = structlog.get_logger(__name__)

_TRANSCRIPT_LINES: Final = 200
_HELLO_SECONDS: Final = 10.0
_GROUP_FRAMES: Final = 500
_WAITING_BYTES: Final = 16 * 1024 * 1024
_STORE_AWAY_SECONDS: Final = 0.5


def token_hash(token: str) -> str:
    """How a token is stored."""
    return sha256(token.encode()).hexdigest()


class LinkConnection(ABC):
    """A message-wise connection to a runner."""

    @abstractmethod
    async def receive(self) -> bytes | None:
        """The next message, or None when the connection is over."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send a message. Does nothing when the connection is over."""

    @abstractmethod
    async def close(self) -> None:
        """End the connection."""


class Link:
    """One connected runner, as the owner of its session sees it."""

    def __init__(self, sandbox: Sandbox, connection: LinkConnection, hello: Hello) -> None:
        self.sandbox_id = sandbox.id
        self.session_id = sandbox.session_id
        self.runtime = sandbox.runtime
        self.state = sandbox.state
        self.again = hello.bound
        self.bound = hello.bound
        self.ready = hello.bound and sandbox.status is SandboxStatus.LIVE
        self.last_turn = hello.last_turn
        self.background_tasks = hello.background_tasks
        self.live_options = (hello.model, hello.permission_mode)
        """The model and the permission mode that the agent was last told to use."""
        self.rules: PermissionRules | None = None
        """The rules that it was last told; None: nobody knows."""
        self.telling = asyncio.Lock()
        """Held by whoever tells it what has changed."""
        self.up_to_date = not hello.bound
        """Whether these are known to be what the session asks for: of one that is back, nobody knows at first."""
        self.asks = hello.pending_asks
        self.interrupted_turn: str | None = None
        self.ended = False
        self.over = False
        self.connection = connection

    async def tell(self, frame: GatewayFrame) -> None:
        """Send the runner a frame; it is lost when the connection is, and what follows from the rows is sent again."""
        await self.connection.send(to_json(frame))


class Hub:
    """Every connected runner of this gateway."""

    def __init__(
        self,
        store: abc.Store,
        live: Live,
        poke: Callable[[str], None],
        observer: abc.Observer = abc.Observer(),
    ) -> None:
        """Make the hub.

        Args:
            store: where frames are put.
            live: where deltas go.
            poke: told the session's id whenever its link has changed something the owner should look at.
            observer: told of connections.
        """
        self._store = store
        self._live = live
        self.poke = poke
        self._observer = observer
        self._links: dict[str, Link] = {}
        self._by_session: dict[str, Link] = {}
        self._failures: dict[str, AgentFailed] = {}
        self.draining = False
        """The server is shutting down: no turn is started any more."""

    def take_failure(self, sandbox_id: str) -> AgentFailed | None:
        """What the sandbox's runner said before it gave up, once; it may be gone by now."""
        return self._failures.pop(sandbox_id, None)

    def fail(self, sandbox_id: str, failure: Failure, operator_detail: str) -> None:
        """Have the sandbox ended for this reason, as if its runner had said so; the owner is to be poked."""
        self._failures[sandbox_id] = AgentFailed(n=0, failure=failure, operator_detail=operator_detail)

    def ready_link(self, session_id: str) -> Link | None:
        """The link of the session's connected agent, if it can be given a turn now."""
        link = self._by_session.get(session_id)
        return link if link is not None and link.ready and link.bound and not link.ended else None

    def bound_link(self, session_id: str) -> Link | None:
        """The link of the session's agent, if it has been told its session; it may be starting yet."""
        link = self._by_session.get(session_id)
        return link if link is not None and link.bound and not link.ended else None

    def link(self, sandbox_id: str) -> Link | None:
        """The sandbox's link, if it is connected now."""
        return self._links.get(sandbox_id)

    def sessions(self) -> list[str]:
        """The ids of the sessions whose runners are connected."""
        return list(self._by_session)

    def __len__(self) -> int:
        return len(self._links)

    async def serve(self, connection: LinkConnection) -> None:
        """Serve one connection to its end."""
        structlog.contextvars.clear_contextvars()
        link = await self._welcome(connection)
        if link is None:
            await connection.close()
            return
        structlog.contextvars.bind_contextvars(session_id=link.session_id, sandbox_id=link.sandbox_id)
        earlier = self._links.get(link.sandbox_id)
        self._observer.linked(link.session_id, again=link.again)
        self._links[link.sandbox_id] = link
        self._by_session[link.session_id] = link
        if earlier is not None:
            await earlier.connection.close()
        await self._answer_again(link)
        self.poke(link.session_id)
        try:
            await self._serve_frames(link)
        except StoreUnavailable as error:
            # What is not acknowledged is sent again by the runner, which dials at once.
            log.warning("link.store_away", sandbox=link.sandbox_id, detail=error.operator_detail)
            await connection.close()
        finally:
            if self._links.get(link.sandbox_id) is link:
                del self._links[link.sandbox_id]
            if self._by_session.get(link.session_id) is link:
                del self._by_session[link.session_id]
            self.poke(link.session_id)

    async def tell_answer(self, interaction: Interaction) -> None:
        """Tell the runner that asked what became of it, if it is connected; if not, it asks when it is."""
        link = self._by_session.get(interaction.session_id)
        if link is not None:
            await link.tell(answer_frame(interaction))

    async def _answer_again(self, link: Link) -> None:
        """What was resolved while the runner was not connected."""
        for interaction_id in link.asks:
            found = await self._store.read(lambda tx, i=interaction_id: tx.interactions.get(i))  # type: ignore[misc]
            if found is not None and found.status is not InteractionStatus.PENDING:
                await link.tell(answer_frame(found))

    async def _welcome(self, connection: LinkConnection) -> Link | None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                first = await connection.receive()
            hello = RUNNER_FRAME.validate_json(first or b"")
        except (TimeoutError, ValidationError):
            log.warning("link.no_hello")
            return None
        if not isinstance(hello, Hello):
            return None
        try:
            sandbox, session = await self._store.read(
                lambda tx: (
                    (sandbox := tx.sandboxes.get(hello.sandbox_id)),
                    tx.sessions.get(sandbox.session_id) if sandbox else None,
                )
            )
        except StoreUnavailable as error:
            # Not refused: the runner dials again.
            log.warning("link.store_away", sandbox=hello.sandbox_id, detail=error.operator_detail)
            return None
        refusal = _refusal(hello, sandbox, session)
        if refusal is not None or sandbox is None:
            log.warning("link.refused", sandbox=hello.sandbox_id, reason=refusal)
            await connection.send(to_json(Refused(reason=refusal or "")))
            return None
        log.info("link.connected", sandbox=sandbox.id, session=sandbox.session_id, generation=sandbox.generation)
        # Whatever was stored but not acknowledged need not come again.
        await connection.send(to_json(Ack(n=sandbox.acked)))
        return Link(sandbox, connection, hello)

    async def _serve_frames(self, link: Link) -> None:
        received: deque[RunnerFrame] = deque()
        received_bytes = 0
        some, room = asyncio.Event(), asyncio.Event()
        over = False

        async def read() -> None:
            nonlocal over, received_bytes
            try:
                while (message := await link.connection.receive()) is not None:
                    received.extend(RUNNER_FRAME.validate_json(line) for line in message.split(b"\n"))
                    received_bytes += len(message)
                    some.set()
                    # The runner keeps what we do not read, to a bound of its own.
                    while received_bytes > _WAITING_BYTES:
                        room.clear()
                        await room.wait()
            except ValidationError as error:
                log.error("link.bad_frame", sandbox=link.sandbox_id, error=str(error)[:500])
                await link.connection.close()
            finally:
                over = link.over = True
                some.set()

        reader = asyncio.create_task(read(), name=f"link {link.sandbox_id}")
        try:
            while not over or received:
                if not received:
                    received_bytes = 0
                    room.set()
                    some.clear()
                    await some.wait()
                    continue
                await self._take(link, received)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _take(self, link: Link, received: deque[RunnerFrame]) -> None:
        """Take a run of frames of one sort off the front, and deal with it."""
        first = received[0]
        if isinstance(first, DeltaFrame):
            deltas: list[DeltaFrame] = []
            while received and isinstance(received[0], DeltaFrame) and len(deltas) < _GROUP_FRAMES:
                deltas.append(received.popleft())  # type: ignore[arg-type]
            self._live.deltas(link.session_id, deltas)
            reached("delta.published")
        elif isinstance(first, OpenBlocks):
            received.popleft()
            self._live.replace(link.session_id, first.blocks)
        elif isinstance(first, WantTranscript):
            received.popleft()
            await self._send_transcript(link)
        elif isinstance(first, Hello):
            received.popleft()
        else:
            frames: list[NumberedFrame] = []
            while (
                received
                and not isinstance(received[0], DeltaFrame | OpenBlocks | WantTranscript | Hello)
                and len(frames) < _GROUP_FRAMES
            ):
                frames.append(received.popleft())  # type: ignore[arg-type]
            await self._store_frames(link, frames)

    async def _store_frames(self, link: Link, frames: Sequence[NumberedFrame]) -> None:
        reached("frames.received")
        starts = not self.draining
        await self._write(link, lambda tx: _apply(tx, link.session_id, link.sandbox_id, frames, starts=starts))
        reached("frames.stored")
        if any(isinstance(frame, Deferred) for frame in frames):
            reached("interaction.deferred")
        if any(isinstance(frame, Taken) for frame in frames):
            reached("interaction.taken")
        await link.tell(Ack(n=max(frame.n for frame in frames)))
        reached("frames.acked")
        for frame in frames:
            self._remember(link, frame)
        if any(not isinstance(frame, EventFrame | TranscriptFrame) for frame in frames):
            self.poke(link.session_id)

    async def _write(self, link: Link, work: Callable[[abc.Transaction], None]) -> None:
        """Store, for as long as the runner is there; frames that are stored twice are dropped by their numbers."""
        while True:
            try:
                await self._store.write(work)
                return
            except StoreUnavailable as error:
                # They are not acknowledged, so that nothing is lost; what comes behind them waits, to a bound.
                if link.over:
                    raise
                log.warning("frames.not_stored", sandbox=link.sandbox_id, error=str(error))
                await asyncio.sleep(_STORE_AWAY_SECONDS)

    def _remember(self, link: Link, frame: NumberedFrame) -> None:
        match frame:
            case AgentReady():
                link.ready = True
                link.last_turn = frame.resumed_turn or link.last_turn
            case AgentFailed():
                # What was found out about it beforehand is nearer to the cause.
                self._failures.setdefault(link.sandbox_id, frame)
            case Activity():
                link.background_tasks = frame.background_tasks
            case Ended():
                link.ended = True
            case EventFrame():
                if frame.event.type in ("tool.called", "tool.finished"):
                    reached(frame.event.type)

    async def _send_transcript(self, link: Link) -> None:
        subpaths = await self._store.read(lambda tx: list(tx.transcripts.subpaths(link.session_id)))
        for subpath in subpaths:
            after = 0
            while True:
                batch = await self._store.read(
                    lambda tx, s=subpath, a=after: tx.transcripts.page(  # type: ignore[misc]
                        link.session_id, s, after=a, limit=_TRANSCRIPT_LINES
                    )
                )
                if not batch:
                    break
                after = batch[-1][0]
                await link.tell(Transcript(subpath=subpath, lines=[line for _, line in batch]))
        await link.tell(Transcript(lines=[], last=True))


def _refusal(hello: Hello, sandbox: Sandbox | None, session: Session | None) -> str | None:
    """Why this runner is not let in, or None."""
    if sandbox is None or not hmac.compare_digest(token_hash(hello.token), sandbox.link_token_hash):
        return "unknown sandbox or wrong token"
    if hello.version != PROTOCOL_VERSION:
        return f"protocol {hello.version} is not spoken here"
    if sandbox.status is SandboxStatus.GONE or session is None:
        return "the session no longer has this sandbox"
    if sandbox.generation < session.generation:
        return "a newer generation has the session"
    return None


# ------------------------------------------------------------------------------------------------- frames, into rows


def _apply(
    tx: abc.Transaction, session_id: str, sandbox_id: str, frames: Sequence[NumberedFrame], *, starts: bool
) -> None:
    # First of all, because that holds it: from here on nobody else changes the session, its sandbox or its turns.
    session = tx.sessions.get(session_id)
    sandbox = tx.sandboxes.get(sandbox_id)
    if sandbox is None or sandbox.status is SandboxStatus.GONE:
        return
    mark = tx.sandboxes.advance(sandbox_id, max(frame.n for frame in frames))
    fresh: list[NumberedFrame] = []
    for frame in frames:
        if frame.n > mark:
            fresh.append(frame)
            mark = frame.n
    if session is None or sandbox.generation < session.generation:
        return
    events: list[EventFrame] = []
    for frame in fresh:
        if isinstance(frame, EventFrame):
            events.append(frame)
            continue
        if session.reserved is None:
            _append(tx, sandbox, events)
        events = []
        _apply_one(tx, sandbox, frame, starts=starts)
    if session.reserved is None:
        _append(tx, sandbox, events)


def _append(tx: abc.Transaction, sandbox: Sandbox, frames: Sequence[EventFrame]) -> None:
    # A sandbox that was told to end has nothing more to say: its turn has ended without it.
    if sandbox.status is SandboxStatus.ENDING:
        return
    tx.events.append(sandbox.session_id, [frame.event for frame in frames if frame.event.type in EVENT_TYPES])


def _apply_one(tx: abc.Transaction, sandbox: Sandbox, frame: NumberedFrame, *, starts: bool) -> None:
    session = tx.sessions.get(sandbox.session_id)
    if session is None:
        return
    match frame:
        case TranscriptFrame():
            tx.transcripts.append(session.id, subpath=frame.subpath, turn_id=frame.turn_id, lines=frame.lines)
        case AgentSession():
            tx.sessions.update(session.id, agent_session_id=frame.agent_session_id)
        case AgentReady():
            _agent_ready(tx, sandbox, session, frame, starts=starts)
        case Activity():
            # A background task has begun or ended: idleness is counted from here.
            tx.sessions.update(session.id, **transitions.touch(session, utc_now()))
        case Ask():
            if sandbox.status is not SandboxStatus.ENDING:
                transitions.ask(tx, session, interaction_of(session, frame))
        case Parked():
            transitions.park(tx, session, frame.interaction_id)
        case Taken():
            tx.interactions.update(frame.interaction_id, taken_at=utc_now())
        case Deferred():
            _deferred(tx, sandbox, session)
        case TurnBegun():
            if sandbox.status is not SandboxStatus.ENDING and tx.turns.get(frame.turn_id) is None:
                transitions.begin_agent_turn(tx, session, frame.turn_id, frame.at, sandbox.id)
        case TurnEnded():
            _turn_ended(tx, sandbox, session, frame)


def _agent_ready(tx: abc.Transaction, sandbox: Sandbox, session: Session, frame: AgentReady, *, starts: bool) -> None:
    if sandbox.status is not SandboxStatus.LAUNCHING:
        return
    tx.sandboxes.update(sandbox.id, status=SandboxStatus.LIVE)
    if session.status is SessionStatus.STARTING:
        session = transitions.set_status(tx, session, SessionStatus.READY)
    # Here and not in the owner's next step: what the agent says of the turn may stand right behind this frame.
    turn = tx.turns.live(session.id)
    if session.status is not SessionStatus.READY:
        return
    if turn is not None and turn.id == frame.resumed_turn:
        transitions.continue_turn(tx, session, turn, sandbox.id)
    elif turn is not None and turn.sandbox_id != sandbox.id and not _may_begin_again(turn):
        # It was to go on from a call that this agent knows nothing of.
        lost = SandboxLost()
        failure = Failure(code=lost.code, message=lost.message)
        transitions.fail_turn(tx, session, turn, failure, StopReason.SANDBOX_LOST)
        turn = None
    queued = tx.turns.queued(session.id) if turn is None and starts else ()
    if queued:
        # The sandbox was started for this turn and holds its place among those at work: it is not given up in between.
        transitions.start_turn(tx, session, queued[0], sandbox.id)


def _may_begin_again(turn: Turn) -> bool:
    """Whether the turn may be begun anew where its agent is lost."""
    return turn.options.get("on_sandbox_lost") == OnSandboxLost.CONTINUE


def _deferred(tx: abc.Transaction, sandbox: Sandbox, session: Session) -> None:
    """The agent has put its call off: its process ends, and the turn waits in its rows alone."""
    if sandbox.status is SandboxStatus.LIVE:
        tx.sandboxes.update(sandbox.id, status=SandboxStatus.ENDING)
    if session.status is SessionStatus.READY:
        transitions.settle(tx, session)  # the turn had been ended meanwhile


def _turn_ended(tx: abc.Transaction, sandbox: Sandbox, session: Session, frame: TurnEnded) -> None:
    turn = tx.turns.get(frame.turn_id)
    if turn is None or turn.status.ended or turn.session_id != session.id:
        return
    status, stop_reason, failure = frame.status, frame.stop_reason, frame.failure
    if turn.error is not None and status is not TurnStatus.SUCCEEDED:
        # The gateway has ended it, and knows why better than the agent does.
        status, stop_reason, failure = TurnStatus.FAILED, turn.interrupt_reason or StopReason.ERROR, turn.error
    ended = transitions.complete_turn(
        tx,
        session,
        turn,
        status,
        stop_reason=stop_reason,
        error=failure,
        structured_output=frame.structured_output,
        num_turns=frame.num_turns,
        ended_at=frame.at,
    )
    if sandbox.status is not SandboxStatus.ENDING:
        after = transitions.touch(session, frame.at)
        transitions.set_status(tx, session, SessionStatus.READY, stop_reason=ended.stop_reason, **after)
