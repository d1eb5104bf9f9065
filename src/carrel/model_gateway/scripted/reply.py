"""Decides what one assistant message does: which steps are due, what is quoted, which fault strikes."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace

from carrel.model_gateway.scripted.conversation import Conversation, ToolResult
from carrel.model_gateway.scripted.script import Script
from carrel.model_gateway.scripted.steps import FAULTS, SPEECH, Call, Calls, Fault, Say, Step

QUOTE_LIMIT = 2000
"""How many characters of a tool result or a prompt are quoted."""


@dataclass(frozen=True)
class Reply:
    """One assistant message to be: its steps, of which the last may be tool calls or a fault."""

    steps: tuple[Step, ...]

    @property
    def fault(self) -> Fault | None:
        """What breaks this answer, if something does."""
        last = self.steps[-1] if self.steps else None
        return last if isinstance(last, FAULTS) else None

    @property
    def stop_reason(self) -> str:
        """`tool_use` if the message ends with calls."""
        return "tool_use" if self.steps and isinstance(self.steps[-1], Calls) else "end_turn"

    @property
    def has_fault(self) -> bool:
        """Whether any fault stands in the message, so that attempts have to be counted."""
        return any(isinstance(step, FAULTS) for step in self.steps)

    def attempt(self, number: int) -> Reply:
        """The answer to the attempt with this number: faults that have struck are over, the next one ends it."""
        due: list[Step] = []
        for step in self.steps:
            if not isinstance(step, FAULTS):
                due.append(step)
            elif number < step.times:
                return Reply((*due, step))
            else:
                number -= step.times
        return Reply(tuple(due))


def plan(script: Script, conversation: Conversation) -> Reply:
    """The next message of this conversation, its faults still in it."""
    progress = conversation.progress
    due = _after_calls(script.steps_for(conversation.prompt), progress.calls)
    due = _after_breaks(_after_texts(due, progress.texts), progress.breaks)
    message: list[Step] = []
    for step in due:
        if isinstance(step, Calls):
            return Reply((*message, _located(step, conversation.cwd)))
        message.append(step)
    return Reply((*message, *_ending(conversation, message)))


def _after_calls(steps: Sequence[Step], done: int) -> Sequence[Step]:
    """The steps left when this many tool calls have been made."""
    for index, step in enumerate(steps):
        if done <= 0:
            return steps[index:]
        if isinstance(step, Calls):
            done -= len(step.calls)
    return ()


def _after_texts(steps: Sequence[Step], said: int) -> Sequence[Step]:
    """The steps left of a message of which this many texts came through; calls are never skipped."""
    for index, step in enumerate(steps):
        if said <= 0 or isinstance(step, Calls):
            return steps[index:]
        said -= isinstance(step, SPEECH)
    return ()


def _after_breaks(steps: Sequence[Step], breaks: int) -> Sequence[Step]:
    """The steps left when the first fault among them has struck this often."""
    for index, step in enumerate(steps):
        if breaks and isinstance(step, FAULTS):
            left = (replace(step, times=step.times - 1),) if step.times > 1 else ()
            return (*steps[:index], *_after_breaks((*left, *steps[index + 1 :]), breaks - 1))
        if isinstance(step, Calls):
            break
    return steps


def _ending(conversation: Conversation, said: Sequence[Step]) -> tuple[Say, ...]:
    progress = conversation.progress
    if conversation.results and (progress.breaks or not progress.texts):
        return (Say("\n".join(map(_quote_result, conversation.results))),)
    if any(isinstance(step, SPEECH) for step in said):
        return ()
    if progress.calls or progress.texts:  # asked once more: a background task ended
        return (Say("Noted. Nothing is left to do."),)
    quote = _shortened(conversation.prompt)
    return (Say(f'This is turn {max(conversation.turn, 1)} of our conversation. You said: "{quote}"'),)


def _quote_result(result: ToolResult) -> str:
    return f"{'Result (error)' if result.is_error else 'Result'}: {_shortened(result.text)}"


def _shortened(text: str) -> str:
    return text if len(text) <= QUOTE_LIMIT else text[:QUOTE_LIMIT] + "…"


def _located(step: Calls, cwd: str) -> Calls:
    return Calls(tuple(_locate(call, cwd) if call.from_cwd else call for call in step.calls))


def _locate(call: Call, cwd: str) -> Call:
    path = call.input["file_path"]
    if posixpath.isabs(path):
        return call
    return replace(call, input={**call.input, "file_path": posixpath.normpath(posixpath.join(cwd, path))})
