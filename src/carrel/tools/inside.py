"""The tools of an agent: its children, what its parent has handed it, and the people it may ask.

Names, arguments and answers are those of the older service `cc-docker`. Whoever calls is bound to a session: `child` is
always one below that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from carrel import abc
from carrel.errors import InvalidRequest, SessionNotFound
from carrel.model import (
    ChildFiles,
    Interaction,
    InteractionKind,
    InteractionStatus,
    Scope,
    Session,
    SessionStatus,
    TurnStatus,
    new_id,
    utc_now,
)
from carrel.protocol.link import digest_of
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import CreateChild, CreateTurn
from carrel.sessions import transitions
from carrel.sessions.asking import title_of
from carrel.sessions.children import Children, Outcome
from carrel.sessions.service import Mark, SessionService
from carrel.tools.toolbox import Arguments, Call, Result, Tool, Toolbox

__all__ = ["inside"]

_ASK = "ask_user"
_WORKSPACE = "/workspace"
_PAGE = 500
_LOOK_SECONDS = 0.5
_STATUS = {SessionStatus.READY: "idle", SessionStatus.WAITING: "running"}


class SpawnChild(Arguments):
    """What `spawn_child` takes."""

    prompt: str = Field(min_length=1, description="What the child is to do, with all it needs to know.")
    context: dict[str, Any] | str | None = Field(
        default=None, description="What it is handed, by name; it reads it with get_parent_context."
    )
    task_type: str | None = Field(default=None, max_length=100, description="A word for what it is for.")
    stream_output: bool = Field(default=False, description="Has no effect: output can always be read as it comes.")
    timeout_seconds: float | None = Field(default=None, gt=0, le=604_800, description="Interrupts it after so long.")
    workspace: ChildFiles = Field(
        default=ChildFiles.INHERIT,
        description="inherit: your files. clone: a copy of them. ephemeral: an empty folder.",
    )
    environment: str | None = Field(default=None, description="Another environment; default: yours.")


class OfChild(Arguments):
    """What names a child."""

    child_session_id: str = Field(max_length=64, description="The child, as spawn_child has named it.")


class SendToChild(OfChild):
    """What `send_to_child` takes."""

    prompt: str = Field(min_length=1, description="What it is told; it comes behind what it does now.")
    wait_for_result: bool = Field(default=False, description="Whether to wait for the end of it.")


class GetChildOutput(OfChild):
    """What `get_child_output` takes."""

    since_timestamp: datetime | None = Field(default=None, description="The `timestamp` of the last answer.")
    max_lines: int = Field(default=1000, ge=1, le=100_000, description="About how many lines at most.")


class GetChildResult(OfChild):
    """What `get_child_result` takes."""

    wait: bool = Field(default=True, description="Whether to wait until it is done.")
    timeout_seconds: float | None = Field(default=None, gt=0, le=604_800, description="The longest wait; none: any.")


class ListChildren(Arguments):
    """What `list_children` takes."""

    status_filter: str | None = Field(default=None, description="Only those of this status.")
    include_completed: bool = Field(default=True, description="Whether those that have nothing to do are among them.")


class StopChild(OfChild):
    """What `stop_child` takes."""

    force: bool = Field(default=False, description="Has no effect: a stop is always at once.")


class InterruptChild(OfChild):
    """What `interrupt_child` takes."""

    message: str | None = Field(default=None, description="With redirect: what it is to do instead.")
    interrupt_type: Literal["redirect", "stop", "pause", "resume"] = Field(
        default="redirect",
        description="redirect: do something else now. stop: end what it does. pause: until resume. resume: go on.",
    )
    priority: Literal["normal", "high", "critical"] = Field(default="normal", description="Has no effect.")


class GetParentContext(Arguments):
    """What `get_parent_context` takes."""

    key: str | None = Field(default=None, description="The name; without it, all there is.")


class AskUser(Arguments):
    """What `ask_user` takes."""

    question: str = Field(min_length=1, max_length=10_000)
    timeout_seconds: float = Field(default=1800, ge=60, le=604_800, description="After it nobody has answered.")
    max_attempts: int = Field(default=3, ge=1, le=5, description="Has no effect: a question waits, it is not repeated.")
    priority: Literal["normal", "urgent"] = "normal"
    options: list[str] | None = Field(default=None, max_length=20, description="Answers to choose from.")


class NotifyUser(Arguments):
    """What `notify_user` takes."""

    message: str = Field(min_length=1, max_length=2000)
    priority: Literal["normal", "urgent"] = "normal"
    summary: str | None = Field(default=None, max_length=200)


class _Inside:
    def __init__(self, store: abc.Store, service: SessionService, children: Children) -> None:
        self._store = store
        self._service = service
        self._children = children

    # ------------------------------------------------------------------------------------------------------- children

    async def spawn(self, call: Call, given: SpawnChild) -> Result:
        own = _own(call)
        context = given.context if isinstance(given.context, dict) else {"context": given.context}
        body = CreateChild(
            prompt=given.prompt,
            context={name: value for name, value in context.items() if value is not None},
            task_type=given.task_type,
            timeout_seconds=given.timeout_seconds,
            workspace=given.workspace,
            environment=given.environment,
        )
        known = await self._known(call)
        child = known or (await self._children.begin(call.principal, own, body, await self._mark(call, "spawn"))).id
        return {"child_session_id": child, "status": "starting", "parent_session_id": own}

    async def send(self, call: Call, given: SendToChild) -> Result:
        child = await self._child(call, given)
        known = await self._known(call)
        if known is None:
            body = CreateTurn(prompt=given.prompt)
            turn, _ = await self._service.create_turn(call.principal, child.id, body, await self._mark(call, "send"))
            known = turn.id
        if not given.wait_for_result:
            return {"child_session_id": child.id, "message_id": known, "status": "processing"}
        waiting = self._service.wait_for_turn(call.principal, child.id, known, after=0)
        return {"child_session_id": child.id, **_message(await _with_progress(call, waiting))}

    async def output(self, call: Call, given: GetChildOutput) -> Result:
        child = await self._child(call, given)
        since = given.since_timestamp
        after, lines, last = 0, list[str](), since
        while len(lines) < given.max_lines:
            page = await self._service.events(call.principal, child.id, after=after, limit=_PAGE)
            for event in page:
                after = event.seq
                if len(lines) >= given.max_lines:
                    break
                if event.type == "message.assistant" and (since is None or event.at > since):
                    lines += event.data["text"].splitlines()
                    last = event.at
            if len(page) < _PAGE:
                break
        outcome = await self._children.outcome(call.principal, child.id)
        return {
            "output": "\n".join(lines),
            "is_complete": outcome.complete,
            "status": _status(outcome.session),
            "timestamp": (last or child.created_at).isoformat(),
            "line_count": len(lines),
        }

    async def result(self, call: Call, given: GetChildResult) -> Result:
        child = await self._child(call, given)
        outcome = await self._children.outcome(call.principal, child.id)
        if given.wait:
            async for outcome in self._children.follow(call.principal, child.id, seconds=given.timeout_seconds):
                if not outcome.complete:
                    await call.say(f"{child.id} is {outcome.session.status}")
        return _of_outcome(outcome)

    async def list(self, call: Call, given: ListChildren) -> Result:
        own = _own(call)
        shown = []
        for child in await self._children.begun(call.principal, own):
            outcome = await self._children.outcome(call.principal, child.id)
            if given.status_filter not in (None, _status(child)) or (outcome.complete and not given.include_completed):
                continue
            shown.append(
                {
                    "session_id": child.id,
                    "status": _status(child),
                    "created_at": child.created_at.isoformat(),
                    "task_type": child.birth.task_type if child.birth is not None else None,
                    "is_complete": outcome.complete,
                }
            )
        return {"parent_session_id": own, "children": shown}

    async def stop(self, call: Call, given: StopChild) -> Result:
        child = await self._child(call, given)
        stopped = await self._service.stop(call.principal, child.id)
        return {"child_session_id": child.id, "status": _status(stopped)}

    async def interrupt(self, call: Call, given: InterruptChild) -> Result:
        child = await self._child(call, given)
        match given.interrupt_type:
            case "redirect":
                if not (given.message or "").strip():
                    raise InvalidRequest("message: a redirect says what the child is to do instead")
                body = CreateTurn(prompt=given.message)
                if await self._known(call) is None:
                    await self._service.redirect(call.principal, child.id, body, await self._mark(call, "redirect"))
            case "stop":
                await self._service.interrupt(call.principal, child.id)
            case "pause":
                await self._service.pause(call.principal, child.id)
            case "resume":
                await self._service.resume(call.principal, child.id)
        return {
            "status": "sent",
            "session_id": child.id,
            "interrupt_type": given.interrupt_type,
            "timestamp": utc_now().isoformat(),
        }

    async def workspace(self, call: Call, given: OfChild) -> Result:
        child = await self._child(call, given)
        files = child.birth.files if child.birth is not None else ChildFiles.EPHEMERAL
        shared = files is ChildFiles.INHERIT and child.parent_id == call.principal.session_id
        return {
            "child_session_id": child.id,
            "workspace_type": files,
            "path": _WORKSPACE if shared else None,
            "message": "It works in your own files."
            if shared
            else "Its files are its own, and not in your sandbox; what it says is in its result.",
        }

    # --------------------------------------------------------------------------------------------- parents and people

    async def context(self, call: Call, given: GetParentContext) -> Result:
        session = await self._service.get(call.principal, _own(call))
        if session.birth is None:
            raise InvalidRequest("This session has no parent.")
        if given.key is None:
            return {"context": session.birth.context, "parent_session_id": session.parent_id}
        there = given.key in session.birth.context
        return {"key": given.key, "value": session.birth.context.get(given.key), "found": there}

    async def notify(self, call: Call, given: NotifyUser) -> Result:
        raise InvalidRequest("Nobody can be notified on this server yet; say it in your answer.")

    async def ask(self, call: Call, given: AskUser) -> Result:
        """Ask, and wait: the question is a row, so that a restart of everything leaves it where it is."""
        own = _own(call)
        asked = _stable_id(call)
        question: dict[str, Any] = {
            "question": given.question,
            "header": "Question",
            "multiSelect": False,
            "options": [{"label": option, "description": ""} for option in given.options or ()],
        }
        tool_input = {"questions": [question], "priority": given.priority}

        def work(tx: abc.Transaction) -> Interaction | None:
            found = tx.interactions.get(asked)
            session, turn = tx.sessions.get(own), tx.turns.live(own)
            if found is not None or session is None or turn is None:
                return found
            now = utc_now()
            new = Interaction(
                id=asked,
                session_id=own,
                root_session_id=session.root_id or own,
                owner=session.owner,
                turn_id=turn.id,
                kind=InteractionKind.QUESTION,
                title=title_of(InteractionKind.QUESTION, _ASK, tool_input),
                tool=_ASK,
                input=tool_input,
                input_digest=digest_of(_ASK, tool_input),
                reason=given.question[:500],
                created_at=now,
                expires_at=now + timedelta(seconds=given.timeout_seconds),
            )
            transitions.ask(tx, session, new)
            return new

        found = await self._store.write(work)
        if found is None:
            raise SessionNotFound
        self._service.poke(own)  # it expires by its owner's step
        while found.status is InteractionStatus.PENDING:
            await asyncio.sleep(_LOOK_SECONDS)
            await call.say("waiting for an answer")
            now = await self._store.read(lambda tx: tx.interactions.get(asked))
            if now is None:
                raise SessionNotFound
            found = now
        return {"interaction_id": asked, **_answer_of(found, given.question)}

    # ---------------------------------------------------------------------------------------------------------- parts

    async def _child(self, call: Call, given: OfChild) -> Session:
        return await self._children.child(call.principal, _own(call), given.child_session_id)

    async def _known(self, call: Call) -> str | None:
        """What an earlier try of the same call has made."""
        if call.key is None:
            return None
        record = _record(call, "")
        found = await self._store.write(lambda tx: tx.idempotency.reserve(record))
        return found.object_id if found is not None else None

    async def _mark(self, call: Call, what: str) -> Mark | None:
        return Mark(call.principal.name, call.key) if call.key is not None else None


def inside(store: abc.Store, service: SessionService, children: Children) -> Toolbox:
    """The tools that an agent finds."""
    own = _Inside(store, service, children)

    def tool(name: str, arguments: type[Arguments], work: Any, description: str, *, reads: bool = False) -> Tool:
        scope = Scope.READ if reads else Scope.WRITE
        return Tool(name=name, description=description, arguments=arguments, work=work, scope=scope)

    return Toolbox(
        [
            tool(
                "spawn_child",
                SpawnChild,
                own.spawn,
                "Hand a part of your task to a child: another agent with a conversation of its own that works at the "
                "same time. It knows nothing but its prompt and context. Answers at once with its child_session_id.",
            ),
            tool("send_to_child", SendToChild, own.send, "Send a child another prompt."),
            tool(
                "get_child_output",
                GetChildOutput,
                own.output,
                "What a child has said so far; give the timestamp of the last answer back to read on.",
                reads=True,
            ),
            tool(
                "get_child_result",
                GetChildResult,
                own.result,
                "What a child has come to, by default when it is done, however long that takes.",
                reads=True,
            ),
            tool("list_children", ListChildren, own.list, "Your children and how they do.", reads=True),
            tool(
                "stop_child",
                StopChild,
                own.stop,
                "Stop a child for good, with all below it. Children that are not stopped count against your limit.",
            ),
            tool(
                "interrupt_child",
                InterruptChild,
                own.interrupt,
                "Interrupt a child: give it something else to do now, end what it does, or pause and resume it.",
            ),
            tool(
                "get_child_workspace_path",
                OfChild,
                own.workspace,
                "Where you see a child's files, if you do.",
                reads=True,
            ),
            tool(
                "get_parent_context",
                GetParentContext,
                own.context,
                "What the session that has begun you has handed you, by name.",
                reads=True,
            ),
            tool("notify_user", NotifyUser, own.notify, "Tell the people behind this session something."),
            tool(
                "ask_user",
                AskUser,
                own.ask,
                "Ask the people behind this session a question, and wait for the answer.",
            ),
        ],
        admit=children.check_tools,
    )


def _own(call: Call) -> str:
    if call.principal.session_id is None:
        raise InvalidRequest("These tools are for agents, which act for their own session.")
    return call.principal.session_id


def _record(call: Call, fingerprint: str) -> abc.IdempotencyRecord:
    return abc.IdempotencyRecord(
        principal=call.principal.name,
        key=call.key or "",
        fingerprint=fingerprint,
        boot_id="tool",
        object_id=None,
        status=None,
        body=None,
        created_at=utc_now(),
    )


def _stable_id(call: Call) -> str:
    """The same id for every try of one call."""
    digest = sha256(f"{call.principal.name} {call.key or new_id()}".encode()).digest()
    return str(UUID(bytes=digest[:16], version=5))


def _status(session: Session) -> str:
    """A status in the five words of the older service."""
    return _STATUS.get(session.status, session.status.value)


def _message(turn: TurnResult) -> Result:
    done = turn.status is TurnStatus.SUCCEEDED
    told: Result = {
        "message_id": turn.id,
        "status": "completed" if done else "failed",
        "type": "result",
        "subtype": "success" if done else str(turn.stop_reason or turn.status),
        "result": turn.text,
        "duration_ms": turn.duration_ms,
        "total_cost_usd": turn.cost_usd,
        "usage": {"input_tokens": turn.usage.input_tokens, "output_tokens": turn.usage.output_tokens},
    }
    if turn.structured_output is not None:
        told["structured_output"] = turn.structured_output
    if not done:
        failure: Mapping[str, Any] = turn.error.model_dump() if turn.error is not None else {"code": turn.status}
        told["failure"] = dict(failure)
    return told


def _of_outcome(outcome: Outcome) -> Result:
    told: Result = {"child_session_id": outcome.session.id, "is_complete": outcome.complete}
    if outcome.turn is None or not outcome.complete:
        return told | {"status": "processing", "session_status": _status(outcome.session), "result": None}
    return told | _message(outcome.turn) | {"session_status": _status(outcome.session)}


def _answer_of(found: Interaction, question: str) -> Result:
    answered = found.status is InteractionStatus.ANSWERED
    answer = found.answer or {}
    response = (answer.get("answers") or {}).get(question) or answer.get("message")
    if answered and response is None:
        response = next(iter((answer.get("answers") or {}).values()), None)
    return {
        "status": "answered" if answered else "timeout",
        "response": response if answered else None,
        "timed_out": found.status is InteractionStatus.EXPIRED,
    }


async def _with_progress(call: Call, waiting: Any) -> Any:
    task = asyncio.ensure_future(waiting)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=5.0)
            if done:
                return task.result()
            await call.say("the child is at work")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
