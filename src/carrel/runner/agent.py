"""The agent: the one file that knows the Claude Agent SDK.

Owns one `ClaudeSDKClient`, hands it prompts one at a time, and turns what it says into events, deltas and transcript
lines. Claims about the SDK and the CLI were tried against SDK 0.2.186 and CLI 2.1.329.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claude_agent_sdk as sdk
import structlog
from claude_agent_sdk.types import TERMINAL_TASK_STATUSES
from pydantic_core import to_json

from carrel.errors import AgentFailed, AgentStartFailed, DiskFull, SandboxLost, TurnTimedOut
from carrel.model import Failure, InteractionKind, PermissionMode, StopReason, TurnStatus, new_id, utc_now
from carrel.protocol import events
from carrel.protocol.bootstrap import Bootstrap
from carrel.protocol.link import (
    Activity,
    AgentReady,
    AgentSession,
    Answer,
    Bind,
    Deferred,
    EventFrame,
    Interrupt,
    NumberedFrame,
    OpenBlock,
    StartTurn,
    TranscriptFrame,
    TurnBegun,
    TurnEnded,
)
from carrel.protocol.permissions import Decision, PermissionRules, Place, Verdict, decide
from carrel.runner.asking import Asking, Call, Way
from carrel.runner.blocks import Blocks, whole, whole_text
from carrel.runner.disk import Disk
from carrel.runner.relay import Relay
from carrel.runner.tools import NAME as TOOLS
from carrel.runner.tools import SessionTools
from carrel.runner.transcripts import Transcripts, calls_in

log = structlog.get_logger(__name__)

_INTERRUPT_GRACE_SECONDS = 10.0
_QUIET_NOTICES = frozenset(
    {"init", "status", "hook_started", "hook_progress", "hook_response", "session_state_changed"}
)
_NOBODY_TO_ASK = (
    "This session has nobody who can be asked for permission, so the call was denied. "
    "Go on without it, or say what you would have needed."
)

_ASKED_ABOUT = {"AskUserQuestion": InteractionKind.QUESTION, "ExitPlanMode": InteractionKind.PLAN}
_HOOK_SECONDS = 10 * 365 * 86_400.0
_WRITTEN_SECONDS = 2.0
"""How long Claude Code waits for our hook: for longer than we hold a call."""
_WHOLE_MESSAGE_SECONDS = 2.0
_PUT_OFF_SECONDS = 5.0

Send = Callable[[Callable[[int], NumberedFrame]], None]


@dataclass
class _Running:
    """The turn at work."""

    turn_id: str
    from_prompt: bool
    max_turns: int | None = None
    num_turns: int = 0
    interrupted: StopReason | None = None
    resumed: bool = False
    told_of_full_disk: bool = False


class _Said:
    """The calls of the main agent's newest message, and whether it has been said to its end."""

    def __init__(self) -> None:
        self._message: str | None = None
        self._calls: list[str] = []
        self._changed = asyncio.Event()
        self._over = True

    def hear(self, event: dict[str, Any]) -> None:
        """A piece of a message: its beginning and its end are of interest."""
        if event.get("type") == "message_start":
            self._over = False
        elif event.get("type") == "message_stop":
            self._over = True
            self._changed.set()

    def call(self, message_id: str | None, tool_use_id: str) -> None:
        """A call that is part of a message."""
        if message_id != self._message:
            self._message, self._calls = message_id, []
        self._calls.append(tool_use_id)
        self._changed.set()

    async def alone(self, tool_use_id: str | None) -> bool:
        """Whether this is the one call of its message. Waits for the end of the message, which may come later."""
        deadline = asyncio.get_running_loop().time() + _WHOLE_MESSAGE_SECONDS
        while not (self._over and tool_use_id in self._calls):
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        return self._calls == [tool_use_id]


