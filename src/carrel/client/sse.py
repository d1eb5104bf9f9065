"""Reads server-sent events from bytes, however they are cut. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Decoder", "Message"]

# Of bytes, not of text: a JSON string may hold characters that Python's `splitlines` takes for the end of a line.
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Message:
    """One event of the stream, as it was sent."""

    event: str
    data: bytes
    id: str | None


class Decoder:
    """Takes bytes as they come, and gives the messages that are whole. What is not whole at the end is never given."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._after_return = False
        self._event = ""
        self._data: list[bytes] = []
        self._id: str | None = None

    def feed(self, chunk: bytes) -> list[Message]:
        """The messages that this chunk completes."""
        if self._after_return and chunk:
            self._after_return = False
            chunk = chunk.removeprefix(b"\n")
        if not chunk:
            return []
        self._after_return = chunk.endswith(b"\r")
        first, *rest = _LINE_END.split(chunk)
        self._line += first
        found: list[Message] = []
        for piece in rest:
            message = self._take(bytes(self._line))
            if message is not None:
                found.append(message)
            self._line = bytearray(piece)
        return found

    def _take(self, line: bytes) -> Message | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode()
        elif name == b"id":
            self._id = value.decode()
        return None  # what has no name is a comment: the server's heartbeat

    def _dispatch(self) -> Message | None:
        message = Message(self._event or "message", b"\n".join(self._data), self._id) if self._data else None
        self._event, self._data, self._id = "", [], None
        return message
