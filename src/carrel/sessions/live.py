"""What is being said right now: the open blocks of each session, for whoever joins in the middle of a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from carrel import abc
from carrel.protocol.events import Delta, DeltaKind, StoredEvent
from carrel.protocol.link import DeltaFrame, OpenBlock

BlockKey = tuple[str | None, str, int]
"""Thread (the call of a sub-agent, or None), message, block."""

_DELETED = 10_000
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


class _Talk:
    """What is being said in one session: from the start of a turn to its end."""

    __slots__ = ("blocks", "heard", "seq", "turn_id")

    def __init__(self, turn_id: str | None, seq: int | None) -> None:
        self.turn_id = turn_id
        self.seq = seq
        self.heard = False
        self.blocks: dict[BlockKey, _Open] = {}


class Live:
    """Open blocks by session. Publishes deltas; hears of every stored event before the bus does."""

    def __init__(self, bus: abc.EventBus, observer: abc.Observer = abc.Observer()) -> None:
        self._bus = bus
        self._observer = observer
        self.observers: list[Callable[[Sequence[StoredEvent]], None]] = [observer.stored]
        """Told of stored events, right after the commit, in their order; they must be quick and never raise."""
        self._talks: dict[str, _Talk] = {}
        self._deleted: dict[str, None] = {}
        """Sessions whose runner may still be talking; the newest of them."""

    def stored(self, stored: Sequence[StoredEvent]) -> None:
        """Events were committed: blocks that are now in the log are no longer open; everyone is told."""
        for observe in self.observers:
            observe(stored)
        start = 0
        for i, event in enumerate(stored):
            self._hear(event)
            if i + 1 == len(stored) or stored[i + 1].session_id != event.session_id:
                self._bus.publish(event.session_id, stored[start : i + 1])
                start = i + 1

    def _hear(self, event: StoredEvent) -> None:
        talk = self._talks.get(event.session_id)
        if event.type == "turn.started":
            # A new agent takes the turn up: what the lost one had half said is made anew.
            self._reset(event.session_id, talk)
            talk = self._talks[event.session_id] = _Talk(event.turn_id, event.seq)
        if event.type == "session.deleted":
            self._deleted[event.session_id] = None
            if len(self._deleted) > _DELETED:
                del self._deleted[next(iter(self._deleted))]
        if talk is None:
            return
        talk.seq = event.seq
        if event.type in _CLOSING and talk.blocks:
            data = event.data
            talk.blocks.pop(
                (data.get("parent_tool_use_id"), data.get("message_id") or "", data.get("block") or 0), None
            )
        # A queued turn may be cancelled while another one talks: that ends nothing here.
        over = event.type == "turn.completed" and event.turn_id == talk.turn_id
        if over or event.type == "session.deleted":
            del self._talks[event.session_id]

    def _reset(self, session_id: str, talk: _Talk | None) -> None:
        messages = {(key[0], key[1]): block.turn_id for key, block in talk.blocks.items()} if talk else {}
        resets = [
            Delta(
                session_id=session_id,
                turn_id=turn_id,
                kind=DeltaKind.RESET,
                message_id=message_id,
                parent_tool_use_id=parent,
            )
            for (parent, message_id), turn_id in messages.items()
        ]
        if resets:
            self._bus.publish(session_id, resets)

    def deltas(self, session_id: str, frames: Iterable[DeltaFrame]) -> None:
        """Pieces arrived: remember and publish them."""
        if session_id in self._deleted:
            return
        out: list[Delta] = []
        for frame in frames:
            talk = self._talks.get(session_id)
            if talk is None:
                talk = self._talks[session_id] = _Talk(frame.turn_id, None)
            if not talk.heard:
                talk.heard = True
                self._observer.first_delta(session_id, frame.turn_id)
            _take(talk.blocks, frame)
            out.append(_delta(session_id, frame, after=talk.seq))
        self._bus.publish(session_id, out)

    def replace(self, session_id: str, blocks: Iterable[OpenBlock]) -> None:
        """A runner is back and says what it has so far: whoever watches gets what was missed."""
        if session_id in self._deleted:
            return
        talk = self._talks.get(session_id)
        if talk is not None:
            talk.blocks.clear()
        for block in blocks:
            if talk is None:
                talk = self._talks[session_id] = _Talk(block.turn_id, None)
            opened = _Open(block.kind, block.turn_id)
            opened.pieces, opened.length = [block.text], len(block.text)
            talk.blocks[(block.parent_tool_use_id, block.message_id, block.block)] = opened
        if found := self.so_far(session_id):
            self._bus.publish(session_id, found)

    def so_far(self, session_id: str) -> list[Delta]:
        """Every open block of the session as one delta."""
        talk = self._talks.get(session_id)
        return [self._piece(session_id, key, block, 0) for key, block in talk.blocks.items()] if talk else []

    def since(self, session_id: str, key: BlockKey, offset: int) -> Delta | None:
        """What an open block has from `offset` (characters) on."""
        talk = self._talks.get(session_id)
        block = talk.blocks.get(key) if talk else None
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


def _take(blocks: dict[BlockKey, _Open], frame: DeltaFrame) -> None:
    if frame.delta == DeltaKind.RESET:
        for key in [k for k in blocks if k[:2] == (frame.parent_tool_use_id, frame.message_id)]:
            del blocks[key]
        return
    key = (frame.parent_tool_use_id, frame.message_id, frame.block)
    block = blocks.get(key)
    if block is None:
        block = blocks[key] = _Open(frame.delta, frame.turn_id)
    if frame.offset == block.length:
        block.pieces.append(frame.text)
        block.length += len(frame.text)


def _delta(session_id: str, frame: DeltaFrame, *, after: int | None) -> Delta:
    return Delta(
        session_id=session_id,
        turn_id=frame.turn_id,
        kind=frame.delta,
        message_id=frame.message_id,
        block=frame.block,
        offset=frame.offset,
        text=frame.text,
        parent_tool_use_id=frame.parent_tool_use_id,
        after=after,
    )
