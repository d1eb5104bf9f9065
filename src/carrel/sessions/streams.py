"""Following a session: first what is stored, then what happens, with nothing missed and nothing twice.

The bus is a hint and the store the truth: an event whose `seq` is not the next one sends the reader to the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from carrel import abc
from carrel.errors import StoreUnavailable
from carrel.protocol.events import Delta, DeltaKind, StoredEvent
from carrel.sessions.live import BlockKey, Live

_PAGE_EVENTS = 500
_PAGE_BYTES = 1024 * 1024
DEFAULT_BUFFER_BYTES = 4 * 1024 * 1024
_STORE_AWAY_SECONDS = 0.5


class Streams:
    """Follows sessions for any number of viewers."""

    def __init__(
        self,
        store: abc.Store,
        bus: abc.EventBus,
        live: Live,
        *,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        observer: abc.Observer = abc.Observer(),
    ) -> None:
        """Make it over a store and a bus.

        Args:
            store: where the log is.
            bus: what tells of new frames.
            live: the blocks that are being made.
            buffer_bytes: how much waits for a viewer that does not read, before it is sent back to the store.
            observer: told of what viewers are handed.
        """
        self._store = store
        self._bus = bus
        self._live = live
        self._buffer_bytes = buffer_bytes
        self._observer = observer

    async def follow(
        self,
        session_id: str,
        *,
        after: int,
        deltas: bool = False,
        until_turn: str | None = None,
        heartbeat_seconds: float = 15.0,
    ) -> AsyncGenerator[list[abc.Frame], None]:
        """Yield every event with a higher `seq` than `after`, and what comes, in batches.

        An empty batch says that nothing has happened for `heartbeat_seconds`. Ends with the session, or with the end
        of `until_turn`, whose frames alone are then yielded.
        """
        viewer = _Viewer(session_id, after, deltas, until_turn, self._live)
        async with self._bus.subscribe(session_id, max_bytes=self._buffer_bytes) as subscription:
            while not viewer.over:
                try:
                    async for batch in self._catch_up(viewer):
                        yield batch
                except StoreUnavailable:
                    # Whoever has come so far waits for what comes next; a store that is away is one more reason to.
                    yield []
                    await asyncio.sleep(_STORE_AWAY_SECONDS)
                    continue
                if viewer.over:
                    return
                if deltas and (open_ := viewer.take(self._live.so_far(session_id))):
                    yield open_
                viewer.behind = False
                while not viewer.behind and not viewer.over:
                    frames = await subscription.get(heartbeat_seconds)
                    if frames is None:
                        break
                    if not frames:
                        # A bus may lose frames, the last one too: a silence is a reason to ask the store.
                        yield []
                        break
                    if batch := viewer.take(frames):
                        self._observer.delivered(batch)
                        yield batch

    async def _catch_up(self, viewer: _Viewer) -> AsyncIterator[list[abc.Frame]]:
        while True:
            after = viewer.seq
            stored, there = await self._store.read(
                lambda tx, after=after: (  # type: ignore[misc]
                    tx.events.page(viewer.session_id, after=after, limit=_PAGE_EVENTS, max_bytes=_PAGE_BYTES),
                    tx.sessions.get(viewer.session_id) is not None,
                )
            )
            if not stored:
                viewer.over = viewer.over or not there
                return
            if batch := viewer.take(stored):
                yield batch
            if viewer.over:
                return


class _Viewer:
    """What one viewer has seen."""

    def __init__(self, session_id: str, after: int, deltas: bool, until_turn: str | None, live: Live) -> None:
        self.session_id = session_id
        self.seq = after
        self.behind = False
        self.over = False
        self._deltas = deltas
        self._turn = until_turn
        self._live = live
        self._lengths: dict[str | None, dict[BlockKey, int]] = {}

    def take(self, frames: list[StoredEvent] | list[Delta] | list[abc.Frame]) -> list[abc.Frame]:
        """The frames this viewer has not seen, in order; stops at a gap."""
        out: list[abc.Frame] = []
        for frame in frames:
            if isinstance(frame, Delta):
                if not self._deltas:
                    continue
                if frame.after is not None and frame.after != self.seq:
                    # Not its place: an event that this viewer has seen came after it, or one it has not came before.
                    if frame.after > self.seq:
                        self.behind = True
                        return out
                    continue
                if (piece := self._piece(frame)) is not None:
                    out.append(piece)
                continue
            if frame.seq <= self.seq:
                continue
            if frame.seq > self.seq + 1:
                self.behind = True
                return out
            self.seq = frame.seq
            if self._turn is None or frame.turn_id == self._turn:
                out.append(frame)
            if self._ends(frame):
                self.over = True
                return out
        return out

    def _ends(self, event: StoredEvent) -> bool:
        if event.type == "session.deleted":
            return True
        if event.type != "turn.completed":
            return False
        self._lengths.pop(event.turn_id, None)
        return event.turn_id is not None and event.turn_id == self._turn

    def _piece(self, delta: Delta) -> Delta | None:
        if self._turn is not None and delta.turn_id != self._turn:
            return None
        lengths = self._lengths.setdefault(delta.turn_id, {})
        if delta.kind == DeltaKind.RESET:
            for key in [k for k in lengths if k[:2] == (delta.parent_tool_use_id, delta.message_id)]:
                del lengths[key]
            return delta
        key = (delta.parent_tool_use_id, delta.message_id, delta.block)
        seen = lengths.get(key, 0)
        if delta.offset + len(delta.text) <= seen:
            return None
        if delta.offset != seen:
            # Part of it was told before, or some were lost on the way: go on from what was seen.
            missing = self._live.since(self.session_id, key, seen)
            if missing is None:
                return None
            delta = missing
        lengths[key] = delta.offset + len(delta.text)
        return delta
