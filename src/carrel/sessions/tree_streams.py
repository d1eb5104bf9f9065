"""Following a whole tree as one stream: every event of the session and of all below it, each with its session's id.

A cursor stands for how far each session of the tree was read. What comes later of each session comes after it, in its own
order; between two sessions no order is promised.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import uuid
from collections.abc import AsyncIterator, Mapping

from carrel import abc
from carrel.errors import InvalidCursor, SessionNotFound
from carrel.model import Principal
from carrel.protocol.events import StoredEvent
from carrel.sessions.streams import Streams

__all__ = ["TreeEvent", "TreeStreams", "cursor_of", "places_of"]

_ID_BYTES, _SEQ_BYTES = 16, 6
_MOST_BATCHES = 64

Places = Mapping[str, int]
"""How far each session was read: its id, and the `seq` of its last event."""


def cursor_of(places: Places) -> str:
    """The places as one text."""
    parts = [uuid.UUID(name).bytes + seq.to_bytes(_SEQ_BYTES, "big") for name, seq in places.items() if seq]
    return base64.urlsafe_b64encode(b"".join(parts)).decode().rstrip("=")


def places_of(cursor: str | None) -> dict[str, int]:
    """The places of such a text; none of None. Raises InvalidCursor."""
    if not cursor:
        return {}
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidCursor(operator_detail=repr(cursor)[:200]) from error
    size = _ID_BYTES + _SEQ_BYTES
    if len(raw) % size:
        raise InvalidCursor
    parts = [raw[start : start + size] for start in range(0, len(raw), size)]
    return {str(uuid.UUID(bytes=part[:_ID_BYTES])): int.from_bytes(part[_ID_BYTES:], "big") for part in parts}


class TreeEvent:
    """An event of one session of a tree, with the cursor behind it."""

    __slots__ = ("cursor", "event")

    def __init__(self, event: StoredEvent, cursor: str) -> None:
        self.event = event
        self.cursor = cursor

    def json(self) -> bytes:
        """The event as one JSON object; beside its own fields it has `session_id`."""
        return b'{"session_id":"%s",' % self.event.session_id.encode() + self.event.json()[1:]

    def sse(self) -> bytes:
        """The event as a frame of a server-sent event stream, whose id is the cursor."""
        return b"id: %s\nevent: %s\ndata: %s\n\n" % (self.cursor.encode(), self.event.type.encode(), self.json())


class TreeStreams:
    """Follows trees for any number of viewers."""

    def __init__(self, store: abc.Store, streams: Streams) -> None:
        """Make it over the streams of single sessions."""
        self._store = store
        self._streams = streams

    async def page(self, principal: Principal, session_id: str, *, after: str | None, limit: int) -> list[TreeEvent]:
        """The next stored events, by their times; fewer than `limit` where there are no more. Raises InvalidCursor."""
        places = places_of(after)

        def work(tx: abc.Transaction) -> list[StoredEvent]:
            found: list[StoredEvent] = []
            for name in _members(tx, principal, session_id):
                found += tx.events.page(name, after=places.get(name, 0), limit=limit)
            return sorted(found, key=lambda event: event.at)[:limit]

        out = []
        for event in _each_in_its_order(await self._store.read(work)):
            places[event.session_id] = event.seq
            out.append(TreeEvent(event, cursor_of(places)))
        return out

    async def follow(
        self, principal: Principal, session_id: str, *, after: str | None, heartbeat_seconds: float
    ) -> AsyncIterator[list[TreeEvent]]:
        """Yield what is behind the cursor, and what comes, until the session is deleted; an empty batch is a heartbeat.

        Raises:
            InvalidCursor: the cursor is none.
            SessionNotFound: there is no such session for the caller.
        """
        places = places_of(after)
        members = await self._store.read(lambda tx: _members(tx, principal, session_id))
        batches: asyncio.Queue[list[StoredEvent] | None] = asyncio.Queue(_MOST_BATCHES)
        tasks: dict[str, asyncio.Task[None]] = {}

        async def read(name: str) -> None:
            stream = self._streams.follow(name, after=places.get(name, 0), heartbeat_seconds=heartbeat_seconds)
            async with contextlib.aclosing(stream):
                async for batch in stream:
                    await batches.put([frame for frame in batch if isinstance(frame, StoredEvent)])
            if name == session_id:
                await batches.put(None)

        def begin(name: str) -> None:
            if name not in tasks:
                tasks[name] = asyncio.create_task(read(name), name=f"tree {name}")

        for name in members:
            begin(name)
        try:
            while (batch := await batches.get()) is not None:
                out = []
                for event in batch:
                    if event.type == "child.created":
                        begin(event.data["child_session_id"])
                    places[event.session_id] = event.seq
                    out.append(TreeEvent(event, cursor_of(places)))
                yield out
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)


def _members(tx: abc.Transaction, principal: Principal, session_id: str) -> list[str]:
    session = tx.sessions.get(session_id)
    if session is None or not principal.may_see(session):
        raise SessionNotFound
    return [session_id, *(each.id for each in tx.trees.below(session_id))]


def _each_in_its_order(events: list[StoredEvent]) -> list[StoredEvent]:
    """The same, where clocks that were set back have put a later event of a session before an earlier one."""
    waiting: dict[str, list[StoredEvent]] = {}
    for event in events:
        waiting.setdefault(event.session_id, []).append(event)
    for each in waiting.values():
        each.sort(key=lambda event: event.seq, reverse=True)
    return [waiting[event.session_id].pop() for event in events]
