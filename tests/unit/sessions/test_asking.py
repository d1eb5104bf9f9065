"""What agents ask, as people are shown it."""

from typing import Any

import pytest

from carrel.model import InteractionKind, SessionStatus, new_id, utc_now
from carrel.protocol.link import Ask
from carrel.sessions.asking import interaction_of
from carrel.testing.conformance.store import new_session

ANSWERS = {
    "git status": ["allow", "allow", "deny"],
    "date; touch it": ["allow", "deny"],  # no rule would speak of this and of little else
}


@pytest.mark.parametrize("command", ANSWERS)
def test_an_answer_is_offered_only_where_it_would_be_taken(command: str) -> None:
    frame = Ask(
        n=1,
        interaction_id=new_id(),
        turn_id=new_id(),
        at=utc_now(),
        about=InteractionKind.PERMISSION,
        tool="Bash",
        input={"command": command},
    )
    asked = interaction_of(new_session(1, status=SessionStatus.RUNNING), frame)
    answers: list[dict[str, Any]] = [option["answer"] for option in asked.options]
    assert [answer["decision"] for answer in answers] == ANSWERS[command]
    assert bool(asked.suggestions) is any("remember" in answer for answer in answers)
