"""A turn as a client sees it that can only append: pieces of text and thinking as they are made, calls, the end.

A delta and the event that ends its block say the same text; here it comes once. Deltas may be lost: the event then
brings what is missing. A message that has to be made anew cannot be taken back from a client that only appends: where
the new one begins as the old one did, what the client has already is left out; where it does not, the new one follows
whole, behind a blank line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from carrel import abc
from carrel.protocol.events import Delta, DeltaKind

_ANEW = "\n\n"


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """More of the thinking."""

    text: str


@dataclass(frozen=True)
class ToolUse:
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


@dataclass(frozen=True)
class End:
    """The turn is over; `data` is what `turn.completed` says."""

    data: dict[str, Any]


Piece = Text | Thinking | ToolUse | End


@dataclass
class _Voice:
    """One kind of text of the main thread."""

    open: dict[tuple[str, int], str] = field(default_factory=dict)
    """What was said of blocks that are not finished."""
    stale: str = ""
    """What the client has of a message that is being made anew."""
    fresh: str = ""
    """What the new one has so far that the client has already."""

    def piece(self, key: tuple[str, int], text: str) -> str:
        """Take a delta. Answers what to show."""
        self.open[key] = self.open.get(key, "") + text
        return self._show(text)

    def finish(self, key: tuple[str, int], text: str) -> str:
        """Take a finished block. Answers what of it was not shown."""
        if key not in self.open:
            # Blocks are counted as they are finished; one that never is shifts the count.
            key = min((k for k, said in self.open.items() if k[0] == key[0] and text.startswith(said)), default=key)
        said = self.open.pop(key, "")
        if not text.startswith(said):
            self._recall(said)
            return self._show(text)
        return self._show(text[len(said) :])

    def reset(self, message_id: str) -> None:
        """A message has to be made anew."""
        keys = sorted(key for key in self.open if key[0] == message_id)
        self._recall("".join(self.open.pop(key) for key in keys))

    def _recall(self, said: str) -> None:
        # While a second message is still within what the client has of the first, it has seen nothing of it.
        self.stale, self.fresh = self.stale or said, ""

    def _show(self, text: str) -> str:
        if not self.stale:
            return text
        self.fresh += text
        if self.stale.startswith(self.fresh):
            return ""
        goes_on = self.fresh.startswith(self.stale)
        shown = self.fresh[len(self.stale) :] if goes_on else _ANEW + self.fresh
        self.stale = self.fresh = ""
        return shown


class Pieces:
    """Makes pieces of one turn's frames. What sub-agents say is left out; their calls are not."""

    def __init__(self) -> None:
        self._text = _Voice()
        self._thinking = _Voice()

    def of(self, frames: Iterable[abc.Frame]) -> list[Piece]:
        """The pieces of these frames, in order; text that follows text is one piece."""
        found: list[Piece] = []
        for frame in frames:
            piece = self._delta(frame) if isinstance(frame, Delta) else self._event(frame)
            if piece is None:
                continue
            last = found[-1] if found else None
            if isinstance(piece, Text) and isinstance(last, Text):
                found[-1] = Text(last.text + piece.text)
            elif isinstance(piece, Thinking) and isinstance(last, Thinking):
                found[-1] = Thinking(last.text + piece.text)
            else:
                found.append(piece)
        return found

    def _delta(self, delta: Delta) -> Piece | None:
        if delta.parent_tool_use_id is not None:
            return None
        key = (delta.message_id, delta.block)
        if delta.kind == DeltaKind.TEXT:
            return _text(self._text.piece(key, delta.text))
        if delta.kind == DeltaKind.THINKING:
            return _thinking(self._thinking.piece(key, delta.text))
        if delta.kind == DeltaKind.RESET:
            self._text.reset(delta.message_id)
            self._thinking.reset(delta.message_id)
        return None

    def _event(self, event: abc.Frame) -> Piece | None:
        assert not isinstance(event, Delta)
        if event.type == "turn.completed":
            return End(event.data)
        if event.type == "tool.called":
            data = event.data
            return ToolUse(data["id"], data["tool"], data["input"])
        if event.type not in ("message.assistant", "thinking"):
            return None
        data = event.data
        if data.get("parent_tool_use_id") is not None:
            return None
        key = (data["message_id"], data["block"])
        if event.type == "thinking":
            return _thinking(self._thinking.finish(key, data["text"]))
        return _text(self._text.finish(key, data["text"]))


def _text(text: str) -> Text | None:
    return Text(text) if text else None


def _thinking(text: str) -> Thinking | None:
    return Thinking(text) if text else None