class Agent:
    """One Claude Code conversation."""

    def __init__(
        self,
        bootstrap: Bootstrap,
        *,
        send: Send,
        send_delta: Callable[[bytes], None],
        stored: Callable[[], Awaitable[None]],
    ) -> None:
        """Make the agent; nothing is started before `connect`.

        Args:
            bootstrap: how it is started.
            send: queues a numbered frame for the gateway.
            send_delta: sends a delta's frame, or drops it.
            stored: waits until the gateway has stored what was queued so far.
        """
        self._bootstrap = bootstrap
        self._send = send
        self._send_delta = send_delta
        self._client: sdk.ClaudeSDKClient | None = None
        self._blocks = Blocks()
        self._running: _Running | None = None
        self._waiting: deque[StartTurn] = deque()
        self._last_turn: str | None = None
        self._last_known: events.AgentInitialised | None = None
        self._agent_session_id: str | None = None
        self._tasks: set[str] = set()
        self._tools: dict[str, str] = {}
        self._stderr: deque[str] = deque(maxlen=50)
        self._closing = False
        self._interrupting: asyncio.Task[None] | None = None
        self._asking = Asking(send=send, stored=stored, at_work=lambda: bool(self._tasks))
        self._written_calls: deque[str] = deque(maxlen=100)
        self._lines_came = asyncio.Event()
        self._connected = asyncio.Event()
        self._gave_way = asyncio.Event()
        self._approves_plan = False
        self._said = _Said()
        self._mode = PermissionMode.DEFAULT
        self._rules = PermissionRules()
        self._place = Place(workspace=bootstrap.cwd, home=str(Path(bootstrap.config_dir).parent), cwd=bootstrap.cwd)
        self._disk = Disk((bootstrap.workspace, bootstrap.home), reserve_bytes=bootstrap.disk_reserve_bytes)
        self._transcripts = Transcripts(Path(bootstrap.home), bootstrap.cwd, bootstrap.owner)
        roads = {"egress": bootstrap.egress, "mcp": bootstrap.mcp}
        self._relay = Relay(bootstrap.agent_token, **roads) if any(roads.values()) else None

    # ------------------------------------------------------------------------------------------------ what it knows

    @property
    def last_turn(self) -> str | None:
        """The last turn that was handed to it."""
        return self._last_turn

    @property
    def running_turn(self) -> str | None:
        """The turn at work."""
        return self._running.turn_id if self._running else None

    @property
    def background_tasks(self) -> int:
        """How many of its background shells and agents are at work."""
        return len(self._tasks)

    @property
    def transcripts(self) -> Transcripts:
        """Its transcript files."""
        return self._transcripts

    def open_blocks(self) -> list[OpenBlock]:
        """The text so far of every block that is being made."""
        return self._blocks.open_blocks(self.running_turn)

    # ------------------------------------------------------------------------------------------------------- its life

    async def connect(self, bind: Bind) -> None:
        """Start the agent on the session's conversation.

        Raises:
            AgentStartFailed: it did not start; the operator's detail has what it wrote.
        """
        self._agent_session_id = bind.agent_session_id
        self._mode, self._rules = PermissionMode(bind.permission_mode), bind.spec.permission_rules()
        if self._has_tools(bind):
            # They do nothing that the session may not do anyhow; rules that forbid or ask come first.
            allowed = (*self._rules.allow, f"mcp__{TOOLS}")
            self._rules = PermissionRules.model_construct(allow=allowed, ask=self._rules.ask, deny=self._rules.deny)
        self._asking.bind(bind)
        taken_up = self._takes_up(bind)
        go_on = taken_up or (
            bool(bind.resume_turn and bind.agent_session_id)
            and self._transcripts.holds(bind.agent_session_id or "", bind.resume_turn or "")
            # It would do nothing, and nobody would be told.
            and not (bind.asked and self._transcripts.over(bind.agent_session_id or ""))
        )
        if go_on and bind.resume_turn:
            self._running = _Running(bind.resume_turn, from_prompt=True, resumed=True)
            self._last_turn = bind.resume_turn
        with warnings.catch_warnings():
            # Our callback only ever says no, so it does not matter what the mode lets through before it.
            warnings.simplefilter("ignore", sdk.CanUseToolShadowedWarning)
            try:
                opening = self._relay.open() if self._relay is not None else None
                self._client = sdk.ClaudeSDKClient(self._options(bind, again=go_on and not taken_up))
                await self._client.connect()
                if opening is not None:
                    await opening
            except Exception as error:
                detail = "\n".join([repr(error), *self._stderr])
                raise AgentStartFailed(operator_detail=detail) from error
        self._send(lambda n: AgentReady(n=n, resumed_turn=bind.resume_turn if go_on else None))
        self._connected.set()

    def _has_tools(self, bind: Bind) -> bool:
        return bind.tools and self._bootstrap.gateway_socket is not None

    def _plugins(self, bind: Bind) -> list[str]:
        skills = self._bootstrap.skills if self._has_tools(bind) else None
        return [*self._bootstrap.plugins, *([skills] if skills is not None else [])]

    def _own_servers(self, bind: Bind) -> dict[str, Any]:
        """The gateway's tools, which this process answers for."""
        boot = self._bootstrap
        if not self._has_tools(bind) or boot.gateway_socket is None:
            return {}
        tools = SessionTools(boot.gateway_socket, boot.agent_token, patience_seconds=boot.reconnect_window_seconds)
        return {TOOLS: {"type": "sdk", "name": TOOLS, "instance": tools.server()}}

    def _takes_up(self, bind: Bind) -> bool:
        """Whether the agent will go on with a call that has been answered since; if not, it is to take none up."""
        if bind.agent_session_id is None:
            return False
        call, tool = self._transcripts.held_call(bind.agent_session_id) or (None, None)
        if bind.resume_turn is None or call is None or not self._asking.resumes(call):
            self._transcripts.take_back(bind.agent_session_id)
            return False
        self._approves_plan = tool == "ExitPlanMode"
        line = self._transcripts.put_off(bind.agent_session_id, call)
        if line is not None:
            self._send(
                lambda n: TranscriptFrame(n=n, agent_session_id=str(bind.agent_session_id), subpath="", lines=[line])
            )
        return True

    def _options(self, bind: Bind, *, again: bool) -> sdk.ClaudeAgentOptions:
        spec, boot = bind.spec, self._bootstrap
        env = dict(boot.agent_env)
        env |= {
            "CLAUDE_CONFIG_DIR": boot.config_dir,
            "CLAUDE_CODE_MAX_RETRIES": str(boot.max_retries),
        }
        if not boot.direct:
            env["ANTHROPIC_API_KEY"] = boot.agent_token
        if self._relay is not None:
            env |= self._relay.variables
            spec = spec.model_copy(update={"mcp_servers": self._relay.servers(spec.mcp_servers or {})})
        if boot.late_env_path is None:
            env |= spec.env_vars or {}
        else:
            late = [part for item in (spec.env_vars or {}).items() for part in ("--setenv", *item)]
            with open(boot.late_env_path, "ab") as file:
                file.write(b"".join(part.encode() + b"\0" for part in late))
        # The SDK itself would pass on a span of this process, and there is none: the spans are the gateway's.
        env |= {name.upper(): value for name, value in bind.trace.items()}
        if again:
            env["CLAUDE_CODE_RESUME_INTERRUPTED_TURN"] = "1"
        system_prompt: Any = {"type": "preset", "preset": "claude_code"}
        if spec.system_prompt is not None:
            system_prompt = spec.system_prompt
        elif spec.append_system_prompt is not None:
            system_prompt["append"] = spec.append_system_prompt
        options: dict[str, Any] = {
            "tools": spec.tools,
            "model": spec.model,
            "fallback_model": spec.fallback_model,
            "skills": spec.skills,
            "setting_sources": spec.setting_sources,
            "max_turns": spec.max_turns,
            "effort": spec.effort,
            "thinking": spec.thinking,
            "output_format": spec.output_format,
            "resume": bind.agent_session_id,
        }
        return sdk.ClaudeAgentOptions(
            cli_path=boot.cli_path,
            cwd=None,
            env=env,
            system_prompt=system_prompt,
            # A plan can be left in the mode plan alone, whatever the answer has made the session's mode meanwhile.
            permission_mode=PermissionMode.PLAN if self._approves_plan else bind.permission_mode,  # type: ignore[arg-type]
            allowed_tools=spec.allowed_tools or [],
            disallowed_tools=spec.disallowed_tools or [],
            mcp_servers={**(spec.mcp_servers or {}), **self._own_servers(bind)},  # type: ignore[dict-item]
            plugins=[{"type": "local", "path": path} for path in self._plugins(bind)],
            agents={name: sdk.AgentDefinition(**agent) for name, agent in (spec.agents or {}).items()} or None,
            include_partial_messages=True,
            session_store=_Mirror(self._mirror),  # type: ignore[arg-type]
            session_store_flush="eager",
            max_buffer_size=boot.max_frame_bytes,
            can_use_tool=_deny,
            hooks={
                "PreToolUse": [sdk.HookMatcher(hooks=[self._before_tool], timeout=_HOOK_SECONDS, on_failure="block")]
            },
            # Without this it may take a call up again before it has heard of our hook, and decide by itself.
            extra_args={"await-initialize": None},
            stderr=self._take_stderr,
            **{name: value for name, value in options.items() if value is not None},
        )

    async def close(self) -> None:
        """End the agent. What it still had to say has been sent when this returns."""
        if self._asking.put_off():
            # Else it would write down that the call was refused.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PUT_OFF_SECONDS):
                    await self._gave_way.wait()
        self._closing = True
        if self._interrupting is not None:
            self._interrupting.cancel()
        if self._client is not None:
            with contextlib.suppress(Exception):
                await self._client.disconnect()
        if self._relay is not None:
            await self._relay.close()

    async def start(self, command: StartTurn) -> None:
        """Hand the agent a prompt; at once, or when the run it has begun by itself is over."""
        if self._last_turn == command.turn_id:
            return
        self._last_turn = command.turn_id
        if self._running is not None:
            self._waiting.append(command)
            return
        await self._give(command)

    async def _give(self, command: StartTurn) -> None:
        assert self._client is not None
        self._running = _Running(command.turn_id, from_prompt=True, max_turns=command.max_turns)
        if command.model is not None:
            await self._client.set_model(command.model)
        await self._client.query(_prompt(command))

    async def interrupt(self, command: Interrupt) -> None:
        """End the turn at work; where the agent does not listen, it is ended with the turn."""
        for waiting in list(self._waiting):
            if waiting.turn_id == command.turn_id:
                self._waiting.remove(waiting)
                given = _Running(waiting.turn_id, from_prompt=True, interrupted=command.reason)
                self._end(given, *_ending_of(given))
                return
        running = self._running
        if running is None or running.turn_id != command.turn_id or running.interrupted is not None:
            return
        self._interrupt(command.reason)

    def _interrupt(self, reason: StopReason) -> None:
        assert self._running is not None
        self._running.interrupted = reason
        self._asking.withdraw("The turn is being ended.")
        self._interrupting = asyncio.create_task(self._make_it_stop(self._running), name="agent-interrupt")

    async def _make_it_stop(self, running: _Running) -> None:
        assert self._client is not None
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_INTERRUPT_GRACE_SECONDS):
                await self._client.interrupt()
        await asyncio.sleep(_INTERRUPT_GRACE_SECONDS)
        if self._running is running:
            log.warning("agent.deaf", turn=running.turn_id)
            self._end(running, *_ending_of(running))
            await self._client.disconnect()

    async def _before_tool(self, given: Any, tool_use_id: str | None, context: Any) -> sdk.HookJSONOutput:
        """Asked before every call of a tool, before Claude Code's own rules: what is decided here is decided.

        Once a turn is to end, none begins: an interrupt takes its time.
        """
        await self._connected.wait()
        if self._running is not None and self._running.interrupted is not None:
            return _decided("deny", "The turn is being ended.")
        call = self._call(given, tool_use_id)
        if self._asking.answered(call):
            return await self._ask(given, call, "")
        verdict = self._verdict(given, given["tool_input"])
        if verdict is None or (verdict.decision is Decision.ALLOW and self._mode is PermissionMode.BYPASS):
            return {}
        if verdict.decision is Decision.ASK:
            return await self._ask(given, call, _why(verdict))
        return _decided(verdict.decision.value, _why(verdict))

    def _verdict(self, given: Any, tool_input: dict[str, Any]) -> Verdict | None:
        return decide(
            # An agent may narrow its own mode, by planning first.
            PermissionMode.PLAN if given.get("permission_mode") == PermissionMode.PLAN else self._mode,
            self._rules,
            given["tool_name"],
            tool_input,
            place=dataclasses.replace(self._place, cwd=given.get("cwd") or self._place.cwd),
        )

    def _call(self, given: Any, tool_use_id: str | None) -> Call:
        return Call(
            tool=given["tool_name"],
            tool_use_id=tool_use_id,
            input=whole(given["tool_input"]),
            about=_ASKED_ABOUT.get(given["tool_name"], InteractionKind.PERMISSION),
            turn_id=self.running_turn,
        )

    async def _ask(self, given: Any, call: Call, why: str) -> sdk.HookJSONOutput:
        """Have a person decide, for however long that takes."""
        if self._asking.nobody:
            return _decided("deny", f"{_NOBODY_TO_ASK} ({why})")
        lone = given.get("agent_id") is None and await self._said.alone(call.tool_use_id)
        if lone:
            await self._written(call.tool_use_id)
        ruling = await self._asking.ask(call, why, lone=lone)
        if ruling.way is not Way.ALLOW:
            return _decided(ruling.way.value, ruling.message)
        if self._running is not None and self._running.interrupted is not None:
            return _decided("deny", "The turn is being ended.")
        changed = self._verdict(given, ruling.input) if ruling.input is not None else None
        if changed is not None and changed.rule is not None and changed.decision is Decision.DENY:
            # Whoever may answer may not for that do what the rules forbid.
            return _decided("deny", _why(changed))
        if ruling.permission_mode is not None:
            self._mode = ruling.permission_mode
        shown = ruling.input
        if shown is None and call.about is InteractionKind.PLAN:
            shown = call.input  # without one Claude Code would ask for this tool once more, where nobody is
        return _decided("allow", "A person has allowed this call.", updated_input=shown)

    async def _written(self, tool_use_id: str | None) -> None:
        """Wait until the call is in the conversation as it is kept: what was asked can then be taken up, whatever dies."""
        with contextlib.suppress(TimeoutError):  # if all dies just then, the agent makes the call anew
            async with asyncio.timeout(_WRITTEN_SECONDS):
                while tool_use_id not in self._written_calls:
                    self._lines_came.clear()
                    await self._lines_came.wait()

    @property
    def asked(self) -> list[str]:
        """The ids of what it waits for people to answer."""
        return self._asking.waiting

    def answer(self, command: Answer) -> None:
        """Let the call that waits for this go on."""
        self._asking.take(command)

    async def set_model(self, model: str | None) -> None:
        """Use another model from here on."""
        if self._client is not None:
            await self._client.set_model(model)

    async def set_permission_mode(self, mode: str) -> None:
        """Use another permission mode from here on."""
        self._mode = PermissionMode(mode)
        if self._client is not None:
            await self._client.set_permission_mode(mode)  # type: ignore[arg-type]

    def set_permission_rules(self, rules: PermissionRules) -> None:
        """Go by these rules from here on."""
        self._rules = rules

    # ------------------------------------------------------------------------------------------------- what it says

    async def read(self) -> None:
        """Read what the agent says until it ends.

        Raises:
            SandboxLost: it ended by itself.
        """
        assert self._client is not None
        try:
            async for message in self._client.receive_messages():
                await self._take(message)
        except Exception as error:
            if self._closing:
                return
            detail = "\n".join([repr(error), *self._stderr])
            raise SandboxLost(operator_detail=detail) from error
        if not self._closing:
            raise SandboxLost(operator_detail="\n".join(["the agent ended", *self._stderr]))

    async def _take(self, message: Any) -> None:
        match message:
            case sdk.StreamEvent():
                self._begin_if_quiet()
                self._take_piece(message)
            case sdk.AssistantMessage():
                self._begin_if_quiet()
                self._take_assistant(message)
            case sdk.UserMessage():
                self._take_user(message)
            case sdk.ResultMessage():
                await self._take_result(message)
            case sdk.SystemMessage():
                self._take_system(message)

    def _begin_if_quiet(self) -> None:
        """Words without a prompt: the agent has begun a run by itself."""
        if self._running is None:
            turn_id = new_id()
            self._running = _Running(turn_id, from_prompt=False)
            self._send(lambda n: TurnBegun(n=n, turn_id=turn_id, at=utc_now()))

    def _take_piece(self, message: sdk.StreamEvent) -> None:
        if message.parent_tool_use_id is None:
            self._said.hear(message.event)
        frame = self._blocks.piece(message.event, message.parent_tool_use_id, self.running_turn)
        if frame is not None:
            self._send_delta(to_json(frame))
        elif message.event.get("type") == "message_start" and message.parent_tool_use_id is None:
            self._count_request()

    def _count_request(self) -> None:
        running = self._running
        if running is None:
            return
        running.num_turns += 1
        if running.max_turns is not None and running.num_turns > running.max_turns and running.interrupted is None:
            self._interrupt(StopReason.MAX_TURNS)

    def _take_assistant(self, message: sdk.AssistantMessage) -> None:
        parent = message.parent_tool_use_id
        if message.error is not None:
            text = "".join(block.text for block in message.content if isinstance(block, sdk.TextBlock))
            self._event(events.ErrorReported(code=message.error, message=whole_text(text)))
            return
        for block in message.content:
            index = self._blocks.finish(message.message_id, parent)
            where: dict[str, Any] = {
                "message_id": message.message_id or "",
                "block": index,
                "parent_tool_use_id": parent,
            }
            match block:
                case sdk.TextBlock():
                    self._event(events.MessageAssistant(text=whole_text(block.text), model=message.model, **where))
                case sdk.ThinkingBlock():
                    self._event(events.Thinking(text=whole_text(block.thinking), **where))
                case sdk.ToolUseBlock() | sdk.ServerToolUseBlock():
                    self._tools[block.id] = block.name
                    if parent is None:
                        self._said.call(message.message_id, block.id)
                    self._event(events.ToolCalled(id=block.id, tool=block.name, input=whole(block.input), **where))
                case sdk.ServerToolResultBlock():
                    self._finished(block.tool_use_id, block.content, is_error=False, parent=parent)

    def _take_user(self, message: sdk.UserMessage) -> None:
        parent = message.parent_tool_use_id
        if isinstance(message.content, str):
            self._told([{"type": "text", "text": message.content}], parent, message)
            return
        for block in message.content:
            if isinstance(block, sdk.ToolResultBlock):
                self._finished(block.tool_use_id, block.content, is_error=bool(block.is_error), parent=parent)
            elif isinstance(block, sdk.TextBlock):
                self._told([{"type": "text", "text": block.text}], parent, message)

    def _told(self, content: list[dict[str, Any]], parent: str | None, message: sdk.UserMessage) -> None:
        if message.uuid is not None and message.uuid == self.running_turn:
            return
        self._event(events.MessageUser(content=whole(content), parent_tool_use_id=parent))

    def _finished(self, tool_use_id: str, content: Any, *, is_error: bool, parent: str | None) -> None:
        if self._running is not None and self._disk.blamed(content):
            self._running.told_of_full_disk = True
        self._event(
            events.ToolFinished(
                id=tool_use_id,
                tool=self._tools.pop(tool_use_id, None),
                result=whole(content),
                is_error=is_error,
                parent_tool_use_id=parent,
            )
        )

    def _take_system(self, message: sdk.SystemMessage) -> None:
        if message.subtype == "init":
            # Said at the start of every run, also of one that the agent begins by itself.
            self._begin_if_quiet()
            self._take_init(message.data)
        self._take_task(message)
        if message.subtype == "api_retry":
            for frame in self._blocks.reset(self.running_turn):
                self._send_delta(to_json(frame))
        if message.subtype in _QUIET_NOTICES:
            return
        data = {k: v for k, v in message.data.items() if k not in ("type", "subtype", "uuid", "session_id")}
        self._event(events.MessageSystem(subtype=message.subtype, data=whole(data)))

    def _take_init(self, data: dict[str, Any]) -> None:
        session_id = data.get("session_id")
        if isinstance(session_id, str) and session_id != self._agent_session_id:
            self._agent_session_id = session_id
            self._send(lambda n: AgentSession(n=n, agent_session_id=session_id))
        known = events.AgentInitialised(
            model=data.get("model"),
            tools=list(data.get("tools") or []),
            mcp_servers=[
                {"name": server.get("name"), "status": server.get("status")} for server in data.get("mcp_servers") or []
            ],
            permission_mode=data.get("permissionMode"),
            skills=list(data.get("skills") or []),
            agent_version=data.get("claude_code_version"),
        )
        if known != self._last_known:
            self._last_known = known
            self._event(known)
            for error in data.get("plugin_errors") or []:
                told = f"{error.get('plugin')}: {error.get('message')}"
                self._event(events.ErrorReported(code="plugin_failed", message=whole_text(told)))

    def _take_task(self, message: sdk.SystemMessage) -> None:
        before = len(self._tasks)
        match message:
            case sdk.TaskStartedMessage():
                self._tasks.add(message.task_id)
            case sdk.TaskNotificationMessage():
                self._tasks.discard(message.task_id)
            case sdk.TaskUpdatedMessage() if message.status in TERMINAL_TASK_STATUSES:
                self._tasks.discard(message.task_id)
        if len(self._tasks) != before:
            self._send(lambda n: Activity(n=n, background_tasks=len(self._tasks)))

    async def _take_result(self, message: sdk.ResultMessage) -> None:
        running = self._running
        if running is None or not _answers(message, running):
            return
        if self._interrupting is not None:
            self._interrupting.cancel()
            self._interrupting = None
        put_off = message.stop_reason == "tool_deferred"
        if put_off and running.interrupted is None:
            # The turn stays at work, for an agent that comes later; this one has nothing more to do.
            self._put_off(running.turn_id)
            return
        status, reason, failure = _ending(message, running)
        if status is TurnStatus.FAILED and failure is not None and self._disk.blamed(failure.message):
            running.told_of_full_disk = True
        if status is not TurnStatus.INTERRUPTED and running.told_of_full_disk and self._disk.full:
            # Where the agent has made room by itself, it has mended what had gone wrong.
            error = DiskFull()
            status, reason, failure = (
                TurnStatus.FAILED,
                StopReason.ERROR,
                Failure(code=error.code, message=error.message),
            )
        running.num_turns = max(running.num_turns, message.num_turns) if running.resumed else running.num_turns
        self._end(running, status, reason, failure, whole(message.structured_output))
        if put_off:
            self._put_off(running.turn_id)
        elif self._waiting:
            await self._give(self._waiting.popleft())

    def _put_off(self, turn_id: str) -> None:
        asked = self._asking.deferred
        self._gave_way.set()
        self._send(lambda n: Deferred(n=n, turn_id=turn_id, interaction_id=asked))

    def _end(
        self,
        running: _Running,
        status: TurnStatus,
        reason: StopReason,
        failure: Failure | None = None,
        structured_output: Any = None,
    ) -> None:
        if self._running is running:
            self._running = None
            for frame in self._blocks.reset(running.turn_id) if status is not TurnStatus.SUCCEEDED else ():
                self._send_delta(to_json(frame))
            self._blocks.clear()
        self._send(
            lambda n: TurnEnded(
                n=n,
                turn_id=running.turn_id,
                at=utc_now(),
                status=status,
                stop_reason=reason,
                failure=failure,
                structured_output=structured_output,
                num_turns=running.num_turns,
            )
        )

    def _event(self, data: events.EventData) -> None:
        event = events.NewEvent.of(data, at=utc_now(), turn_id=self.running_turn)
        self._send(lambda n: EventFrame(n=n, event=event))

    def _mirror(self, key: dict[str, Any], entries: list[Any]) -> None:
        lines = [json.dumps(entry, separators=(",", ":")) for entry in entries]
        self._written_calls.extend(call for entry in entries for call in calls_in(entry))
        self._lines_came.set()
        turn_id = self.running_turn or self._last_turn
        self._send(
            lambda n: TranscriptFrame(
                n=n,
                agent_session_id=str(key["session_id"]),
                subpath=str(key.get("subpath") or ""),
                turn_id=turn_id,
                lines=lines,
            )
        )

    def _take_stderr(self, line: str) -> None:
        self._stderr.append(line[:2_000])


