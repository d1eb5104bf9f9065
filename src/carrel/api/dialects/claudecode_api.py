"""The dialect `claudecode-api`: prompts to named environments, each once a container of its own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import to_json
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response

from carrel.api.dependencies import Services
from carrel.api.dialects import turns
from carrel.api.dialects.auth import is_trusted, principal
from carrel.api.dialects.options import DialectOptions
from carrel.errors import AuthenticationRequired, CarrelError, EnvironmentNotFound, Forbidden, SessionNotFound
from carrel.model import Principal, Scope, Session, StopReason, TurnStatus
from carrel.protocol.environments import ENVIRONMENT_NAME
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import CreateSession

TITLE = "Claude Code API"

_NEWEST = 50
_TITLE_CHARS = 8

EnvironmentName = Annotated[str, StringConstraints(pattern=ENVIRONMENT_NAME)]


def _mine(found: Annotated[Principal, Depends(principal)]) -> Principal:
    """The caller as itself: this dialect knows no users, so an admin too has its own sessions only."""
    return found.model_copy(update={"scopes": found.scopes - {Scope.ADMIN} | {Scope.READ, Scope.WRITE}})


Caller = Annotated[Principal, Depends(_mine)]


class ContainerStatus(BaseModel):
    """An environment, as what it once was."""

    exists: bool
    running: bool
    name: str


class ExecuteRequest(BaseModel):
    """The body of `POST /api/execute`; what it does not name is ignored."""

    model_config = ConfigDict(populate_by_name=True)

    env: str
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=10_000_000, pattern=r"\S")]
    json_output: bool = Field(default=False, alias="jsonOutput")
    session_id: str | None = Field(default=None, alias="sessionId")


class ExecuteResponse(BaseModel):
    """What came of it. The status of HTTP is 200 either way."""

    success: bool
    output: str | None = None
    error: str | None = None
    json_output: str | None = Field(default=None, description="The CLI's result object, as a text of JSON.")


class StartSession(BaseModel):
    """The body of `POST /api/sessions`."""

    env: str


class SessionMade(BaseModel):
    """A session. Its id has three names."""

    id: str
    sessionId: str
    session_id: str
    env: str


class SessionEntry(BaseModel):
    """A session in a list."""

    id: str
    environment: str
    title: str
    created_at: str = Field(description="Seconds since 1970.")
    updated_at: str = Field(description="Seconds since 1970.")


def refusal(error: CarrelError, connection: HTTPConnection) -> Response:
    """The error in plain text. What is no bearer token at all is 400, and not 401."""
    headers = {}
    status = error.http_status
    if isinstance(error, AuthenticationRequired):
        given = connection.headers.get("authorization")
        scheme, _, token = (given or "").partition(" ")
        malformed = given is not None and (scheme.lower() != "bearer" or not token.strip())
        wrong = 'Bearer error="invalid_token"' if given is not None else "Bearer"
        headers["WWW-Authenticate"] = 'Bearer error="invalid_request"' if malformed else wrong
        if malformed:
            return PlainTextResponse("Malformed Authorization header", status_code=400, headers=headers)
        text = "Missing Authorization header" if given is None else "Invalid token"
        return PlainTextResponse(text, status_code=status, headers=headers)
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return PlainTextResponse(error.message, status_code=status, headers=headers)


def create_router(services: Services, options: DialectOptions) -> APIRouter:
    """The dialect's routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the service answers."""
        return {"status": "ok"}

    router.include_router(_containers(services))
    router.include_router(_execution(services))
    router.include_router(_sessions(services))
    return router


# -------------------------------------------------------------------------------------------------------- containers


def _containers(services: Services) -> APIRouter:
    router = APIRouter(prefix="/api/containers")

    @router.get("/{environment_id}", response_model=ContainerStatus)
    async def get_environment_status(environment_id: str, caller: Caller) -> ContainerStatus:
        """Whether there is such an environment, and whether it takes prompts."""
        try:
            found = await services.life.status(caller, environment_id)
        except EnvironmentNotFound:
            return ContainerStatus(exists=False, running=False, name=_container(environment_id))
        return ContainerStatus(exists=True, running=found.running, name=_container(environment_id))

    @router.post("/{environment_id}/start", response_model=ContainerStatus)
    async def start_environment(environment_id: str, request: Request, caller: Caller) -> ContainerStatus:
        """Have it take prompts."""
        _check_trusted(request)
        found = await services.life.start(caller, environment_id)
        return ContainerStatus(exists=True, running=found.running, name=_container(environment_id))

    @router.post("/{environment_id}/stop", response_model=ContainerStatus)
    async def stop_environment(environment_id: str, request: Request, caller: Caller) -> ContainerStatus:
        """Have it take no more prompts. Those that it has taken are answered."""
        _check_trusted(request)
        found = await services.life.stop(caller, environment_id)
        return ContainerStatus(exists=True, running=found.running, name=_container(environment_id))

    return router


