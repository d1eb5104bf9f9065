"""The dialect `sdk-server`: one-off queries, and conversations of the caller's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, Field, StringConstraints
from starlette.responses import Response, StreamingResponse

from carrel import __version__
from carrel.api.dependencies import Services
from carrel.api.dialects import turns
from carrel.api.dialects.auth import principal
from carrel.api.dialects.claude_agent_http import all_sessions
from carrel.api.dialects.options import DialectOptions
from carrel.api.dialects.pieces import End, Piece, Text, Thinking, ToolUse
from carrel.api.dialects.turns import Moment
from carrel.errors import CarrelError, NothingToInterrupt, SessionNotFound
from carrel.model import PermissionMode, Principal, Scope, Session, StopReason, TurnStatus, utc_now
from carrel.protocol.spec import CreateSession

TITLE = "Claude Agent SDK Server"

_ONE_OFF = "one_off"
# A query's session is removed with its answer; this is for the one whose server was killed in between.
_ONE_OFF_TTL_SECONDS = 86_400

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=10_000_000, pattern=r"\S")]


def _mine(found: Annotated[Principal, Depends(principal)]) -> Principal:
    """The caller as itself: this dialect knows no users, so an admin too has its own sessions only."""
    return found.model_copy(update={"scopes": found.scopes - {Scope.ADMIN} | {Scope.READ, Scope.WRITE}})


Caller = Annotated[Principal, Depends(_mine)]


class _Choices(BaseModel):
    model: str | None = None
    allowed_tools: list[str] | None = None
    permission_mode: PermissionMode | None = None

    def session(self, **more: Any) -> CreateSession:
        """The session that is asked for."""
        asked = self.model_dump(include={"model", "allowed_tools", "permission_mode", "max_turns"}, exclude_none=True)
        # Its clients have no way to answer.
        return CreateSession(**asked, ask_expires_seconds=0, **more)


class QueryRequest(_Choices):
    """The body of `POST /query`; what it does not name is ignored."""

    prompt: Prompt
    max_turns: int | None = Field(default=None, ge=1, description="Model requests it may make.")
    stream: bool = False
    cwd: str | None = Field(default=None, description="Taken and not used: every query has an empty folder of its own.")
    include_thinking: bool = False


class QueryResponse(BaseModel):
    """The answer of a query."""

    response: str
    session_id: None = None
    duration_ms: int | None
    num_turns: int
    total_cost_usd: float | None


class StartRequest(_Choices):
    """The body of `POST /session/start`."""

    initial_prompt: Prompt | None = None


class StartResponse(BaseModel):
    """A session that was started."""

    session_id: str
    status: Literal["started"] = "started"
    initial_response: str | None
    created_at: Moment


class SessionQueryRequest(BaseModel):
    """The body of `POST /session/{id}/query`."""

    prompt: Prompt
    stream: bool = False
    include_thinking: bool = False


class SessionQueryResponse(BaseModel):
    """An answer."""

    session_id: str
    response: str
    duration_ms: int | None


class StatusResponse(BaseModel):
    """What was done to a session."""

    status: str
    session_id: str


class SessionResponse(BaseModel):
    """A session."""

    session_id: str
    created_at: Moment
    active: bool = True
    model: str | None


class ListResponse(BaseModel):
    """The caller's sessions."""

    active_sessions: list[str]
    count: int


class HealthResponse(BaseModel):
    """How the service does."""

    status: str
    authenticated: bool
    active_sessions: int
    timestamp: Moment


class Detail(BaseModel):
    """An error."""

    detail: str


_ENDPOINTS = {
    "health": "GET /health",
    "query": "POST /query",
    "start_session": "POST /session/start",
    "session_query": "POST /session/{session_id}/query",
    "interrupt": "POST /session/{session_id}/interrupt",
    "get_session": "GET /session/{session_id}",
    "list_sessions": "GET /sessions",
    "close_session": "DELETE /session/{session_id}",
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Detail, "description": "Session <id> not found"}}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def create_router(services: Services, options: DialectOptions) -> APIRouter:
    """The dialect's routes."""
    router = APIRouter()
    router.include_router(_base(services, options))
    router.include_router(_queries(services))
    router.include_router(_sessions(services, options))
    return router