class _Mirror:
    """A session store that only mirrors: what the agent writes is sent on, and nothing is ever loaded from it."""

    def __init__(self, take: Callable[[dict[str, Any], list[Any]], None]) -> None:
        self._take = take

    async def append(self, key: Any, entries: list[Any]) -> None:
        """Send lines of a transcript on."""
        self._take(dict(key), entries)

    async def load(self, key: Any) -> None:
        """There is nothing to load."""
        return


async def _deny(tool: str, given: dict[str, Any], context: Any) -> sdk.PermissionResultDeny:
    return sdk.PermissionResultDeny(message=_NOBODY_TO_ASK)


def _decided(decision: str, why: str, *, updated_input: dict[str, Any] | None = None) -> sdk.HookJSONOutput:
    said: Any = {
        "hookEventName": "PreToolUse",
        "permissionDecision": decision,
        "permissionDecisionReason": why,
    }
    if updated_input is not None:
        said["updatedInput"] = updated_input
    return {"hookSpecificOutput": said}


def _why(verdict: Verdict) -> str:
    return verdict.reason if verdict.rule is None else f"{verdict.reason}: {verdict.rule}"


async def _prompt(command: StartTurn) -> AsyncIterator[dict[str, Any]]:
    # The turn's id is also the message's uuid, so that result, transcript and resume can be matched to it.
    yield {
        "type": "user",
        "uuid": command.turn_id,
        "parent_tool_use_id": None,
        "message": {"role": "user", "content": command.content},
    }