def _check_trusted(request: Request) -> None:
    if not is_trusted(principal(request)):
        raise Forbidden(
            "An environment is everybody's: it is started and stopped by the static token or an admin's key."
        )


def _container(environment: str) -> str:
    return f"claude-agent-{environment}"


# --------------------------------------------------------------------------------------------------------- execution


def _execution(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/api/execute", response_model=ExecuteResponse, response_model_exclude_none=True)
    async def create_turn(request: Request, body: ExecuteRequest, caller: Caller) -> ExecuteResponse:
        """Send a prompt and wait for its answer; without `sessionId`, to a new session, whose id is in `json_output`."""
        try:
            session = await _opened(services, caller, body)
            sent = await turns.send(services, request, caller, session.id, body.prompt)
            waiting = services.sessions.wait_for_turn(caller, session.id, sent.turn.id, after=sent.before)
            result = await waiting
        except CarrelError as error:
            return ExecuteResponse(success=False, error=error.message)
        told = to_json(result_object(result)).decode() if body.json_output else None
        if result.status != TurnStatus.SUCCEEDED:
            message = result.error.message if result.error is not None else f"The prompt ended as {result.status}."
            return ExecuteResponse(success=False, error=message, output=result.text or None, json_output=told)
        return ExecuteResponse(success=True, output=result.text, json_output=told)

    return router


async def _opened(services: Services, caller: Principal, body: ExecuteRequest) -> Session:
    """The session that is asked for, or a new one."""
    if body.session_id is None:
        return await services.sessions.create(caller, CreateSession(environment=body.env))
    session = await services.sessions.get(caller, body.session_id)
    if session.environment != body.env:
        raise SessionNotFound
    return session


def result_object(result: TurnResult) -> dict[str, Any]:
    """What `claude --print --output-format json` says of a turn."""
    subtype = "success" if result.status == TurnStatus.SUCCEEDED else "error_during_execution"
    if result.stop_reason == StopReason.MAX_TURNS:
        subtype = "error_max_turns"
    return {
        "type": "result",
        "subtype": subtype,
        "is_error": subtype != "success",
        "duration_ms": result.duration_ms,
        "num_turns": result.num_turns,
        "result": result.text,
        "session_id": result.session_id,
        "total_cost_usd": result.cost_usd,
        "usage": result.usage.model_dump(),
    }


# ---------------------------------------------------------------------------------------------------------- sessions


def _sessions(services: Services) -> APIRouter:
    router = APIRouter(prefix="/api/sessions")

    @router.post("", response_model=SessionMade)
    async def create_session(body: StartSession, caller: Caller) -> SessionMade:
        """Begin a conversation in an environment."""
        session = await services.sessions.create(caller, CreateSession(environment=body.env))
        return SessionMade(id=session.id, sessionId=session.id, session_id=session.id, env=body.env)

    @router.get("/{environment_id}", response_model=list[SessionEntry])
    async def list_sessions(environment_id: str, caller: Caller) -> list[SessionEntry]:
        """The caller's newest sessions in an environment."""
        await services.environments.get(caller, environment_id)
        page = await services.sessions.page(caller, status=None, cursor=None, limit=_NEWEST, environment=environment_id)
        return [
            SessionEntry(
                id=session.id,
                environment=environment_id,
                # Its last characters: those of ids that were made in one minute begin alike.
                title=f"Thread {session.id[-_TITLE_CHARS:]}",
                created_at=str(int(session.created_at.timestamp())),
                updated_at=str(int(session.last_active_at.timestamp())),
            )
            for session in page.items
        ]

    @router.delete("/{environment_id}/{session_id}", status_code=204)
    async def delete_session(environment_id: str, session_id: str, caller: Caller) -> Response:
        """Delete a conversation for good, with its files."""
        session = await services.sessions.get(caller, session_id)
        if session.environment != environment_id:
            raise HTTPException(404, SessionNotFound().message)
        await services.sessions.delete(caller, session_id)
        return Response(status_code=204)

    return router
