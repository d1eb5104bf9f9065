"""Steps within one transaction, held to the tables."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from carrel import abc
from carrel.model import Session, SessionStatus, StopReason, TurnStatus, session_may_become, turn_may_become, utc_now
from carrel.sessions import transitions
from carrel.sessions.transitions import IllegalTransition
from carrel.store import SqliteStore
from carrel.testing.conformance.store import add_session, new_turn


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(None)
        await store.start(stack)
        yield store


async def types(store: SqliteStore, session: Session) -> list[str]:
    return [e.type for e in await store.read(lambda tx: tx.events.page(session.id, after=0, limit=99))]


async def test_every_change_of_status_is_in_the_table_and_leaves_its_event(store: SqliteStore) -> None:
    for before in SessionStatus:
        for after in SessionStatus:
            session = await add_session(store, status=before)
            work = lambda tx, s=session, a=after: transitions.set_status(tx, s, a)  # noqa: E731
            if before is not after and not session_may_become(before, after):
                with pytest.raises(IllegalTransition):
                    await store.write(work)
                assert await types(store, session) == []
                continue
            changed = await store.write(work)
            assert changed.status is after
            assert await types(store, session) == ([] if before is after else ["session.status_changed"])


async def test_every_end_of_a_turn_is_in_the_table(store: SqliteStore) -> None:
    session = await add_session(store)
    number = 0
    for before in TurnStatus:
        for after in TurnStatus:
            if not after.ended:
                continue
            number += 1
            turn = new_turn(session, number, before)
            await store.write(lambda tx, t=turn: tx.turns.add(t))  # type: ignore[misc]
            work = lambda tx, t=turn, a=after: transitions.complete_turn(tx, session, t, a, stop_reason=None)  # noqa: E731
            if turn_may_become(before, after):
                assert (await store.write(work)).status is after
            else:
                with pytest.raises(IllegalTransition):
                    await store.write(work)


async def test_a_session_without_a_sandbox_is_idle_stopped_or_failed(store: SqliteStore) -> None:
    for status in SessionStatus:
        session = await add_session(store, status=status)
        settled = await store.write(lambda tx, s=session: transitions.settle(tx, s))  # type: ignore[misc]
        kept = status in {SessionStatus.STOPPED, SessionStatus.FAILED}
        assert settled.status is (status if kept else SessionStatus.IDLE)


async def test_a_started_turn_has_its_deadline_and_its_prompt_in_the_log(store: SqliteStore) -> None:
    session = await add_session(store, status=SessionStatus.READY)
    turn = new_turn(session, 1)

    def work(tx: abc.Transaction) -> None:
        tx.turns.add(turn)
        transitions.start_turn(tx, session, turn, "b")

    before = utc_now()
    await store.write(work)
    now = await store.read(lambda tx: tx.turns.get(turn.id))
    assert now is not None
    assert now.deadline_at is not None
    assert 1.0 < (now.deadline_at - before).total_seconds() < 3.0
    assert (now.status, now.sandbox_id) == (TurnStatus.RUNNING, "b")
    assert await types(store, session) == ["session.status_changed", "turn.started", "message.user"]


async def test_use_puts_the_end_of_a_session_off(store: SqliteStore) -> None:
    session = await add_session(store, ttl_seconds=60)
    now = utc_now()
    touched = transitions.touch(session, now)
    assert (touched["expires_at"] - now).total_seconds() == 60
    assert transitions.touch(session.model_copy(update={"ttl_seconds": None}), now)["expires_at"] is None


async def test_the_reason_of_the_last_stop_is_kept_until_there_is_another(store: SqliteStore) -> None:
    session = await add_session(store, stop_reason=StopReason.TIMEOUT)
    session = await store.write(lambda tx: transitions.set_status(tx, session, SessionStatus.STARTING))
    assert session.stop_reason is StopReason.TIMEOUT
    session = await store.write(
        lambda tx: transitions.set_status(tx, session, SessionStatus.FAILED, stop_reason=StopReason.ERROR)
    )
    assert session.stop_reason is StopReason.ERROR
