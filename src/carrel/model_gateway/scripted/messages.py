"""Turns a reply into a Messages answer: one JSON object, or the events of a stream.

Frames are built by hand where there are many of them: a count of 20,000 is 20,000 events.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from carrel.model_gateway.scripted.errors import ApiError, error_body, new_id
from carrel.model_gateway.scripted.reply import Reply
from carrel.model_gateway.scripted.steps import (
    SPEECH,
    Call,
    Calls,
    Count,
    Drop,
    Fail,
    Malformed,
    Repeat,
    Say,
    Speech,
    Step,
    Think,
    Wait,
)
from carrel.model_gateway.scripted.usage import OPENING_TOKENS, InputTokens, output_tokens

PING_SECONDS = 5.0
"""How long a stream may be silent before it pings."""
REPEAT_DELTA_CHARACTERS = 16 * 1024
BROKEN_OFF = "This answer breaks off he"
"""What a stream says before it drops, if its script gave it nothing to say."""

_WORDS = re.compile(r"\S*\s*")
_DELTA_CHARACTERS = 24
_CHUNK_FRAMES = 128
_CHUNK_BYTES = 64 * 1024


class StreamDropped(Exception):
    """The connection is to close here, in the middle of the answer."""


@dataclass(frozen=True)
class Message:
    """One answer about to be given."""

    model: str
    reply: Reply
    input: InputTokens
    id: str = field(default_factory=lambda: new_id("msg"))

    def envelope(self, content: list[dict[str, Any]], stop_reason: str | None, tokens: int) -> dict[str, Any]:
        """The message object, empty at the start of a stream or whole without one."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": self.input.usage(tokens),
        }

    def whole(self) -> dict[str, Any]:
        """The answer without streaming."""
        content = [block for step in self.reply.steps for block in _blocks(step)]
        return self.envelope(content, self.reply.stop_reason, output_tokens(self.reply.steps))

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, several to a chunk; raises `StreamDropped` where the script says so."""
        batch = _Batch()
        batch.add(frame("message_start", {"message": self.envelope([], None, OPENING_TOKENS)}))
        batch.add(_PING)
        index = 0
        steps = self.reply.steps
        for step, following in zip(steps, (*steps[1:], None), strict=True):
            if isinstance(step, Wait):
                yield batch.take()
                async for ping in _pause(step.seconds):
                    yield ping
            elif isinstance(step, Fail | Drop | Malformed):
                for piece in _break(step, index):
                    batch.add(piece)
                yield batch.take()
                if isinstance(step, Drop):
                    raise StreamDropped
                return
            elif isinstance(step, Count) and step.rate:
                yield batch.take()
                async for piece in _paced(step, step.rate, index):
                    yield piece
                batch.add(b"" if isinstance(following, Drop) else _block_stop(index))
                index += 1
            else:
                for block in _frames(step, index, left_open=isinstance(following, Drop)):
                    if batch.add(block):
                        yield batch.take()
                        await asyncio.sleep(0)  # a long answer must not keep others waiting
                index += len(step.calls) if isinstance(step, Calls) else 1
        batch.add(self._ending())
        yield batch.take()

    def _ending(self) -> bytes:
        usage = self.input.usage(output_tokens(self.reply.steps))
        delta = {"stop_reason": self.reply.stop_reason, "stop_sequence": None}
        return frame("message_delta", {"delta": delta, "usage": usage}) + frame("message_stop", {})


def frame(kind: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {kind}\ndata: {_json({'type': kind, **data})}\n\n".encode("utf-8", "replace")


class _Batch:
    """Frames on their way into one chunk."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> bool:
        """Whether it is time to take what is here."""
        self._frames.append(piece)
        self._size += len(piece)
        return len(self._frames) >= _CHUNK_FRAMES or self._size >= _CHUNK_BYTES

    def take(self) -> bytes:
        chunk = b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        return chunk


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_PING = frame("ping", {})


