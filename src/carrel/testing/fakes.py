"""Sandboxes without processes: runners within this process that speak the link protocol over two queues.

`FakeHost` stands for the machine the sandboxes run on, and outlives any gateway. `FakeRuntime` makes and ends sandboxes
there. What an agent does with a prompt is a script, an async function over a `FakeTurn`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic_core import to_json

from carrel import abc
from carrel.errors import TurnTimedOut
from carrel.model import Failure, StopReason, TurnStatus, new_id, utc_now
from carrel.protocol import events
from carrel.protocol.link import (
    GATEWAY_FRAME,
    Ack,
    Activity,
    AgentFailed,
    AgentReady,
    AgentSession,
    Bind,
    DeltaFrame,
    Ended,
    EventFrame,
    GatewayFrame,
    Hello,
    Interrupt,
    NumberedFrame,
    OpenBlock,
    OpenBlocks,
    Refused,
    SetModel,
    SetPermissionMode,
    Shutdown,
    StartTurn,
    Transcript,
    TranscriptFrame,
    TurnBegun,
    TurnEnded,
    WantTranscript,
)
from carrel.sessions.hub import LinkConnection

__all__ = ["FakeHost", "FakeRunner", "FakeRuntime", "FakeTurn", "Script", "pipe"]

Serve = Callable[[LinkConnection], Awaitable[None]]


class _End(LinkConnection):
    def __init__(self) -> None:
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False
        self.peer: _End

    async def receive(self) -> bytes | None:
        """The next message, or None when the connection is over."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
        return message

    async def send(self, data: bytes) -> None:
        """Send a message. Does nothing when the connection is over."""
        self.send_now(data)

    def send_now(self, data: bytes) -> None:
        """Send without waiting."""
        if not self._closed:
            self.peer._inbox.put_nowait(data)

    async def close(self) -> None:
        """End the connection, for both ends."""
        self.cut()

    def cut(self) -> None:
        """End it without waiting."""
        for end in (self, self.peer):
            if not end._closed:
                end._closed = True
                end._inbox.put_nowait(None)


def pipe() -> tuple[_End, _End]:
    """Both ends of a connection within this process."""
    one, two = _End(), _End()
    one.peer, two.peer = two, one
    return one, two


class FakeTurn:
    """A turn as a script sees it."""

    def __init__(self, runner: FakeRunner, turn_id: str, prompt: str, *, resumed: bool) -> None:
        self.id = turn_id
        self.prompt = prompt
        self.resumed = resumed
        """Whether an earlier sandbox had begun it."""
        self.runner = runner
        self.interrupted = asyncio.Event()
        self.reason: StopReason | None = None
        self.structured_output: Any = None
        self.num_turns = 0
        self._message = ""
        self._text = ""

    @property
    def workspace(self) -> Path:
        """Where the session's files are."""
        return Path(self.runner.spec.workspace)

    def delta(self, text: str, kind: str = events.DeltaKind.TEXT) -> None:
        """Say a piece of a text; the block stays open until `finish`."""
        if not self._message:
            self._message = f"msg_{new_id()}"
        frame = DeltaFrame(
            delta=kind, turn_id=self.id, message_id=self._message, block=0, offset=len(self._text), text=text
        )
        self._text += text
        self.runner.send_now(frame)

    def reset(self) -> None:
        """Take every piece of the open block back: the message has to be made anew."""
        self.runner.send_now(DeltaFrame(delta=events.DeltaKind.RESET, turn_id=self.id, message_id=self._message))
        self._message = self._text = ""

    def finish(self) -> None:
        """Close the open block: its whole text becomes an event."""
        self.event(events.MessageAssistant(message_id=self._message, block=0, text=self._text))
        self.runner.remember({"type": "assistant", "text": self._text}, self.id)
        self._message = self._text = ""

    def say(self, *pieces: str) -> None:
        """Say a whole text in pieces."""
        self.num_turns += 1
        for piece in pieces:
            self.delta(piece)
        self.finish()

    def call(self, tool: str, input: dict[str, Any], result: str) -> None:
        """Call a tool and get its result."""
        call_id = f"toolu_{new_id()}"
        self.event(events.ToolCalled(id=call_id, tool=tool, input=input))
        self.event(events.ToolFinished(id=call_id, tool=tool, result=result))

    def event(self, data: events.EventData) -> None:
        """Report a fact."""
        event = events.NewEvent.of(data, at=utc_now(), turn_id=self.id)
        self.runner.send(lambda n: EventFrame(n=n, event=event))

    def open_blocks(self) -> list[OpenBlock]:
        """The text so far."""
        if not self._text:
            return []
        kind = events.DeltaKind.TEXT
        return [OpenBlock(turn_id=self.id, kind=kind, message_id=self._message, block=0, text=self._text)]


