"""The dialect `claude-agent-http`: sessions of users, each in a directory of its user's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any, Literal

import psutil
from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import BaseModel, Field, StringConstraints, field_validator
from starlette.responses import JSONResponse, Response, StreamingResponse

from carrel import __version__
from carrel.api.audit import note
from carrel.api.dependencies import Services
from carrel.api.dialects import turns
from carrel.api.dialects.auth import for_all_users, is_trusted, principal
from carrel.api.dialects.options import DialectOptions
from carrel.api.dialects.pieces import End, Piece, Text, ToolUse
from carrel.api.dialects.turns import Moment
from carrel.errors import CarrelError, Forbidden, SessionBusy, SessionNotFound
from carrel.model import USER_ID, PermissionMode, Principal, Session, SessionStatus, Workspace, utc_now
from carrel.protocol.spec import CreateSession

TITLE = "Claude Agent HTTP API"

DEFAULT_TTL_SECONDS = 3600
DEFAULT_MAX_SESSIONS = 20
DEFAULT_MAX_SESSIONS_PER_USER = 5
DEFAULT_SPEC: dict[str, Any] = {
    "system_prompt": "You are a helpful AI assistant.",
    "permission_mode": PermissionMode.BYPASS,
    "allowed_tools": ["Bash", "Read", "Write", "Edit", "Glob", "Grep", "Skill"],
    "setting_sources": ["user", "project"],
    "max_turns": 50,
}

NOT_FOUND = "Session not found"
GONE = "Session not found or expired"
BUSY = "Session is busy processing another request"

_DEFAULT_TIMEOUT_SECONDS = 120
_PAGE = 1000
_MEBIBYTE = 2**20

Caller = Annotated[Principal, Depends(principal)]


class CreateRequest(BaseModel):
    """The body of `POST /api/v1/sessions`; what it does not name is ignored."""

    user_id: Annotated[str, StringConstraints(pattern=USER_ID)] = Field(description="Whose session it is.")
    subdir: str | None = Field(default=None, max_length=200, description="A directory below the user's own.")
    metadata: dict[str, Any] | None = Field(default=None, description="Anything of yours.")

    @field_validator("subdir")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if not value:
            return None
        if ".." in value:
            raise ValueError("Path traversal (..) not allowed in subdir")
        if value.startswith("/"):
            raise ValueError("Absolute path not allowed in subdir")
        return Workspace(type="user", subdir=value.strip("/")).subdir


class SessionResponse(BaseModel):
    """A session."""

    session_id: str
    user_id: str
    cwd: str
    created_at: Moment
    last_active_at: Moment
    message_count: int
    status: Literal["active", "closed"]
    metadata: dict[str, Any]


class ChatRequest(BaseModel):
    """The body of `POST /api/v1/chat` and `/api/v1/chat/stream`."""

    session_id: str = Field(min_length=1, max_length=200)
    message: str = Field(min_length=1, max_length=100_000)
    timeout: int | None = Field(default=_DEFAULT_TIMEOUT_SECONDS, ge=1, le=600, description="Seconds.")

    @field_validator("message")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("Message cannot be empty")
        return value

    @property
    def timeout_seconds(self) -> int:
        """How long the client waits."""
        return self.timeout or _DEFAULT_TIMEOUT_SECONDS


class ToolCall(BaseModel):
    """A call of a tool."""

    tool: str
    input: dict[str, Any]


class ChatResponse(BaseModel):
    """An answer."""

    session_id: str
    text: str
    tool_calls: list[ToolCall]
    timestamp: Moment


class HealthResponse(BaseModel):
    """How the service does."""

    status: str
    version: str
    active_sessions: int
    in_memory_clients: int
    memory_mb: float
    storage_type: str
    uptime_seconds: float


class Detail(BaseModel):
    """An error."""

    detail: str


class UnhealthyResponse(HealthResponse):
    """How the service does where it does not do well."""

    error: str


def create_router(services: Services, options: DialectOptions) -> APIRouter:
    """The dialect's routes."""
    router = APIRouter()
    router.include_router(_base(services, options))
    router.include_router(_sessions(services, options), prefix="/api/v1/sessions", tags=["Sessions"])
    router.include_router(_chat(services), prefix="/api/v1/chat", tags=["Chat"])
    return router


def _errors(**meanings: str) -> dict[int | str, dict[str, Any]]:
    return {int(code[1:]): {"model": Detail, "description": meaning} for code, meaning in meanings.items()}