async def _pause(seconds: float) -> AsyncIterator[bytes]:
    """Sleeps, with a ping as often as a long silence wants one."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while (left := end - loop.time()) > 0:
        await asyncio.sleep(min(left, PING_SECONDS))
        if left > PING_SECONDS:
            yield _PING


async def _paced(step: Count, rate: float, index: int) -> AsyncIterator[bytes]:
    """The numbers of a count, each at its time; a slow clock gets those that are overdue in one chunk."""
    loop = asyncio.get_running_loop()
    begin, sent = loop.time(), 0
    frames = _text_frames(_numbers(step.to), index)
    yield _block_start(index, {"type": "text", "text": ""})
    while sent < step.to:
        due = min(step.to, int((loop.time() - begin) * rate) + 1)
        if due > sent:
            yield b"".join(next(frames) for _ in range(due - sent))
            sent = due
        await asyncio.sleep(max(0.0, begin + sent / rate - loop.time()))


def _frames(step: Step, index: int, *, left_open: bool) -> Iterator[bytes]:
    """All events of the blocks of one step; `left_open` leaves the end of the block out."""
    if isinstance(step, Calls):
        for offset, call in enumerate(step.calls):
            yield from _call_frames(call, index + offset)
        return
    if isinstance(step, Think):
        yield from _think_frames(step, index)
    elif isinstance(step, SPEECH):
        yield _block_start(index, {"type": "text", "text": ""})
        yield from _text_frames(_deltas(step), index)
    if not left_open:
        yield _block_stop(index)


def _text_frames(texts: Iterator[str], index: int) -> Iterator[bytes]:
    head = f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},"delta":'
    head += '{"type":"text_delta","text":'
    for text in texts:
        yield f"{head}{json.dumps(text, ensure_ascii=False)}}}}}\n\n".encode("utf-8", "replace")


def _call_frames(call: Call, index: int) -> Iterator[bytes]:
    yield _block_start(index, {"type": "tool_use", "id": new_id("toolu"), "name": call.name, "input": {}})
    text = _json(call.input)
    size = max(32, len(text) // 64)
    for at in range(0, len(text), size):
        yield _delta(index, {"type": "input_json_delta", "partial_json": text[at : at + size]})
    yield _block_stop(index)


def _think_frames(step: Think, index: int) -> Iterator[bytes]:
    yield _block_start(index, {"type": "thinking", "thinking": "", "signature": ""})
    for text in _in_words(step.text):
        yield _delta(index, {"type": "thinking_delta", "thinking": text})
    yield _delta(index, {"type": "signature_delta", "signature": _signature(step.text)})


def _break(step: Fail | Drop | Malformed, index: int) -> Iterator[bytes]:
    """What a fault puts into a stream. A drop closes the line after an unfinished text block."""
    if isinstance(step, Fail):
        yield frame("error", error_body(ApiError(step.status, step.message), new_id("req")))
    elif isinstance(step, Malformed):
        yield b'event: content_block_delta\ndata: {"type":"content_block_delta","index":\n\n'
    elif index == 0:
        yield _block_start(0, {"type": "text", "text": ""})
        yield from _text_frames(_in_words(BROKEN_OFF), 0)


def _block_start(index: int, block: Mapping[str, Any]) -> bytes:
    return frame("content_block_start", {"index": index, "content_block": block})


def _delta(index: int, delta: Mapping[str, Any]) -> bytes:
    return frame("content_block_delta", {"index": index, "delta": delta})


def _block_stop(index: int) -> bytes:
    return frame("content_block_stop", {"index": index})


def _deltas(step: Speech) -> Iterator[str]:
    if isinstance(step, Say):
        return _in_words(step.text)
    return _numbers(step.to) if isinstance(step, Count) else _repeated(step)


def _numbers(to: int) -> Iterator[str]:
    return (f"{number} " for number in range(1, to + 1))


def _in_words(text: str) -> Iterator[str]:
    """Pieces of a few words each; nothing is lost between them."""
    piece = ""
    for word in _WORDS.findall(text):
        piece += word
        if len(piece) >= _DELTA_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece


def _repeated(step: Repeat) -> Iterator[str]:
    """The text over and over, in pieces of a moderate size, the last one cut to the byte where characters allow."""
    unit = step.text * max(1, REPEAT_DELTA_CHARACTERS // len(step.text))
    data = unit.encode("utf-8", "replace")
    for _ in range(step.size_bytes // len(data)):
        yield unit
    if rest := data[: step.size_bytes % len(data)].decode("utf-8", "ignore"):
        yield rest


def _signature(text: str) -> str:
    return base64.b64encode(hashlib.sha512(text.encode("utf-8", "replace")).digest()).decode()


def _blocks(step: Step) -> list[dict[str, Any]]:
    if isinstance(step, SPEECH):
        return [{"type": "text", "text": "".join(_deltas(step))}]
    if isinstance(step, Think):
        return [{"type": "thinking", "thinking": step.text, "signature": _signature(step.text)}]
    if isinstance(step, Calls):
        return [{"type": "tool_use", "id": new_id("toolu"), "name": c.name, "input": dict(c.input)} for c in step.calls]
    return []