Script = Callable[[FakeTurn], Awaitable[None]]


async def _echo(turn: FakeTurn) -> None:
    """Says which turn of the conversation it is, and quotes the prompt: a resume can be seen to remember."""
    turn.say(f"turn {turn.runner.turns_remembered}", ": ", turn.prompt)


class FakeRunner:
    """A runner and its agent, as tasks of this process."""

    def __init__(self, host: FakeHost, spec: abc.LaunchSpec) -> None:
        self.host = host
        self.spec = spec
        self.alive = True
        self.usage = abc.SandboxUsage(memory_bytes=100 * 2**20, processes=10, cpu_seconds=0.1)
        """What it is measured to take."""
        self.running: FakeTurn | None = None
        self.model: str | None = None
        self.permission_mode: str | None = None
        self.bind: Bind | None = None
        self.log: list[str] = ["started"]
        self.connections = 0
        self._outbox: list[tuple[int, bytes]] = []
        self._numbered = 0
        self._acked = 0
        self._last_turn: str | None = None
        self._background = 0
        self._agent_session_id = ""
        self._seen: set[str] = set()
        self._turns: asyncio.Queue[StartTurn] = asyncio.Queue()
        self._transcript: asyncio.Queue[Transcript] = asyncio.Queue()
        self._connection: _End | None = None
        self._tasks = [host.spawn(self._stay_linked(), f"fake runner {spec.sandbox_id}")]

    # ------------------------------------------------------------------------------------------------- what it sends

    def send(self, make: Callable[[int], NumberedFrame]) -> None:
        """Send a numbered frame; it is kept until it is acknowledged."""
        self._numbered += 1
        data = to_json(make(self._numbered))
        self._outbox.append((self._numbered, data))
        if self._connection is not None:
            self._connection.send_now(data)

    def send_now(self, frame: Any) -> None:
        """Send an unnumbered frame, or drop it where there is no connection."""
        if self._connection is not None:
            self._connection.send_now(to_json(frame))

    def send_again(self) -> None:
        """Send every frame that is not acknowledged once more, on the same connection."""
        for _, data in self._outbox:
            if self._connection is not None:
                self._connection.send_now(data)

    def background(self, tasks: int) -> None:
        """Say how many background tasks are at work."""
        self._background = tasks
        self.send(lambda n: Activity(n=n, background_tasks=tasks))

    def fail(self, failure: Failure, operator_detail: str = "") -> None:
        """Say that the agent cannot go on."""
        self.send(lambda n: AgentFailed(n=n, failure=failure, operator_detail=operator_detail))

    async def begin(self, script: Script) -> None:
        """Begin a run that nobody asked for, as an agent does whose background task has ended."""
        turn = FakeTurn(self, new_id(), "", resumed=False)
        self.send(lambda n: TurnBegun(n=n, turn_id=turn.id, at=utc_now()))
        await self._run(turn, script)

    def remember(self, entry: dict[str, Any], turn_id: str | None) -> None:
        """Write a line of the transcript."""
        line = json.dumps({"uuid": str(uuid.uuid4()), "sessionId": self._agent_session_id} | entry)
        self._lines().append(line)
        self.send(
            lambda n: TranscriptFrame(n=n, agent_session_id=self._agent_session_id, turn_id=turn_id, lines=[line])
        )

    def _lines(self) -> list[str]:
        return self.host.disks.setdefault(self.spec.home, {}).setdefault(self._agent_session_id, [])

    @property
    def turns_remembered(self) -> int:
        """How many prompts its conversation has."""
        return sum(json.loads(line).get("type") == "user" for line in self._lines())

    # ------------------------------------------------------------------------------------------------------- its life

    def kill(self) -> None:
        """End as `kill -9` does: at once, saying nothing, with whatever was not acknowledged lost."""
        self.alive = False
        if self._connection is not None:
            self._connection.cut()
            self._connection = None
        for task in self._tasks:
            task.cancel()

    async def _stay_linked(self) -> None:
        while self.alive:
            serve = await self.host.gateway_up()
            ours, theirs = pipe()
            serving = self.host.spawn(_serve(serve, theirs), f"fake link {self.spec.sandbox_id}")
            self.host.serving.add(serving)
            serving.add_done_callback(self.host.serving.discard)
            try:
                await self._talk(ours)
            finally:
                self._connection = None
                ours.cut()

    async def _talk(self, connection: _End) -> None:
        hello = Hello(
            sandbox_id=self.spec.sandbox_id,
            token=self.spec.link_token,
            generation=self.spec.generation,
            last_acked=self._acked,
            bound=self.bind is not None,
            last_turn=self._last_turn,
            running_turn=self.running.id if self.running else None,
            background_tasks=self._background,
            model=self.model,
            permission_mode=self.permission_mode,
        )
        self.connections += 1
        self._connection = connection
        self.send_now(hello)
        if self.running is not None and (blocks := self.running.open_blocks()):
            self.send_now(OpenBlocks(blocks=blocks))
        for _, data in self._outbox:
            connection.send_now(data)
        while (message := await connection.receive()) is not None:
            for line in message.split(b"\n"):
                self._obey(GATEWAY_FRAME.validate_json(line))

    def _obey(self, frame: GatewayFrame) -> None:
        match frame:
            case Ack():
                self._acked = max(self._acked, frame.n)
                self._outbox = [item for item in self._outbox if item[0] > frame.n]
                return
            case Refused():
                self.log.append(f"refused: {frame.reason}")
                self.kill()
                return
            case Transcript():
                self._transcript.put_nowait(frame)
                return
        if frame.id in self._seen:
            return
        self._seen.add(frame.id)
        self.log.append(frame.kind)
        match frame:
            case Bind():
                self.bind = frame
                self._tasks.append(self.host.spawn(self._work(frame), f"fake agent {self.spec.sandbox_id}"))
            case StartTurn():
                self._last_turn = frame.turn_id
                self._turns.put_nowait(frame)
            case Interrupt():
                if self.running is not None and self.running.id == frame.turn_id:
                    self.running.reason = frame.reason
                    self.running.interrupted.set()
            case SetModel():
                self.model = frame.model
            case SetPermissionMode():
                self.permission_mode = frame.mode
            case Shutdown():
                self.send(lambda n: Ended(n=n))
                self._tasks.append(self.host.spawn(self._leave(), f"fake end {self.spec.sandbox_id}"))

    async def _leave(self) -> None:
        while self._outbox and self._connection is not None:
            await asyncio.sleep(0.002)
        self.kill()

    async def _work(self, bind: Bind) -> None:
        self.model = bind.spec.model
        self.permission_mode = bind.permission_mode
        await self._take_up(bind)
        going_on = bind.resume_turn is not None and any(
            json.loads(line).get("uuid") == bind.resume_turn for line in self._lines()
        )
        if going_on and bind.resume_turn is not None:
            self._last_turn = bind.resume_turn
            prompt = next(e["text"] for e in map(json.loads, self._lines()) if e["uuid"] == bind.resume_turn)
            self.send(lambda n: AgentReady(n=n, resumed_turn=bind.resume_turn))
            await self._run(FakeTurn(self, bind.resume_turn, prompt, resumed=True))
        else:
            self.send(lambda n: AgentReady(n=n))
        while True:
            start = await self._turns.get()
            self.model = start.model or self.model
            prompt = "".join(block.get("text", "") for block in start.content)
            self.remember({"uuid": start.turn_id, "type": "user", "text": prompt}, start.turn_id)
            await self._run(FakeTurn(self, start.turn_id, prompt, resumed=False))

    async def _take_up(self, bind: Bind) -> None:
        """Find the conversation: on this disk, or else with the gateway."""
        if bind.agent_session_id is None:
            self._agent_session_id = str(uuid.uuid4())
            self.send(lambda n: AgentSession(n=n, agent_session_id=self._agent_session_id))
            return
        self._agent_session_id = bind.agent_session_id
        if self._lines():
            return
        self.send_now(WantTranscript())
        while True:
            part = await self._transcript.get()
            self._lines().extend(part.lines)
            if part.last:
                return

    async def _run(self, turn: FakeTurn, script: Script | None = None) -> None:
        self.running = turn
        await (script or self.host.script(turn.prompt))(turn)
        self.running = None
        reason, status, failure = StopReason.END_TURN, TurnStatus.SUCCEEDED, None
        if turn.reason is not None:
            reason, status = turn.reason, TurnStatus.INTERRUPTED
        if turn.reason is StopReason.TIMEOUT:
            error = TurnTimedOut()
            status, failure = TurnStatus.FAILED, Failure(code=error.code, message=error.message)
        self.send(
            lambda n: TurnEnded(
                n=n,
                turn_id=turn.id,
                at=utc_now(),
                status=status,
                stop_reason=reason,
                failure=failure,
                structured_output=turn.structured_output,
                num_turns=turn.num_turns,
            )
        )