# -------------------------------------------------------------------------------------------------------------- base


def _base(services: Services, options: DialectOptions) -> APIRouter:
    router = APIRouter()
    started = time.monotonic()

    @router.get("/", summary="Root")
    async def root() -> dict[str, str]:
        """What this is, and where to read on."""
        return {"name": TITLE, "version": __version__, "docs": "/docs", "health": "/health"}

    @router.get("/health", response_model=HealthResponse, responses={503: {"model": UnhealthyResponse}})
    async def health() -> Response:
        """Whether the service works."""
        facts: dict[str, Any] = {
            "status": "healthy",
            "version": __version__,
            "active_sessions": 0,
            "in_memory_clients": 0,
            "memory_mb": await services.sessions.run_blocking(_memory_mb),
            "storage_type": options.storage_type,
            "uptime_seconds": round(time.monotonic() - started, 3),
        }
        try:
            parts = await services.ready()
            counts = await services.store.read(lambda tx: (tx.counts.sessions(), len(tx.sandboxes.not_gone())))
        except CarrelError as error:
            return JSONResponse(facts | {"status": "unhealthy", "error": error.message}, status_code=503)
        facts |= {"active_sessions": counts[0], "in_memory_clients": counts[1]}
        ill = ", ".join(name for name, well in parts.items() if not well)
        if ill:
            return JSONResponse(facts | {"status": "unhealthy", "error": f"not working: {ill}"}, status_code=503)
        return JSONResponse(facts)

    return router


def _memory_mb() -> float:
    """What this process and all that descend from it have in memory."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return round(total / _MEBIBYTE, 1)


# ---------------------------------------------------------------------------------------------------------- sessions


def _sessions(services: Services, options: DialectOptions) -> APIRouter:
    router = APIRouter()

    @router.post(
        "",
        status_code=201,
        response_model=SessionResponse,
        responses=_errors(_400="The path is not allowed.", _429="There are as many sessions as may be."),
    )
    async def create_session(body: CreateRequest, caller: Caller) -> SessionResponse:
        """Create a session. No model is asked."""
        owner = _acting_for(caller, body.user_id)
        session = await services.sessions.create(
            owner,
            _spec(body, options),
            max_sessions=DEFAULT_MAX_SESSIONS,
            max_sessions_per_user=DEFAULT_MAX_SESSIONS_PER_USER,
        )
        return _shown(session, options)

    @router.get("", response_model=list[str])
    async def list_sessions(
        caller: Caller, user_id: Annotated[str | None, Query(description="Only this user's.")] = None
    ) -> list[str]:
        """The ids of all sessions, newest first."""
        asking = for_all_users(caller) if user_id is None else _acting_for(caller, user_id)
        return [session.id for session in await all_sessions(services, asking)]

    @router.get("/{session_id}", response_model=SessionResponse, responses=_errors(_404=NOT_FOUND))
    async def get_session(session_id: str, caller: Caller) -> SessionResponse:
        """A session."""
        return _shown(await _found(services, caller, session_id, NOT_FOUND), options)

    @router.delete("/{session_id}", status_code=204, responses=_errors(_404=NOT_FOUND))
    async def delete_session(session_id: str, caller: Caller) -> None:
        """Delete a session for good. Its user's directory stays."""
        try:
            await services.sessions.delete(for_all_users(caller), session_id)
        except SessionNotFound:
            raise HTTPException(404, NOT_FOUND) from None

    @router.post("/{session_id}/resume", response_model=SessionResponse, responses=_errors(_404=GONE))
    async def resume_session(session_id: str, caller: Caller) -> SessionResponse:
        """Make sure that a session can be used. No process is started: the next message does that."""
        session = await _found(services, caller, session_id, GONE)
        if session.status in (SessionStatus.STOPPED, SessionStatus.FAILED):
            session = await services.sessions.resume(for_all_users(caller), session_id)
        return _shown(session, options)

    return router


def _acting_for(caller: Principal, user_id: str) -> Principal:
    """The caller as this user.

    Raises:
        Forbidden: the caller is somebody else, and speaks for nobody but itself.
    """
    if user_id == caller.user:
        return Principal.of_user(user_id) if caller.is_admin else caller
    if not is_trusted(caller):
        raise Forbidden("This key may use its own user's user_id only.")
    return Principal.of_user(user_id).model_copy(update={"name": caller.name})