def _base(services: Services, options: DialectOptions) -> APIRouter:
    router = APIRouter()

    @router.get("/")
    async def root() -> dict[str, Any]:
        """What this is, and what it offers."""
        return {"name": TITLE, "version": __version__, "endpoints": _ENDPOINTS}

    @router.get("/health", response_model=HealthResponse)
    async def health(response: Response) -> HealthResponse:
        """Whether the service works, and whether it has a credential for the model."""
        well, count = True, 0
        try:
            well = all((await services.ready()).values())
            count = await services.store.read(lambda tx: tx.counts.sessions())
        except CarrelError:
            well = False  # the status says so; there is no place for why
        response.status_code = 200 if well else 503
        return HealthResponse(
            status="healthy" if well else "unhealthy",
            authenticated=options.authenticated,
            active_sessions=count,
            timestamp=utc_now(),
        )

    return router


# ----------------------------------------------------------------------------------------------------------- queries


def _queries(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/query", response_model=QueryResponse, responses=_STREAM)
    async def query(request: Request, body: QueryRequest, caller: Caller) -> Any:
        """Ask once. Nothing of it stays."""
        one_off = body.session(metadata={_ONE_OFF: True}, ttl_seconds=_ONE_OFF_TTL_SECONDS)
        session = await services.sessions.create(caller, one_off)
        try:
            sent = await turns.send(services, request, caller, session.id, body.prompt)
        except BaseException:
            services.background(_remove(services, caller, session.id))
            raise
        if body.stream:
            services.background(_remove_after(services, sent))
            return _streamed(services, sent, include_thinking=body.include_thinking)
        try:
            result = await turns.result_of(services, sent)
        finally:
            await _remove(services, caller, session.id)
        return QueryResponse(
            response=result.text,
            duration_ms=result.duration_ms,
            num_turns=result.num_turns,
            total_cost_usd=result.cost_usd,
        )

    return router


async def _remove(services: Services, caller: Principal, session_id: str) -> None:
    try:
        await services.sessions.delete(caller, session_id)
    except SessionNotFound:
        return  # somebody else has removed it


async def _remove_after(services: Services, sent: turns.Sent) -> None:
    """Remove a query's session once its turn is over, whether or not anybody still watches."""
    try:
        session_id = sent.turn.session_id
        await services.sessions.wait_for_turn(sent.principal, session_id, sent.turn.id, after=sent.before)
    except SessionNotFound:
        return
    await _remove(services, sent.principal, sent.turn.session_id)


# ---------------------------------------------------------------------------------------------------------- sessions


def _sessions(services: Services, options: DialectOptions) -> APIRouter:
    router = APIRouter()

    @router.post("/session/start", response_model=StartResponse)
    async def create_session(request: Request, caller: Caller, body: StartRequest | None = None) -> StartResponse:
        """Begin a conversation."""
        body = body or StartRequest()
        session = await services.sessions.create(caller, body.session())
        response = None
        if body.initial_prompt is not None:
            try:
                sent = await turns.send(services, request, caller, session.id, body.initial_prompt)
                response = (await turns.result_of(services, sent)).text
            except (HTTPException, CarrelError):
                # The client has not learnt its id, and never will.
                await _remove(services, caller, session.id)
                raise
        return StartResponse(session_id=session.id, initial_response=response, created_at=session.created_at)

    @router.post("/session/{session_id}/query", response_model=SessionQueryResponse, responses=_STREAM | _NOT_FOUND)
    async def create_turn(request: Request, session_id: str, body: SessionQueryRequest, caller: Caller) -> Any:
        """Go on with a conversation. While another query runs, this one waits its turn."""
        await _found(services, caller, session_id)
        sent = await turns.send(services, request, caller, session_id, body.prompt)
        if body.stream:
            return _streamed(services, sent, include_thinking=body.include_thinking)
        result = await turns.result_of(services, sent)
        return SessionQueryResponse(session_id=session_id, response=result.text, duration_ms=result.duration_ms)

    @router.post("/session/{session_id}/interrupt", response_model=StatusResponse, responses=_NOT_FOUND)
    async def interrupt_session(session_id: str, caller: Caller) -> StatusResponse:
        """End the query that runs, if any does."""
        await _found(services, caller, session_id)
        with suppress(NothingToInterrupt):  # what was to end has ended
            await services.sessions.interrupt(caller, session_id)
        return StatusResponse(status="interrupted", session_id=session_id)

    @router.get("/session/{session_id}", response_model=SessionResponse, responses=_NOT_FOUND)
    async def get_session(session_id: str, caller: Caller) -> SessionResponse:
        """A session."""
        session = await _found(services, caller, session_id)
        model = session.spec.get("model") or options.default_model
        return SessionResponse(session_id=session.id, created_at=session.created_at, model=model)

    @router.get("/sessions", response_model=ListResponse)
    async def list_sessions(caller: Caller) -> ListResponse:
        """The caller's sessions, newest first."""
        found = await all_sessions(services, caller)
        ids = [session.id for session in found if not session.metadata.get(_ONE_OFF)]
        return ListResponse(active_sessions=ids, count=len(ids))

    @router.delete("/session/{session_id}", response_model=StatusResponse, responses=_NOT_FOUND)
    async def delete_session(session_id: str, caller: Caller) -> StatusResponse:
        """Delete a session for good."""
        await _found(services, caller, session_id)
        await _remove(services, caller, session_id)
        return StatusResponse(status="closed", session_id=session_id)

    return router


async def _found(services: Services, caller: Principal, session_id: str) -> Session:
    try:
        return await services.sessions.get(caller, session_id)
    except SessionNotFound:
        raise HTTPException(404, f"Session {session_id} not found") from None


# ------------------------------------------------------------------------------------------------------------ frames


def _streamed(services: Services, sent: turns.Sent, *, include_thinking: bool) -> StreamingResponse:
    def frame(piece: Piece) -> Iterable[turns.Json]:
        return _frame(piece, sent, include_thinking=include_thinking)

    return turns.stream(_until_done(turns.frames_of(services, sent, frame, _error)))


async def _until_done(frames: AsyncIterator[list[turns.Json]]) -> AsyncIterator[list[turns.Json]]:
    async for batch in frames:
        yield batch
    yield [{"type": "done"}]


def _frame(piece: Piece, sent: turns.Sent, *, include_thinking: bool) -> Iterable[turns.Json]:
    match piece:
        case Text():
            yield {"type": "text", "text": piece.text, "content": piece.text}
        case Thinking() if include_thinking:
            yield {"type": "thinking", "text": piece.text}
        case ToolUse():
            yield {"type": "tool_use", "name": piece.name, "id": piece.id, "input": piece.input}
        case End():
            problem = turns.told(piece.data, sent)
            if problem is not None:
                yield from _error(problem)
                return
            yield {
                "type": "result",
                "subtype": _subtype(piece.data),
                "duration_ms": piece.data.get("duration_ms"),
                "num_turns": piece.data.get("num_turns"),
                "total_cost_usd": piece.data.get("cost_usd"),
            }


def _subtype(end: dict[str, Any]) -> str:
    """What the Agent SDK calls this end."""
    if end.get("stop_reason") == StopReason.MAX_TURNS:
        return "error_max_turns"
    return "success" if end["status"] == TurnStatus.SUCCEEDED else "error_during_execution"


def _error(message: str) -> Iterable[turns.Json]:
    yield {"type": "error", "message": message}