async def _serve(serve: Serve, connection: _End) -> None:
    """Serve as a listener does: an error of the gateway's ends this one connection."""
    try:
        await serve(connection)
    except Exception as error:
        connection.failure = error  # type: ignore[attr-defined]
    finally:
        connection.cut()


class FakeHost:
    """The machine that fake sandboxes run on. It outlives gateways: `async with FakeHost() as host`."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        """What to do, by prompt; any other prompt is quoted with the number of its turn."""
        self.runners: dict[str, FakeRunner] = {}
        """Every runner there ever was, by its sandbox's id."""
        self.remains: set[str] = set()
        """The sandboxes that have something left here."""
        self.disks: dict[str, dict[str, list[str]]] = {}
        """The agents' homes: transcripts by the agent's session id."""
        self.serving: set[asyncio.Task[None]] = set()
        self.pids = itertools.count(1)
        self._serve: Serve | None = None
        self._up = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeHost:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for runner in self.runners.values():
            runner.kill()
        for task in self._tasks:
            task.cancel()
        answers = await asyncio.gather(*self._tasks, return_exceptions=True)
        broken = [a for a in answers if isinstance(a, Exception)]
        if broken and error is None:
            raise ExceptionGroup("fake runners broke", broken)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something on this host until it closes."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        return task

    def connect(self, serve: Serve) -> None:
        """A gateway is up: runners dial it."""
        self._serve = serve
        self._up.set()

    async def disconnect(self) -> None:
        """The gateway is gone, with every connection; runners go on and dial again."""
        self._serve = None
        self._up.clear()
        serving = list(self.serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def gateway_up(self) -> Serve:
        """Wait for a gateway."""
        while self._serve is None:
            await self._up.wait()
        return self._serve

    def cut_links(self) -> None:
        """Cut every connection; the gateway stays up."""
        for runner in self.runners.values():
            if runner._connection is not None:
                runner._connection.cut()

    def script(self, prompt: str) -> Script:
        """What the agent does when it is told this: by the whole prompt, else by its first word."""
        return self.scripts.get(prompt) or self.scripts.get(prompt.partition(" ")[0], _echo)

    @property
    def alive(self) -> list[FakeRunner]:
        """The runners that run now."""
        return [runner for runner in self.runners.values() if runner.alive]


class FakeRuntime(abc.Runtime):
    """Makes sandboxes on a `FakeHost`."""

    name = "fake"
    isolated = True

    def __init__(self, host: FakeHost) -> None:
        """Make sandboxes on this host."""
        self._host = host

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Make ready: there is nothing to do."""

    async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
        """Start a sandbox."""
        state: dict[str, Any] = {"sandbox_id": spec.sandbox_id, "folder": f"fake/{spec.sandbox_id}"}
        yield dict(state)
        self._host.remains.add(spec.sandbox_id)
        self._host.runners[spec.sandbox_id] = FakeRunner(self._host, spec)
        yield state | {"pid": next(self._host.pids)}

    async def terminate(self, state: Mapping[str, Any]) -> None:
        """End the sandbox."""
        runner = self._host.runners.get(str(state["sandbox_id"]))
        if runner is not None:
            runner.kill()
            runner.log.clear()
        self._host.remains.discard(str(state["sandbox_id"]))

    async def probe(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, bool]:
        """Whether each runner is alive."""
        return {i: i in self._host.runners and self._host.runners[i].alive for i in states}

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        """What each runner says that it takes."""
        runners = {i: self._host.runners[i] for i in states if i in self._host.runners}
        return {i: runner.usage for i, runner in runners.items() if runner.alive}

    async def owned(self) -> Mapping[str, dict[str, Any]]:
        """Every sandbox with something left."""
        return {sandbox_id: {"sandbox_id": sandbox_id} for sandbox_id in self._host.remains}

    async def logs(self, state: Mapping[str, Any]) -> AsyncIterator[str]:
        """What the runner was told."""
        runner = self._host.runners.get(str(state["sandbox_id"]))
        for line in list(runner.log) if runner is not None else ():
            yield line
