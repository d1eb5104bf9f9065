"""What is being said right now: the open blocks of each session, for whoever joins in the middle of a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from carrel import abc
from carrel.protocol.events import Delta, DeltaKind, StoredEvent
from carrel.protocol.link import DeltaFrame, OpenBlock

BlockKey = tuple[str | None, str, int]
"""Thread (the call of a sub-agent, or None), message, block."""

_CLOSING = frozenset({"message.assistant", "thinking", "tool.called"})


class _Open:
    __slots__ = ("kind", "length", "pieces", "turn_id")

    def __init__(self, kind: str, turn_id: str | None) -> None:
        self.kind = kind
        self.turn_id = turn_id
        self.pieces: list[str] = []
        self.length = 0

    def text(self) -> str:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""


class Live:
    """Open blocks by session. Publishes deltas; hears of every stored event before the bus does."""

    def __init__(self, bus: abc.EventBus) -> None:
        self._bus = bus
        self._open: dict[str, dict[BlockKey, _Open]] = {}

    def stored(self, stored: Sequence[StoredEvent]) -> None:
        """Events were committed: blocks that are now in the log are no longer open; everyone is told."""
        start = 0
        for i, event in enumerate(stored):
            if event.type in _CLOSING:
                self._close(event)
            elif event.type in ("turn.completed", "session.deleted"):
                self._open.pop(event.session_id, None)
            if i + 1 == len(stored) or stored[i + 1].session_id != event.session_id:
                self._bus.publish(event.session_id, stored[start : i + 1])
                start = i + 1

    def _close(self, event: StoredEvent) -> None:
        blocks = self._open.get(event.session_id)
        if not blocks:
            return
        data = event.data
        blocks.pop((data.get("parent_tool_use_id"), data.get("message_id") or "", data.get("block") or 0), None)
        if not blocks:
            del self._open[event.session_id]

    def deltas(self, session_id: str, frames: Iterable[DeltaFrame]) -> None:
        """Pieces arrived: remember and publish them."""
        out: list[Delta] = []
        blocks = self._open.setdefault(session_id, {})
        for frame in frames:
            if frame.delta == DeltaKind.RESET:
                for key in [k for k in blocks if k[:2] == (frame.parent_tool_use_id, frame.message_id)]:
                    del blocks[key]
            else:
                key = (frame.parent_tool_use_id, frame.message_id, frame.block)
                block = blocks.get(key)
                if block is None:
                    block = blocks[key] = _Open(frame.delta, frame.turn_id)
                if frame.offset == block.length:
                    block.pieces.append(frame.text)
                    block.length += len(frame.text)
            out.append(_delta(session_id, frame))
        if not blocks:
            self._open.pop(session_id, None)
        self._bus.publish(session_id, out)

    def replace(self, session_id: str, blocks: Iterable[OpenBlock]) -> None:
        """A runner is back and says what it has so far: whoever watches gets what was missed."""
        self._open.pop(session_id, None)
        for block in blocks:
            opened = _Open(block.kind, block.turn_id)
            opened.pieces, opened.length = [block.text], len(block.text)
            here = self._open.setdefault(session_id, {})
            here[(block.parent_tool_use_id, block.message_id, block.block)] = opened
        if session_id in self._open:
            self._bus.publish(session_id, self.so_far(session_id))

    def so_far(self, session_id: str) -> list[Delta]:
        """Every open block of the session as one delta."""
        return [self._piece(session_id, key, block, 0) for key, block in self._open.get(session_id, {}).items()]

    def since(self, session_id: str, key: BlockKey, offset: int) -> Delta | None:
        """What an open block has from `offset` (characters) on."""
        block = self._open.get(session_id, {}).get(key)
        return None if block is None or block.length <= offset else self._piece(session_id, key, block, offset)

    def _piece(self, session_id: str, key: BlockKey, block: _Open, offset: int) -> Delta:
        return Delta(
            session_id=session_id,
            turn_id=block.turn_id,
            kind=block.kind,
            message_id=key[1],
            block=key[2],
            offset=offset,
            text=block.text()[offset:],
            parent_tool_use_id=key[0],
        )


def _delta(session_id: str, frame: DeltaFrame) -> Delta:
    return Delta(
        session_id=session_id,
        turn_id=frame.turn_id,
        kind=frame.delta,
        message_id=frame.message_id,
        block=frame.block,
        offset=frame.offset,
        text=frame.text,
        parent_tool_use_id=frame.parent_tool_use_id,
    )