def _spec(body: CreateRequest, options: DialectOptions) -> CreateSession:
    old = DEFAULT_SPEC | {"ttl_seconds": DEFAULT_TTL_SECONDS}
    spec = {name: value for name, value in old.items() if name not in options.chosen}
    if not options.allow_bypass:
        spec.pop("permission_mode", None)
    return CreateSession(
        **spec, ask_expires_seconds=0, workspace=Workspace(type="user", subdir=body.subdir), metadata=body.metadata
    )


def _shown(session: Session, options: DialectOptions) -> SessionResponse:
    cwd = "/workspace"
    if session.workspace.type == "user":
        cwd = str(options.users_dir / session.owner / (session.workspace.subdir or ""))
    return SessionResponse(
        session_id=session.id,
        user_id=session.owner,
        cwd=cwd,
        created_at=session.created_at,
        last_active_at=session.last_active_at,
        message_count=session.turn_count,
        status="closed" if session.status is SessionStatus.STOPPED else "active",
        metadata=session.metadata,
    )


async def _found(services: Services, caller: Principal, session_id: str, detail: str) -> Session:
    try:
        return await services.sessions.get(for_all_users(caller), session_id)
    except SessionNotFound:
        raise HTTPException(404, detail) from None


async def all_sessions(services: Services, principal: Principal) -> list[Session]:
    """Every session in the caller's sight, newest first."""
    found: list[Session] = []
    cursor: str | None = None
    while True:
        page = await services.sessions.page(principal, status=None, cursor=cursor, limit=_PAGE)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


# -------------------------------------------------------------------------------------------------------------- chat


def _chat(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post(
        "",
        name="create_turn",
        response_model=ChatResponse,
        responses=_errors(_404=GONE, _429=BUSY, _504="It took too long; the session can be used."),
    )
    async def chat(request: Request, body: ChatRequest, caller: Caller) -> ChatResponse:
        """Send a message and wait for the answer."""
        result = await turns.result_of(services, await _send(services, request, caller, body))
        return ChatResponse(
            session_id=body.session_id,
            text=result.text,
            tool_calls=[ToolCall(tool=call.tool, input=call.input) for call in result.tool_calls],
            timestamp=utc_now(),
        )

    @router.post(
        "/stream",
        name="create_turn",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat_stream(request: Request, body: ChatRequest, caller: Caller) -> StreamingResponse:
        """Send a message and watch the answer being made. What goes wrong is told in the stream."""
        try:
            sent = await _send(services, request, caller, body)
        except HTTPException as problem:
            note(request, outcome=problem.status_code)
            return turns.stream(_only(_error(str(problem.detail))))
        except CarrelError as problem:
            note(request, outcome=problem.http_status)
            return turns.stream(_only(_error(problem.message)))

        def frame(piece: Piece) -> Iterable[turns.Json]:
            return _frame(piece, sent)

        return turns.stream(turns.frames_of(services, sent, frame, _error))

    return router


async def _send(services: Services, request: Request, caller: Principal, body: ChatRequest) -> turns.Sent:
    try:
        return await turns.send(
            services,
            request,
            for_all_users(caller),
            body.session_id,
            body.message,
            timeout_seconds=body.timeout_seconds,
            alone=True,
        )
    except SessionNotFound:
        raise HTTPException(404, GONE) from None
    except SessionBusy as error:
        raise HTTPException(429, BUSY, headers={"Retry-After": str(error.retry_after_seconds)}) from None


def _frame(piece: Piece, sent: turns.Sent) -> Iterable[turns.Json]:
    match piece:
        case Text():
            yield _chunk("text_delta", text=piece.text)
        case ToolUse():
            yield _chunk("tool_use", tool_name=piece.name, tool_input=piece.input)
        case End():
            problem = turns.told(piece.data, sent)
            yield _chunk("done") if problem is None else _chunk("error", error=problem)


def _error(message: str) -> Iterable[turns.Json]:
    yield _chunk("error", error=message)


def _chunk(
    type: str,
    *,
    text: str | None = None,
    tool_name: str | None = None,
    tool_input: dict[str, Any] | None = None,
    error: str | None = None,
) -> turns.Json:
    return {"type": type, "text": text, "tool_name": tool_name, "tool_input": tool_input, "error": error}


async def _only(frames: Iterable[turns.Json]) -> AsyncIterator[Iterable[turns.Json]]:
    yield frames
