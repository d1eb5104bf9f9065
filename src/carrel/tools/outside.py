"""The tools of clients: sessions led from their beginning to their end, with the answers to what agents ask."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field
from pydantic_core import from_json

from carrel.model import InteractionStatus, Scope
from carrel.protocol.spec import CreateSession, CreateTurn
from carrel.sessions.children import Children, Outcome
from carrel.sessions.interactions import Interactions
from carrel.sessions.service import SessionService
from carrel.tools.toolbox import Arguments, Call, Result, Tool, Toolbox

__all__ = ["outside"]

_MOST_ASKED = 50
_PROGRESS_SECONDS = 10.0


class CreateSessionArguments(Arguments):
    """What `create_session` takes."""

    title: str | None = Field(default=None, max_length=500, description="A name for people.")
    environment: str = Field(default="default", max_length=64, description="The environment, by name.")
    options: dict[str, Any] = Field(
        default={}, description="Any other field of POST /api/v1/sessions, such as model, permission_mode, budget."
    )


class OfSession(Arguments):
    """What names a session."""

    session_id: str = Field(max_length=64)


class SendPrompt(OfSession):
    """What `send_prompt` takes."""

    prompt: str = Field(min_length=1)
    timeout_seconds: float | None = Field(default=None, gt=0, le=604_800, description="Interrupts the turn after it.")


class WaitForSession(OfSession):
    """What `wait_for_session` takes."""

    timeout_seconds: float | None = Field(default=None, gt=0, le=604_800, description="The longest wait; none: any.")
    until: Literal["complete", "complete_or_asked"] = Field(
        default="complete_or_asked", description="Whether a question to a person ends the wait too."
    )


class GetEvents(OfSession):
    """What `get_events` takes."""

    after: int = Field(default=0, ge=0, description="Only events with a higher seq.")
    limit: int = Field(default=100, ge=1, le=1000)


class AnswerInteraction(Arguments):
    """What `answer_interaction` takes."""

    interaction_id: str = Field(max_length=64)
    decision: Literal["allow", "deny"]
    updated_input: dict[str, Any] | None = Field(default=None, description="What the tool is called with instead.")
    answers: dict[str, str] | None = Field(default=None, description="Of a question: the answer, by its text.")
    message: str | None = Field(default=None, description="With deny: what the agent is told.")
    stop: bool = Field(default=False, description="With deny: the turn is interrupted too.")


class _Outside:
    def __init__(self, service: SessionService, children: Children, interactions: Interactions) -> None:
        self._service = service
        self._children = children
        self._interactions = interactions

    async def create(self, call: Call, given: CreateSessionArguments) -> Result:
        wanted = {"title": given.title, "environment": given.environment, **given.options}
        session = await self._service.create(call.principal, CreateSession.model_validate(wanted))
        return {"session_id": session.id, "status": session.status}

    async def prompt(self, call: Call, given: SendPrompt) -> Result:
        body = CreateTurn(prompt=given.prompt, timeout_seconds=given.timeout_seconds)
        turn, before = await self._service.create_turn(call.principal, given.session_id, body)
        return {"session_id": given.session_id, "turn_id": turn.id, "status": turn.status, "after": before}

    async def wait(self, call: Call, given: WaitForSession) -> Result:
        said = 0.0
        outcome: Outcome | None = None
        asked: list[Any] = []
        async for outcome in self._children.follow(call.principal, given.session_id, seconds=given.timeout_seconds):
            asked = await self._asked(call, given.session_id)
            if outcome.complete or (asked and given.until == "complete_or_asked"):
                break
            if time.monotonic() - said >= _PROGRESS_SECONDS:
                said = time.monotonic()
                await call.say(f"the session is {outcome.session.status}")
        if outcome is None:
            outcome = await self._children.outcome(call.principal, given.session_id)
        return {
            "session_id": given.session_id,
            "status": outcome.session.status,
            "is_complete": outcome.complete,
            "turn": outcome.turn.model_dump(mode="json") if outcome.turn is not None else None,
            "interactions": asked,
        }

    async def _asked(self, call: Call, session_id: str) -> list[Any]:
        page = await self._interactions.page(
            call.principal, session_id=session_id, status=InteractionStatus.PENDING, cursor=None, limit=_MOST_ASKED
        )
        return [each.model_dump(mode="json") for each in page.items]

    async def events(self, call: Call, given: GetEvents) -> Result:
        found = await self._service.events(call.principal, given.session_id, after=given.after, limit=given.limit)
        return {
            "events": [from_json(event.json()) for event in found],
            "after": found[-1].seq if found else given.after,
        }

    async def answer(self, call: Call, given: AnswerInteraction) -> Result:
        resolved = await self._interactions.answer(
            call.principal,
            given.interaction_id,
            allow=given.decision == "allow",
            updated_input=given.updated_input,
            answers=given.answers,
            message=given.message,
            stop=given.stop,
        )
        return {"interaction_id": resolved.id, "status": resolved.status}

    async def stop(self, call: Call, given: OfSession) -> Result:
        stopped = await self._service.stop(call.principal, given.session_id)
        return {"session_id": stopped.id, "status": stopped.status}


def outside(service: SessionService, children: Children, interactions: Interactions) -> Toolbox:
    """The tools that a client finds."""
    own = _Outside(service, children, interactions)

    def tool(name: str, arguments: type[Arguments], work: Any, description: str, *, reads: bool = False) -> Tool:
        scope = Scope.READ if reads else Scope.WRITE
        return Tool(name=name, description=description, arguments=arguments, work=work, scope=scope)

    return Toolbox(
        [
            tool(
                "create_session",
                CreateSessionArguments,
                own.create,
                "Open a session: a durable conversation with an agent that has files and tools of its own.",
            ),
            tool("send_prompt", SendPrompt, own.prompt, "Send a session a prompt. Answers at once."),
            tool(
                "wait_for_session",
                WaitForSession,
                own.wait,
                "Wait until a session has nothing more to do, or asks something; answers with its newest turn's result.",
                reads=True,
            ),
            tool("get_events", GetEvents, own.events, "What has happened in a session, in order.", reads=True),
            tool("answer_interaction", AnswerInteraction, own.answer, "Answer what a session's agent asks."),
            tool("stop_session", OfSession, own.stop, "Stop a session, with all below it."),
        ]
    )
