"""Server-sent events: frames are serialised once and only joined here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import StreamingResponse

HEARTBEAT = b": still here\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Frame(Protocol):
    """Something that knows how it looks in a stream."""

    def sse(self) -> bytes:
        """As a frame of a server-sent event stream."""


def wanted(request: Request) -> bool:
    """Whether the caller asks for an event stream."""
    return "text/event-stream" in request.headers.get("accept", "")


def response(
    batches: AsyncIterator[Sequence[Frame]],
    *,
    first: Sequence[Frame] = (),
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """A stream of the frames, behind those that are told first; an empty batch becomes a heartbeat."""
    return StreamingResponse(_encode(batches, first), media_type="text/event-stream", headers=HEADERS | (headers or {}))


async def _encode(batches: AsyncIterator[Sequence[Frame]], first: Sequence[Frame]) -> AsyncIterator[bytes]:
    # Said at once, so that the client knows it is connected before anything happens.
    yield HEARTBEAT + b"".join([each.sse() for each in first])
    async for batch in batches:
        yield b"".join([frame.sse() for frame in batch]) if batch else HEARTBEAT
