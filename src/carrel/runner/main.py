"""One runner: from its bootstrap to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

from carrel.errors import AgentStartFailed, CarrelError, DiskFull, SandboxLost, SandboxOutOfProcesses, SpoolFull
from carrel.model import Failure
from carrel.protocol.bootstrap import Bootstrap
from carrel.protocol.link import (
    AgentFailed,
    Answer,
    Bind,
    Ended,
    GatewayFrame,
    Interrupt,
    NumberedFrame,
    OpenBlock,
    SetModel,
    SetPermissionMode,
    SetPermissionRules,
    Shutdown,
    StartTurn,
    Transcript,
    TranscriptFrame,
    WantTranscript,
)
from carrel.runner.agent import Agent
from carrel.runner.link import Link, LinkLost
from carrel.runner.own_caps import processes_met

log = structlog.get_logger(__name__)

_TRANSCRIPT_LINES = 500


class Runner:
    """Owns an agent and the link to the gateway, and ends when either is over."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap
        self._agent = Agent(bootstrap, send=self._send, send_delta=self._send_delta, stored=lambda: self._link.stored())
        self._link = Link(bootstrap, hello=self._hello, open_blocks=self._open_blocks, receive=self._receive)
        self._bind: Bind | None = None
        self._model: str | None = None
        self._permission_mode: str | None = None
        self._seen: set[str] = set()
        self._commands: asyncio.Queue[GatewayFrame] = asyncio.Queue()
        self._transcript: asyncio.Queue[Transcript] = asyncio.Queue()
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Run until told to end, until the agent ends, or until the gateway is away for too long."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._over.set)
        tasks = [
            asyncio.create_task(self._stay_linked(), name="link"),
            asyncio.create_task(self._obey(), name="commands"),
        ]
        try:
            await self._over.wait()
        finally:
            await self._agent.close()
            self._link.send(lambda n: Ended(n=n), last_words=True)
            # The gateway may be away at this moment: what is owed to it is worth as long a wait as it is itself.
            await self._link.drain(0 if tasks[0].done() else self._bootstrap.reconnect_window_seconds, tasks[0])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._link.close()

    # ---------------------------------------------------------------------------------------------------- the gateway

    def _hello(self) -> dict[str, Any]:
        return {
            "bound": self._bind is not None,
            "last_turn": self._agent.last_turn,
            "running_turn": self._agent.running_turn,
            "background_tasks": self._agent.background_tasks,
            "model": self._model,
            "permission_mode": self._permission_mode,
            "pending_asks": self._agent.asked,
        }

    def _open_blocks(self) -> list[OpenBlock]:
        return self._agent.open_blocks()

    def _send(self, make: Any) -> None:
        try:
            self._link.send(make)
        except (SpoolFull, DiskFull) as error:
            self._give_up(error)
            raise

    def _send_delta(self, data: bytes) -> None:
        self._link.send_delta(data)

    async def _stay_linked(self) -> None:
        try:
            await self._link.run()
        except LinkLost as error:
            log.warning("runner.unlinked", reason=str(error))
        finally:
            self._over.set()

    async def _receive(self, frame: GatewayFrame) -> None:
        if isinstance(frame, Transcript):
            await self._transcript.put(frame)
            return
        command_id = getattr(frame, "id", "")
        if command_id in self._seen:
            return
        self._seen.add(command_id)
        await self._commands.put(frame)

    async def _obey(self) -> None:
        reader: asyncio.Task[None] | None = None
        try:
            while True:
                command = await self._commands.get()
                if isinstance(command, Bind):
                    if self._bind is None and await self._start(command):
                        reader = asyncio.create_task(self._read(), name="agent")
                elif isinstance(command, Shutdown):
                    self._over.set()
                else:
                    await self._pass_on(command)
        except Exception as error:
            self._give_up(SandboxLost(operator_detail=repr(error)))
        finally:
            if reader is not None:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _pass_on(self, command: GatewayFrame) -> None:
        match command:
            case StartTurn():
                structlog.contextvars.bind_contextvars(turn_id=command.turn_id)
                await self._agent.start(command)
            case Answer():
                self._agent.answer(command)
            case Interrupt():
                await self._agent.interrupt(command)
            case SetModel():
                self._model = command.model
                await self._agent.set_model(command.model)
            case SetPermissionMode():
                self._permission_mode = command.mode
                await self._agent.set_permission_mode(command.mode)
            case SetPermissionRules():
                self._agent.set_permission_rules(command.rules)

    # ------------------------------------------------------------------------------------------------------ the agent

    async def _start(self, bind: Bind) -> bool:
        self._bind, self._model, self._permission_mode = bind, bind.spec.model, bind.permission_mode
        structlog.contextvars.bind_contextvars(session_id=bind.session_id)
        try:
            if bind.agent_session_id is not None:
                await self._prepare_transcript(bind, bind.agent_session_id)
            await self._agent.connect(bind)
        except AgentStartFailed as error:
            self._give_up(error)
            return False
        return True

    async def _prepare_transcript(self, bind: Bind, agent_session_id: str) -> None:
        files = self._agent.transcripts
        if files.exists(agent_session_id):
            if bind.reconcile:
                self._send_transcript(agent_session_id)
            return
        self._link.send_now(WantTranscript())
        begun: set[str] = set()
        while True:
            part = await self._transcript.get()
            if part.lines:
                files.write(agent_session_id, part.subpath, part.lines, first=part.subpath not in begun)
                begun.add(part.subpath)
            if part.last:
                return

    def _send_transcript(self, agent_session_id: str) -> None:
        for subpath, lines in self._agent.transcripts.found(agent_session_id):
            known_again = [line for line in lines if '"uuid"' in line]
            for start in range(0, len(known_again), _TRANSCRIPT_LINES):
                self._send(_transcript(agent_session_id, subpath, known_again[start : start + _TRANSCRIPT_LINES]))

    async def _read(self) -> None:
        try:
            await self._agent.read()
        except CarrelError as error:
            self._give_up(error)
        except Exception as error:
            log.exception("runner.broken")
            self._give_up(SandboxLost(operator_detail=repr(error)))

    def _give_up(self, error: CarrelError) -> None:
        """Say, once, why it cannot go on, and end."""
        if self._over.is_set():
            return
        if isinstance(error, SandboxLost) and self._bootstrap.own_caps and processes_met():
            error = SandboxOutOfProcesses(operator_detail=error.operator_detail)
        log.warning("agent.failed", code=error.code, detail=error.operator_detail)
        failure = Failure(code=error.code, message=error.message)
        detail = (error.operator_detail or "")[:20_000]
        self._link.send(lambda n: AgentFailed(n=n, failure=failure, operator_detail=detail), last_words=True)
        self._over.set()


def _transcript(agent_session_id: str, subpath: str, lines: list[str]) -> Any:
    def make(n: int) -> NumberedFrame:
        return TranscriptFrame(n=n, agent_session_id=agent_session_id, subpath=subpath, lines=lines)

    return make


def end_descendants(keep: Iterable[int] = ()) -> None:
    """End every process that descends from this one (which must be a subreaper), however deep."""
    kept = {os.getpid(), *keep}
    for _ in range(200):
        children = [pid for pid in _children(os.getpid()) if pid not in kept]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def run(bootstrap: Bootstrap) -> None:
    """Run one runner to its end. Called in a process of its own, with a clean environment."""
    structlog.contextvars.bind_contextvars(sandbox_id=bootstrap.sandbox_id)
    log.info("runner.started", generation=bootstrap.generation)
    try:
        asyncio.run(Runner(bootstrap).run())
    finally:
        if bootstrap.subreaper:
            end_descendants()
    log.info("runner.ended")
