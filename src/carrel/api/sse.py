"""Server-sent events: frames are serialised once and only joined here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import StreamingResponse

from carrel import abc
from carrel.protocol.events import PendingInteraction

HEARTBEAT = b": still here\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def wanted(request: Request) -> bool:
    """Whether the caller asks for an event stream."""
    return "text/event-stream" in request.headers.get("accept", "")


def response(
    batches: AsyncIterator[list[abc.Frame]],
    *,
    first: Sequence[PendingInteraction] = (),
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """A stream of the frames, behind those that are told first; an empty batch becomes a heartbeat."""
    return StreamingResponse(
        _encode(batches, first), media_type="text/event-stream", headers=_HEADERS | (headers or {})
    )


async def _encode(batches: AsyncIterator[list[abc.Frame]], first: Sequence[PendingInteraction]) -> AsyncIterator[bytes]:
    # Said at once, so that the client knows it is connected before anything happens.
    yield HEARTBEAT + b"".join([each.sse() for each in first])
    async for batch in batches:
        yield b"".join([frame.sse() for frame in batch]) if batch else HEARTBEAT
