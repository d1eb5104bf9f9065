"""What a Messages request says about its conversation: the prompt, how far the turn is, where the agent works.

The API is stateless and so is the scripted model: everything is read from the messages, each time anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

DEFAULT_CWD = "/workspace"

Json: TypeAlias = Mapping[str, Any]

_REMINDER = r"\s*<system-reminder>.*?</system-reminder>\s*"
_REMINDERS_AROUND = re.compile(rf"\A(?:{_REMINDER})+|(?:{_REMINDER})+\Z", re.DOTALL)
_CWD = re.compile(r"[Ww]orking directory:\s*(/[^\n]*)")
# Texts in a user message that Claude Code wrote itself. None of them is a prompt.
_SYNTHETIC = re.compile(
    r"\s*(?:\[Request interrupted by user[^\]]*\]"
    r"|Continue from where you left off\.\s*\Z"
    r"|Tool loaded\.\s*\Z"
    r"|\[Image: source: [^\]]*\]\s*\Z"
    r"|<(?:local-command-\w+|command-name|command-message|bash-(?:input|stdout|stderr))>)"
)
# How Claude Code asks for the rest of an answer that broke off after a whole block of it had come.
_CUT_OFF = re.compile(r"\s*Your response (?:above )?was cut off ")
# What a Skill call puts beside its result. Alone in a message it would be the skill called by name: a prompt.
_SKILL = re.compile(r"\s*(?:Base directory for this skill:|This skill is served by MCP server )")


@dataclass(frozen=True)
class ToolResult:
    """What came back from one tool call."""

    text: str
    is_error: bool


@dataclass(frozen=True)
class Progress:
    """How much of the answer to the prompt is in the conversation already."""

    calls: int = 0
    texts: int = 0
    """Text blocks since the last call: those of an answer that broke off."""
    breaks: int = 0
    """How often the answer broke off since the last call, not counting what was asked again without a trace."""


@dataclass(frozen=True)
class Conversation:
    """The reading of one request."""

    prompt: str
    turn: int
    progress: Progress
    results: tuple[ToolResult, ...]
    """What the last calls brought, in their order, if this request goes on after tool calls."""
    cwd: str
    _key: tuple[Any, ...]

    def fingerprint(self) -> bytes:
        """The same for a request and its repetition, whether streamed or not; different once anything was added."""
        return hashlib.sha256(json.dumps(self._key).encode()).digest()


def read_conversation(body: Json, *, session: str = "") -> Conversation:
    """Read a checked request body; `session` tells conversations with the same words apart."""
    talk = [message for message in body["messages"] if message["role"] in ("user", "assistant")]
    prompt, turn, since = "", 0, 0
    for index, message in enumerate(talk):
        if message["role"] == "user":
            for text in _prompt_texts(message["content"]):
                prompt, turn, since = text, turn + 1, index
    after = talk[since:]
    return Conversation(
        prompt=prompt,
        turn=turn,
        progress=_progress(after),
        results=_last_results(after),
        cwd=_cwd(body),
        _key=(session, [(m["role"], [_mark(block) for block in _blocks(m) if not _is_reminder(block)]) for m in talk]),
    )


def _progress(messages: Sequence[Json]) -> Progress:
    calls = texts = breaks = 0
    for message in messages[1:]:
        for block in _blocks(message):
            if message["role"] == "user":
                breaks += block.get("type") == "text" and bool(_CUT_OFF.match(block["text"]))
            elif block.get("type") == "tool_use":
                calls, texts, breaks = calls + 1, 0, 0
            else:
                texts += block.get("type") == "text"
    return Progress(calls, texts, breaks)


def _blocks(message: Json) -> Sequence[Json]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _prompt_texts(content: str | Sequence[Json]) -> Iterator[str]:
    """Every prompt in a user message: usually one, more where Claude Code merged messages, none for results."""
    blocks = _blocks({"content": content})
    has_result = any(block.get("type") == "tool_result" for block in blocks)
    texts = [_without_reminders(block["text"]) for block in blocks if block.get("type") == "text"]
    prompts = [text for text in texts if _is_prompt(text, beside_result=has_result)]
    if not prompts and not has_result and any(block.get("type") in ("image", "document") for block in blocks):
        prompts = [""]
    yield from prompts


def _is_prompt(text: str, *, beside_result: bool) -> bool:
    if not text.strip() or _SYNTHETIC.match(text) or _CUT_OFF.match(text):
        return False
    return not (beside_result and _SKILL.match(text))


def _without_reminders(text: str) -> str:
    return _REMINDERS_AROUND.sub("", text) if "<system-reminder>" in text else text


def _is_reminder(block: Json) -> bool:
    return block.get("type") == "text" and not _without_reminders(block["text"]).strip()


def _last_results(messages: Sequence[Json]) -> tuple[ToolResult, ...]:
    """What the calls of the last answer brought, in the order of the calls: results come in as they are ready."""
    made = [[block.get("id") for block in _blocks(m) if block.get("type") == "tool_use"] for m in messages]
    last = max((index for index, ids in enumerate(made) if ids), default=None)
    if last is None:
        return ()
    calls = made[last]
    blocks = [block for message in messages[last + 1 :] for block in _blocks(message)]
    results = [block for block in blocks if block.get("type") == "tool_result"]
    results.sort(key=lambda block: calls.index(id) if (id := block.get("tool_use_id")) in calls else len(calls))
    return tuple(ToolResult(_result_text(block.get("content")), bool(block.get("is_error"))) for block in results)


def _result_text(content: Any) -> str:
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    return "\n".join(part["text"] if part.get("type") == "text" else f"[{part.get('type')}]" for part in content)


def _mark(block: Json) -> tuple[str, str]:
    """What identifies a block across repetitions: not its cache marks, not a reminder beside it."""
    kind = str(block.get("type"))
    if kind == "text":
        return kind, _without_reminders(block["text"])
    return kind, str(block.get("id") or block.get("tool_use_id") or "")


def _cwd(body: Json) -> str:
    """The working directory, as the system prompt or a later system message or reminder of the agent has it."""
    for text in _told_by_agent(body):
        if found := _CWD.search(text):
            return found[1].strip()
    return DEFAULT_CWD


def _told_by_agent(body: Json) -> Iterator[str]:
    for message in reversed(body["messages"]):
        if message["role"] == "system":
            yield from (block["text"] for block in _blocks(message) if block.get("type") == "text")
    if system := body.get("system"):
        yield from (block["text"] for block in _blocks({"content": system}) if block.get("type") == "text")
    for message in body["messages"]:
        if message["role"] == "user":
            yield from (b["text"] for b in _blocks(message) if _is_reminder(b))