def _answers(message: sdk.ResultMessage, running: _Running) -> bool:
    """Whether this result ends the turn at work, and not a run the agent had begun by itself just before."""
    if not running.from_prompt or running.resumed or running.interrupted is not None:
        return True
    uuids = message.user_message_uuids
    if uuids is None:
        return message.origin is None or message.user_message_uuid == running.turn_id
    return running.turn_id in uuids


def _ending(message: sdk.ResultMessage, running: _Running) -> tuple[TurnStatus, StopReason, Failure | None]:
    if running.interrupted is not None:
        return _ending_of(running)
    if (message.terminal_reason or "").startswith("aborted"):
        return TurnStatus.INTERRUPTED, StopReason.INTERRUPTED, None
    if message.subtype == "error_max_turns":
        return TurnStatus.SUCCEEDED, StopReason.MAX_TURNS, None
    if message.is_error or message.subtype != "success":
        text = "; ".join(message.errors or []) or message.result or message.subtype
        return (
            TurnStatus.FAILED,
            StopReason.ERROR,
            Failure(code=AgentFailed.code, message=whole_text(text)[:4_000]),
        )
    return TurnStatus.SUCCEEDED, StopReason.END_TURN, None


def _ending_of(running: _Running) -> tuple[TurnStatus, StopReason, Failure | None]:
    """How a turn ends that was interrupted."""
    if running.interrupted is StopReason.MAX_TURNS:
        return TurnStatus.SUCCEEDED, StopReason.MAX_TURNS, None
    if running.interrupted is StopReason.TIMEOUT:
        error = TurnTimedOut()
        return TurnStatus.FAILED, StopReason.TIMEOUT, Failure(code=error.code, message=error.message)
    return TurnStatus.INTERRUPTED, running.interrupted or StopReason.INTERRUPTED, None


def default_permission_mode(*, isolated: bool) -> PermissionMode:
    """The mode of a session that names none."""
    return PermissionMode.BYPASS if isolated else PermissionMode.DEFAULT
