"""Follows the agent's messages while they are made: which block each piece belongs to, and the text so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from carrel.protocol.events import DeltaKind
from carrel.protocol.link import DeltaFrame, OpenBlock

_KINDS = {
    "text_delta": (DeltaKind.TEXT, "text"),
    "thinking_delta": (DeltaKind.THINKING, "thinking"),
    "input_json_delta": (DeltaKind.TOOL_INPUT, "partial_json"),
}


@dataclass
class _Block:
    kind: str
    index: int
    pieces: list[str] = field(default_factory=list)
    length: int = 0


@dataclass
class _Message:
    id: str
    finished: int = 0
    open: dict[int, _Block] = field(default_factory=dict)


class Blocks:
    """The messages being made, one per thread (the main one and each sub-agent's)."""

    def __init__(self) -> None:
        self._messages: dict[str | None, _Message] = {}

    def piece(self, event: dict[str, Any], parent: str | None, turn_id: str | None) -> DeltaFrame | None:
        """Take a stream event of the Messages API; the delta to send for it, if any."""
        kind = event.get("type")
        if kind == "message_start":
            self._messages[parent] = _Message(str(event["message"]["id"]))
            return None
        message = self._messages.get(parent)
        if message is None or kind != "content_block_delta":
            return None
        known = _KINDS.get(event["delta"].get("type"))
        if known is None:
            return None
        delta_kind, key = known
        index = int(event["index"])
        block = message.open.get(index)
        if block is None:
            block = message.open[index] = _Block(delta_kind, index)
        text = whole_text(event["delta"].get(key) or "")
        if not text:
            return None
        frame = DeltaFrame(
            delta=delta_kind,
            turn_id=turn_id,
            message_id=message.id,
            block=index,
            offset=block.length,
            text=text,
            parent_tool_use_id=parent,
        )
        block.pieces.append(text)
        block.length += len(text)
        return frame

    def finish(self, message_id: str | None, parent: str | None) -> int:
        """A block of the message is finished: which one it is."""
        message = self._messages.get(parent)
        if message is None or message.id != message_id:
            message = self._messages[parent] = _Message(message_id or "")
        index = message.finished
        message.finished += 1
        message.open.pop(index, None)
        return index

    def reset(self, turn_id: str | None) -> list[DeltaFrame]:
        """Every message with open blocks has to be made anew: the deltas that say so."""
        frames = []
        for parent, message in self._messages.items():
            if message.open:
                frames.append(
                    DeltaFrame(delta=DeltaKind.RESET, turn_id=turn_id, message_id=message.id, parent_tool_use_id=parent)
                )
                message.open.clear()
        return frames

    def open_blocks(self, turn_id: str | None) -> list[OpenBlock]:
        """The text so far of every open block."""
        found = []
        for parent, message in self._messages.items():
            for block in message.open.values():
                block.pieces = ["".join(block.pieces)]
                found.append(
                    OpenBlock(
                        turn_id=turn_id,
                        kind=block.kind,
                        message_id=message.id,
                        block=block.index,
                        text=block.pieces[0],
                        parent_tool_use_id=parent,
                    )
                )
        return found

    def clear(self) -> None:
        """The turn is over: nothing is open."""
        self._messages.clear()


def whole_text(text: str) -> str:
    """The text with every half of a surrogate pair replaced, so that it can be written as UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def whole(value: Any) -> Any:
    """The JSON value with `whole_text` done to every text in it."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {whole_text(key): whole(item) for key, item in value.items()}
    return value
