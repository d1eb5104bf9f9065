"""Prompts as dialects send them: waited for or streamed, within the time the client allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import HTTPException
from pydantic import PlainSerializer
from pydantic_core import to_json
from starlette.requests import HTTPConnection
from starlette.responses import StreamingResponse

from carrel.api.audit import note
from carrel.api.dependencies import Services
from carrel.api.dialects.pieces import End, Piece, Pieces
from carrel.errors import CarrelError, NothingToInterrupt, SessionFailed, SessionNotFound, all_errors
from carrel.model import Principal, StopReason, Turn, TurnStatus
from carrel.protocol.results import TurnResult
from carrel.protocol.spec import CreateTurn

Json = dict[str, Any]
Moment = Annotated[datetime, PlainSerializer(datetime.isoformat)]
"""A time as the old services wrote it, with a zone that every reader of ISO 8601 knows (`+00:00`, not `Z`)."""

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# Many a client splits a stream at these too (Python's `splitlines` does); JSON alone would let them stand.
_LINE_ENDS = [(mark.encode(), f"\\u{ord(mark):04x}".encode()) for mark in "\x85\u2028\u2029"]
# The turn's own timeout counts from its start and is told from the log; ours, from the request, comes after it.
_TIMEOUT_MARGIN_SECONDS = 0.5
_INTERRUPT_SECONDS = 25.0
_HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Sent:
    """A prompt that was accepted."""

    principal: Principal
    turn: Turn
    before: int
    """The `seq` before its first event: who follows from there misses nothing, however fast the answer is."""
    timeout_seconds: float | None


async def send(
    services: Services,
    request: HTTPConnection,
    principal: Principal,
    session_id: str,
    prompt: str,
    *,
    timeout_seconds: float | None = None,
    alone: bool = False,
) -> Sent:
    """Send a prompt. A session that could not be started before is tried again.

    Args:
        services: what does it.
        request: asks for it; the audit log is told of session and turn.
        principal: for whom.
        session_id: where.
        prompt: its text.
        timeout_seconds: how long the turn may take, waiting included.
        alone: whether it is refused while another one runs.

    Raises:
        SessionNotFound, SessionStopped, SessionBusy, QueueFull, Draining: as `SessionService.create_turn`.
    """
    note(request, session_id=session_id)
    body = CreateTurn(prompt=prompt, timeout_seconds=timeout_seconds, queue_timeout_seconds=timeout_seconds)
    try:
        turn, before = await services.sessions.create_turn(principal, session_id, body, alone=alone)
    except SessionFailed:
        await services.sessions.resume(principal, session_id)
        turn, before = await services.sessions.create_turn(principal, session_id, body, alone=alone)
    note(request, turn_id=turn.id)
    return Sent(principal, turn, before, timeout_seconds)


async def result_of(services: Services, sent: Sent) -> TurnResult:
    """Wait for the turn's end.

    Raises:
        HTTPException: 504, it took too long and was interrupted; 500 or 503, it failed.
        SessionNotFound: the session was deleted meanwhile.
    """
    turn = sent.turn
    waiting = services.sessions.wait_for_turn(sent.principal, turn.session_id, turn.id, after=sent.before)
    try:
        async with asyncio.timeout(_patience(sent)):
            result = await waiting
    except TimeoutError:
        await _end(services, sent)
        raise HTTPException(504, _timed_out(sent)) from None
    problem = problem_of(result.status, result.stop_reason, result.error.code if result.error else None)
    if problem is not None:
        raise HTTPException(problem, result.error.message if result.error and problem != 504 else _timed_out(sent))
    return result


async def pieces_of(services: Services, sent: Sent) -> AsyncGenerator[list[Piece], None]:
    """The turn's pieces as they are made; `End` is the last, unless the session is deleted meanwhile.

    Raises:
        HTTPException: 504, it took too long and was interrupted.
    """
    turn, pieces = sent.turn, Pieces()
    patience = _patience(sent)
    until = None if patience is None else asyncio.get_running_loop().time() + patience
    following = services.sessions.streams.follow(
        turn.session_id, after=sent.before, deltas=True, until_turn=turn.id, heartbeat_seconds=_HEARTBEAT_SECONDS
    )
    async with aclosing(following) as frames:
        while True:
            left = None if until is None else until - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(left):
                    batch = await anext(frames)
            except StopAsyncIteration:
                return
            except TimeoutError:
                break
            if found := pieces.of(batch):
                yield found
    await _end(services, sent)
    raise HTTPException(504, _timed_out(sent))


def problem_of(status: str, stop_reason: str | None, code: str | None) -> int | None:
    """The status of HTTP that tells of a turn that failed; None of one that did not."""
    if status == TurnStatus.EXPIRED or stop_reason == StopReason.TIMEOUT:
        return 504
    if status != TurnStatus.FAILED:
        return None
    known = all_errors().get(code or "")
    return known.http_status if known is not None else 500


def told(end: dict[str, Any], sent: Sent) -> str | None:
    """What a stream says of a turn that failed; None of one that did not."""
    error = end.get("error") or {}
    problem = problem_of(end["status"], end.get("stop_reason"), error.get("code"))
    if problem is None:
        return None
    return _timed_out(sent) if problem == 504 else str(error.get("message") or "The turn failed.")


def encode(frame: Json) -> bytes:
    """The frame as it goes over the wire: in one line, whatever its reader takes for the end of one."""
    line = to_json(frame)
    for character, escape in _LINE_ENDS:
        line = line.replace(character, escape)
    return b"data: %s\n\n" % line


def stream(frames: AsyncIterator[Iterable[Json]]) -> StreamingResponse:
    """Frames of nothing but `data: <json>`."""

    async def encoded() -> AsyncIterator[bytes]:
        async for batch in frames:
            yield b"".join([encode(frame) for frame in batch])

    return StreamingResponse(encoded(), media_type="text/event-stream", headers=_HEADERS)


async def frames_of(
    services: Services,
    sent: Sent,
    frame: Callable[[Piece], Iterable[Json]],
    error: Callable[[str], Iterable[Json]],
) -> AsyncIterator[list[Json]]:
    """The turn's frames.

    Args:
        services: what follows the turn.
        sent: the turn.
        frame: the frames of a piece.
        error: the last frames, where something goes wrong on the way.
    """
    ended = False
    try:
        async with aclosing(pieces_of(services, sent)) as batches:
            async for batch in batches:
                ended = ended or isinstance(batch[-1], End)
                yield [made for piece in batch for made in frame(piece)]
    except HTTPException as problem:
        yield list(error(str(problem.detail)))
        return
    except CarrelError as problem:
        yield list(error(problem.message))
        return
    if not ended:
        yield list(error(SessionNotFound().message))


def _patience(sent: Sent) -> float | None:
    return None if sent.timeout_seconds is None else sent.timeout_seconds + _TIMEOUT_MARGIN_SECONDS


def _timed_out(sent: Sent) -> str:
    return f"Request timed out after {sent.timeout_seconds:g} seconds" if sent.timeout_seconds else "Request timed out"


async def _end(services: Services, sent: Sent) -> None:
    """Have the turn end, and wait for that: the client is told when the session can be used again."""
    turn = sent.turn
    try:
        await services.sessions.interrupt(sent.principal, turn.session_id, turn.id)
    except NothingToInterrupt:
        return
    waiting = services.sessions.wait_for_turn(sent.principal, turn.session_id, turn.id, after=sent.before)
    try:
        async with asyncio.timeout(_INTERRUPT_SECONDS):
            await waiting
    except TimeoutError:
        return  # the runner ends an agent that does not listen; the client has waited for long enough
