"""A conversation as a reader wants it: whole messages, put together from the event log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from carrel.model import Frozen
from carrel.protocol.events import StoredEvent

__all__ = ["Conversation", "Message", "says"]


class Message(Frozen):
    """What somebody said, with all that belongs to it."""

    id: str = Field(description="The model's message, or one of ours where a person or a tool speaks.")
    seq: int = Field(description="The number of its first event: the `after` with which to go on reading.")
    turn_id: str | None
    role: Literal["user", "assistant"] = Field(description="`user` also where tools give their results.")
    at: datetime
    content: list[dict[str, Any]] = Field(
        description="Blocks in the shape of the Messages API: `text`, `thinking`, `tool_use`, `tool_result`, and what "
        "a prompt had besides."
    )
    model: str | None = None
    parent_tool_use_id: str | None = Field(
        default=None, description="The call of the sub-agent that speaks or is told."
    )
    complete: bool = Field(description="False while more may be added to it: its turn is at work.")


@dataclass
class _Open:
    seq: int
    id: str
    turn_id: str | None
    role: Literal["user", "assistant"]
    at: datetime
    parent: str | None
    model: str | None = None
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    def message(self) -> Message:
        return Message(
            id=self.id,
            seq=self.seq,
            turn_id=self.turn_id,
            role=self.role,
            at=self.at,
            content=[self.blocks[index] for index in sorted(self.blocks)],
            model=self.model,
            parent_tool_use_id=self.parent,
            complete=self.complete,
        )


class Conversation:
    """Puts messages together from events, taken in the order of the log.

    Each sub-agent speaks in a thread of its own beside the main one. The blocks of an answer may come with other
    threads' and with results of its first calls in between; it is over when its thread goes on, or the turn ends.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        """Begin with no message; `thinking`: whether thinking is part of it."""
        self._thinking = thinking
        self._open: list[_Open] = []
        self._answers: dict[str | None, _Open] = {}
        self._results: dict[str | None, _Open] = {}

    def take(self, event: StoredEvent) -> None:
        """Take the next event."""
        match event.type:
            case "message.assistant":
                data = event.data
                answer = self._answer(event, data)
                answer.model = data.get("model") or answer.model
                self._add(answer, data.get("block"), {"type": "text", "text": data["text"]})
            case "thinking":
                data = event.data
                answer = self._answer(event, data)
                if self._thinking:
                    self._add(answer, data.get("block"), {"type": "thinking", "thinking": data["text"]})
            case "tool.called":
                data = event.data
                block = {"type": "tool_use", "id": data["id"], "name": data["tool"], "input": data["input"]}
                self._add(self._answer(event, data), data.get("block"), block)
            case "tool.finished":
                self._finished(event, event.data)
            case "message.user":
                data = event.data
                self._close(data.get("parent_tool_use_id"))
                said = self._begin(event, data, "user", None)
                said.blocks = dict(enumerate(data["content"]))
                said.complete = True
            case "turn.started" | "turn.completed":
                for thread in {*self._answers, *self._results}:
                    self._close(thread)

    def ready(self) -> list[Message]:
        """Take the messages off the front that are complete and come before any that is not."""
        found: list[Message] = []
        while self._open and self._open[0].complete:
            found.append(self._open.pop(0).message())
        return [message for message in found if message.content]

    def rest(self) -> list[Message]:
        """The messages that are left when the log has come to its end."""
        return [message for message in (each.message() for each in self._open) if message.content]

    def _answer(self, event: StoredEvent, data: dict[str, Any]) -> _Open:
        thread, message_id = data.get("parent_tool_use_id"), data.get("message_id")
        answer = self._answers.get(thread)
        if answer is not None and message_id and answer.id == message_id:
            return answer
        self._close(thread)
        answer = self._answers[thread] = self._begin(event, data, "assistant", message_id)
        return answer

    def _finished(self, event: StoredEvent, data: dict[str, Any]) -> None:
        thread = data.get("parent_tool_use_id")
        results = self._results.get(thread)
        if results is None:
            results = self._results[thread] = self._begin(event, data, "user", None)
        result = {
            "type": "tool_result",
            "tool_use_id": data["id"],
            "content": data.get("result"),
            "is_error": bool(data.get("is_error")),
        }
        self._add(results, None, result)

    def _begin(
        self, event: StoredEvent, data: dict[str, Any], role: Literal["user", "assistant"], message_id: str | None
    ) -> _Open:
        begun = _Open(
            seq=event.seq,
            id=message_id or f"m{event.seq}",
            turn_id=event.turn_id,
            role=role,
            at=event.at,
            parent=data.get("parent_tool_use_id"),
        )
        self._open.append(begun)
        return begun

    def _add(self, message: _Open, index: int | None, block: dict[str, Any]) -> None:
        if index is None or index in message.blocks:
            index = max(message.blocks, default=-1) + 1
        message.blocks[index] = block

    def _close(self, thread: str | None) -> None:
        for threads in (self._answers, self._results):
            over = threads.pop(thread, None)
            if over is not None:
                over.complete = True


def says(message: Message, text: str) -> bool:
    """Whether the message has this text in what was said, in any case of letters."""
    return _in_any(text.casefold(), (block.get("text") for block in message.content if block.get("type") == "text"))


def _in_any(sought: str, texts: Iterable[Any]) -> bool:
    return any(isinstance(text, str) and sought in text.casefold() for text in texts)
