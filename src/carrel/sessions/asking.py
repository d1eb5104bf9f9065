"""Between a runner's frames and the rows of interactions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from carrel.model import Interaction, InteractionKind, InteractionStatus, PermissionMode, Session
from carrel.protocol.link import Answer, Ask, Asked, digest_of
from carrel.protocol.permissions import rule_for

_WITHDRAWN = "Nobody will answer this any more."
_EXPIRED = "Nobody has answered in time, so the call was denied."
_DENIED = "A person has denied this call."
_TITLE_CHARS = 200
_TELLING = ("command", "file_path", "notebook_path", "url", "path", "pattern", "query", "description")
"""What of a call's input says the most about it, first one first."""


def interaction_of(session: Session, frame: Ask) -> Interaction:
    """What a runner has asked, as a row."""
    expires, again = frame.expires_seconds, frame.remind_seconds
    rule = rule_for(frame.tool, frame.input) if frame.about is InteractionKind.PERMISSION else None
    return Interaction(
        id=frame.interaction_id,
        session_id=session.id,
        root_session_id=session.root_id or session.id,
        owner=session.owner,
        turn_id=frame.turn_id,
        kind=frame.about,
        title=title_of(frame.about, frame.tool, frame.input),
        tool=frame.tool,
        tool_use_id=frame.tool_use_id,
        input=frame.input,
        input_digest=digest_of(frame.tool, frame.input),
        reason=frame.reason,
        suggestions=() if rule is None else (rule,),
        options=tuple(_options(frame.about, frame.input, can_be_remembered=rule is not None)),
        created_at=frame.at,
        expires_at=None if expires is None else frame.at + timedelta(seconds=expires),
        remind_at=None if again is None else frame.at + timedelta(seconds=again),
        remind_seconds=again,
        lone=frame.lone,
    )


def title_of(kind: InteractionKind, tool: str, given: dict[str, Any]) -> str:
    """What is asked, in one line."""
    if kind is InteractionKind.PLAN:
        said = str(given.get("plan") or "").strip().partition("\n")[0].lstrip("# ")
        return _short(f"A plan to approve: {said}" if said else "A plan to approve")
    if kind is InteractionKind.QUESTION:
        asked = [str(each.get("question", "")) for each in _questions(given)]
        return _short(" ".join(filter(None, asked)) or "A question")
    about = next((str(given[name]) for name in _TELLING if isinstance(given.get(name), str) and given[name]), "")
    return _short(f"{tool}: {about.partition(chr(10))[0]}" if about else tool)


def _short(text: str) -> str:
    return text if len(text) <= _TITLE_CHARS else text[: _TITLE_CHARS - 1] + "…"


def _questions(given: dict[str, Any]) -> list[dict[str, Any]]:
    asked = given.get("questions")
    return [each for each in asked if isinstance(each, dict)] if isinstance(asked, list) else []


def _options(kind: InteractionKind, given: dict[str, Any], *, can_be_remembered: bool) -> list[dict[str, Any]]:
    deny = {"label": "No", "answer": {"decision": "deny"}}
    if kind is InteractionKind.PLAN:
        modes = {
            PermissionMode.DEFAULT: "Yes, and ask before each change",
            PermissionMode.ACCEPT_EDITS: "Yes, and let it change files",
        }
        approve = [
            {"label": label, "answer": {"decision": "allow", "permission_mode": mode}} for mode, label in modes.items()
        ]
        return [*approve, {"label": "No, go on planning", "answer": {"decision": "deny"}}]
    if kind is InteractionKind.QUESTION:
        return _choices(_questions(given))
    always = {
        "label": "Yes, and the same again in this session",
        "answer": {"decision": "allow", "remember": "session"},
    }
    return [{"label": "Yes", "answer": {"decision": "allow"}}, *([always] if can_be_remembered else []), deny]


def _choices(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to a single question with a single choice; others are for a form, made of the input."""
    if len(questions) != 1 or questions[0].get("multiSelect"):
        return []
    (asked,) = questions
    choices = asked.get("options")
    labels = (
        [str(each.get("label", "")) for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []
    )
    text = str(asked.get("question", ""))
    return [{"label": label, "answer": {"decision": "allow", "answers": {text: label}}} for label in labels if label]


def answer_frame(interaction: Interaction) -> Answer:
    """What the runner that asked is told of an interaction that is not pending any more."""
    answer = interaction.answer or {}
    allow = interaction.status is InteractionStatus.ANSWERED and answer.get("decision") == "allow"
    message = {
        InteractionStatus.ANSWERED: answer.get("message") or _DENIED,
        InteractionStatus.EXPIRED: _EXPIRED,
    }.get(interaction.status, _WITHDRAWN)
    return Answer(
        # The same every time, so that the runner drops a repeat.
        id=f"answer-{interaction.id}",
        interaction_id=interaction.id,
        allow=allow,
        input=answer.get("updated_input") if allow else None,
        permission_mode=answer.get("permission_mode") if allow else None,
        message="" if allow else message,
    )


def asked_frame(interaction: Interaction) -> Asked:
    """What the session's next agent is told of a call that has not happened yet."""
    pending = interaction.status is InteractionStatus.PENDING
    return Asked(
        interaction_id=interaction.id,
        tool_use_id=interaction.tool_use_id,
        input_digest=interaction.input_digest,
        answer=None if pending else answer_frame(interaction),
    )
