"""Between a runner's frames and the rows of interactions."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import Any

from pydantic_core import to_json

from carrel.model import Interaction, InteractionStatus, Session
from carrel.protocol.link import Answer, Ask

_WITHDRAWN = "Nobody will answer this any more."
_EXPIRED = "Nobody has answered in time, so the call was denied."
_DENIED = "A person has denied this call."


def digest_of(tool: str, given: dict[str, Any]) -> str:
    """The SHA-256 that an answer is bound to, in hexadecimal digits."""
    return sha256(to_json([tool, sorted(given.items())], inf_nan_mode="strings")).hexdigest()


def interaction_of(session: Session, frame: Ask) -> Interaction:
    """What a runner has asked, as a row; it expires as the session's options say."""
    seconds = session.spec.get("ask_expires_seconds")
    return Interaction(
        id=frame.interaction_id,
        session_id=session.id,
        owner=session.owner,
        turn_id=frame.turn_id,
        kind=frame.about,
        tool=frame.tool,
        tool_use_id=frame.tool_use_id,
        input=frame.input,
        input_digest=digest_of(frame.tool, frame.input),
        reason=frame.reason,
        created_at=frame.at,
        expires_at=None if seconds is None else frame.at + timedelta(seconds=seconds),
    )


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
        message="" if allow else message,
    )
