"""Server-sent events: frames are serialised once and only joined here."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse

from carrel import abc

HEARTBEAT = b": still here\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def wanted(request: Request) -> bool:
    """Whether the caller asks for an event stream."""
    return "text/event-stream" in request.headers.get("accept", "")


def response(batches: AsyncIterator[list[abc.Frame]], *, headers: dict[str, str] | None = None) -> StreamingResponse:
    """A stream of the frames; an empty batch becomes a heartbeat."""
    return StreamingResponse(_encode(batches), media_type="text/event-stream", headers=_HEADERS | (headers or {}))


async def _encode(batches: AsyncIterator[list[abc.Frame]]) -> AsyncIterator[bytes]:
    # Said at once, so that the client knows it is connected before anything happens.
    yield HEARTBEAT
    async for batch in batches:
        yield b"".join([frame.sse() for frame in batch]) if batch else HEARTBEAT
