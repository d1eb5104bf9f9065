"""Statuses, transitions, ids, sums."""

import subprocess
import sys
import threading
import uuid
from datetime import UTC

import pytest
from pydantic import ValidationError

from carrel.model import (
    SESSION_TRANSITIONS,
    TURN_TRANSITIONS,
    Session,
    SessionStatus,
    StopReason,
    TurnStatus,
    Usage,
    new_id,
    session_may_become,
    turn_may_become,
    utc_now,
)


def test_letters_and_edges_are_each_used_once() -> None:
    assert list(SESSION_TRANSITIONS) == [chr(ord("A") + i) for i in range(len(SESSION_TRANSITIONS))]
    edges = [(before, after) for before, after, _ in SESSION_TRANSITIONS.values()]
    assert len(set(edges)) == len(edges)
    assert all(before is not after for before, after in edges)
    assert all(why for _, _, why in SESSION_TRANSITIONS.values())


def test_a_session_may_take_exactly_the_edges_of_the_table() -> None:
    edges = {(before, after) for before, after, _ in SESSION_TRANSITIONS.values()}
    for before in SessionStatus:
        for after in SessionStatus:
            assert session_may_become(before, after) is ((before, after) in edges)


def test_every_session_status_can_be_reached_stopped_and_left() -> None:
    reached, todo = {SessionStatus.IDLE}, [SessionStatus.IDLE]
    while todo:
        here = todo.pop()
        found = {s for s in SessionStatus if session_may_become(here, s)} - reached
        reached |= found
        todo += found
    assert reached == set(SessionStatus)
    for status in SessionStatus:
        assert status is SessionStatus.STOPPED or session_may_become(status, SessionStatus.STOPPED)
        assert any(session_may_become(status, other) for other in SessionStatus)


def test_only_a_stopped_or_failed_session_needs_resume() -> None:
    resumed = {before for before, _, why in SESSION_TRANSITIONS.values() if why == "resume"}
    assert resumed == {SessionStatus.STOPPED, SessionStatus.FAILED}
    assert not session_may_become(SessionStatus.STOPPED, SessionStatus.STARTING)
    assert not session_may_become(SessionStatus.FAILED, SessionStatus.STARTING)


def test_a_turn_that_has_ended_stays_so() -> None:
    assert set(TURN_TRANSITIONS) == set(TurnStatus)
    for status in TurnStatus:
        assert status.ended is (not TURN_TRANSITIONS[status])
        assert status.ended is (status not in {TurnStatus.QUEUED, TurnStatus.RUNNING, TurnStatus.WAITING})


def test_only_a_queued_turn_is_cancelled_or_expires() -> None:
    for end in (TurnStatus.CANCELLED, TurnStatus.EXPIRED):
        assert [s for s in TurnStatus if turn_may_become(s, end)] == [TurnStatus.QUEUED]
    assert not turn_may_become(TurnStatus.QUEUED, TurnStatus.SUCCEEDED)
    assert not turn_may_become(TurnStatus.RUNNING, TurnStatus.QUEUED)


def test_ids_are_uuid7_and_rise() -> None:
    made = [new_id() for _ in range(20_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    for text in (made[0], made[-1]):
        parsed = uuid.UUID(text)
        assert parsed.version == 7
        assert parsed.variant == uuid.RFC_4122
    before = int(utc_now().timestamp() * 1000)
    stamp = uuid.UUID(new_id()).int >> 80
    assert before - 1 <= stamp <= before + 60_000


def test_ids_of_many_threads_are_unique() -> None:
    made: list[list[str]] = [[] for _ in range(4)]

    def work(mine: list[str]) -> None:
        mine.extend(new_id() for _ in range(3_000))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({i for mine in made for i in mine}) == 12_000
    assert all(mine == sorted(mine) for mine in made)


def test_times_have_their_zone() -> None:
    assert utc_now().tzinfo is UTC


def test_usage_is_summed_field_by_field() -> None:
    fields = list(Usage.model_fields)
    one = Usage(**{name: i + 1 for i, name in enumerate(fields)})
    two = Usage(**{name: 10 * (i + 1) for i, name in enumerate(fields)})
    assert (one + two).model_dump() == {name: 11 * (i + 1) for i, name in enumerate(fields)}
    assert one + Usage() == one
    with pytest.raises(ValidationError):
        Usage(input_tokens=-1)


def test_values_are_frozen_and_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        Usage(tokens=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Usage().input_tokens = 1  # type: ignore[misc]


def test_what_is_private_to_us_is_not_shown() -> None:
    session = Session(
        id="i", number=1, owner="o", status=SessionStatus.IDLE, spec={}, agent_session_id="secret", generation=3,
        created_at=utc_now(), last_active_at=utc_now(),
    )  # fmt: skip
    assert {"number", "owner", "agent_session_id", "generation"}.isdisjoint(session.model_dump())


def test_every_stop_reason_is_a_word() -> None:
    assert all(reason.isascii() and reason == reason.lower() and " " not in reason for reason in StopReason)


@pytest.mark.parametrize("module", ["carrel.model", "carrel.errors", "carrel.protocol.link"])
def test_importing_the_core_is_cheap(module: str) -> None:
    """Every runner pays for what these import."""
    heavy = {"sqlalchemy", "fastapi", "claude_agent_sdk", "alembic", "httpx"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
