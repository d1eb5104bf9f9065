"""Callers see what they spent, administrators what everybody did, and who is bound to a session that session alone."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from carrel import abc
from carrel.budgets import Allowances
from carrel.errors import Forbidden, SessionNotFound
from carrel.model import ADMIN, Budget, Principal, Scope, Usage, new_id, utc_now
from carrel.sessions.spending import Spending
from carrel.store import SqliteStore
from carrel.testing.conformance.store import add_session

ALICE, EVE = Principal.of_user("alice"), Principal.of_user("eve")


@pytest.fixture
async def store() -> AsyncIterator[abc.Store]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(None)
        await store.start(stack)
        yield store


@pytest.fixture
async def sessions(store: abc.Store) -> list[str]:
    """Two of alice's and one of eve's, each with a request that took as many tokens as its place says."""
    found = []
    for tokens, owner in enumerate(("alice", "alice", "eve"), 1):
        session = await add_session(store, owner=owner)
        record = abc.UsageRecord(
            id=new_id(),
            session_id=session.id,
            user_id=owner,
            turn_id=None,
            model="m",
            usage=Usage(input_tokens=tokens),
            cost_usd=0.5,
            at=utc_now(),
        )
        await store.write(lambda tx, r=record: tx.usage.add(r))  # type: ignore[misc]
        found.append(session.id)
    return found


def bound(session_id: str) -> Principal:
    return Principal(name="sandbox:x", user="alice", scopes=frozenset({Scope.READ}), session_id=session_id)


async def test_usage_is_ones_own(store: abc.Store, sessions: list[str]) -> None:
    spending = Spending(store, Allowances())

    async def seen(principal: Principal, **which: str) -> int:
        report = await spending.usage(principal, abc.UsageFilter(**which), ["session"])
        assert sum(row.usage.total for row in report.rows) == report.total.usage.total
        return report.total.usage.total

    assert [await seen(who) for who in (ADMIN, ALICE, EVE)] == [6, 3, 3]
    assert await seen(ADMIN, user_id="eve") == 3
    assert await seen(ALICE, user_id="eve") == 0
    assert await seen(ALICE, session_id=sessions[2]) == 0
    assert await seen(bound(sessions[1])) == 2
    assert await seen(bound(sessions[1]), session_id=sessions[0]) == 0


async def test_budgets_are_ones_own(store: abc.Store, sessions: list[str]) -> None:
    spending = Spending(store, Allowances(user=Budget(max_tokens=10)))
    user, day = await spending.budgets(ALICE, user_id=None, session_id=None)
    assert (user.kind, user.of, user.spent_tokens, user.left_tokens) == ("user", "alice", 3, 7)
    assert (day.kind, day.left_tokens) == ("user_day", None)
    kinds = [a.kind for a in await spending.budgets(ADMIN, user_id=None, session_id=sessions[2])]
    assert kinds == ["session", "user", "user_day"]
    assert (await spending.budgets(ADMIN, user_id="eve", session_id=None))[0].of == "eve"
    with pytest.raises(Forbidden):
        await spending.budgets(ALICE, user_id="eve", session_id=None)
    with pytest.raises(SessionNotFound):
        await spending.budgets(ALICE, user_id=None, session_id=sessions[2])
    (own,) = await spending.budgets(bound(sessions[1]), user_id=None, session_id=None)
    assert (own.kind, own.of) == ("session", sessions[1])
    with pytest.raises(SessionNotFound):
        await spending.budgets(bound(sessions[1]), user_id=None, session_id=sessions[0])
