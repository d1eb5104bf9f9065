"""The arithmetic of budgets: whatever is asked, held and settled in whatever order, no budget is ever exceeded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel import abc
from carrel.budgets import UNLIMITED, Account, Allowances, Bound, BudgetKind, accounts_of, grant, only_held, spent
from carrel.errors import BudgetReached, PriceUnknown
from carrel.model import Budget, Session, SessionStatus, Turn, TurnStatus, Usage, new_id, utc_now
from carrel.model_gateway.meter import _release, _reserve, _settle
from carrel.store import tables
from carrel.store.transaction import SqlTransaction

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def account(budget: Budget, **changes: Any) -> Account:
    values: dict[str, Any] = {"spent_tokens": 0, "spent_usd": 0.0, "reserved_tokens": 0, "reserved_usd": 0.0}
    return Account(kind=BudgetKind.SESSION, of="s1", budget=budget, **values | changes)


def bound(**changes: Any) -> Bound:
    values: dict[str, Any] = {
        "model": "m",
        "input_tokens": 10_000,
        "max_tokens": 32_000,
        "least_max_tokens": 1_024,
        "input_usd": 0.05,
        "output_usd": 0.00002,
    }
    return Bound(**values | changes)


def test_what_fits_is_granted_whole() -> None:
    assert grant([], bound()) == 32_000
    assert grant([account(Budget(max_usd=1.0)), account(Budget(max_tokens=42_000))], bound()) == 32_000


def test_the_smallest_remainder_lowers_what_may_be_asked_for() -> None:
    accounts = [account(Budget(max_tokens=40_000)), account(Budget(max_usd=0.15)), account(Budget(max_tokens=20_000))]
    assert grant(accounts, bound()) in (4_999, 5_000)  # never a token more, for all that division rounds
    assert grant([account(Budget(max_tokens=20_000), spent_tokens=4_000, reserved_tokens=1_000)], bound()) == 5_000


@pytest.mark.parametrize(
    ("budget", "least", "fits"),
    [
        (Budget(max_tokens=11_024), 1_024, True),
        (Budget(max_tokens=11_023), 1_024, False),
        (Budget(max_tokens=15_000), 6_000, False),
        (Budget(max_usd=0.05), 1_024, False),
        (Budget(max_usd=0.0), 1_024, False),
    ],
)
def test_what_may_be_asked_for_is_not_lowered_beyond_use(budget: Budget, least: int, fits: bool) -> None:
    asked = bound(least_max_tokens=least)
    if fits:
        assert grant([account(budget)], asked) == least
        return
    with pytest.raises(BudgetReached):
        grant([account(budget)], asked)


def test_a_request_that_asks_for_little_needs_no_more() -> None:
    assert grant([account(Budget(max_tokens=10_005))], bound(max_tokens=5)) == 5


def test_a_model_without_a_price_is_refused_under_dollars_alone() -> None:
    unknown = bound(input_usd=None, output_usd=None)
    assert grant([account(Budget(max_tokens=100_000))], unknown) == 32_000
    with pytest.raises(PriceUnknown, match="prices_file"):
        grant([account(Budget(max_usd=100))], unknown)


def test_output_that_costs_nothing_is_bounded_by_tokens_alone() -> None:
    assert grant([account(Budget(max_usd=0.05))], bound(output_usd=0.0)) == 32_000


def test_what_is_only_held_is_worth_waiting_for() -> None:
    held = account(Budget(max_tokens=20_000), reserved_tokens=19_000)
    gone = account(Budget(max_tokens=20_000), spent_tokens=19_000)
    with pytest.raises(BudgetReached):
        grant([held], bound())
    assert only_held([held], bound())
    assert not only_held([held, gone], bound())
    assert spent([held]) is None
    assert spent([replace(held, reserved_tokens=20_000)]) is None
    assert spent([replace(gone, spent_tokens=20_000)]) is not None
    assert spent([account(Budget())]) is None


@pytest.mark.parametrize(
    ("kind", "budget", "words"),
    [
        (BudgetKind.TURN, Budget(max_usd=0.5), ["the turn's budget of $0.50 ($0.2500 spent)", "larger `budget`"]),
        (BudgetKind.SESSION, Budget(max_tokens=1_500), ["1,500 tokens (1,200 spent)", "PATCH /api/v1/sessions/x"]),
        (BudgetKind.USER, Budget(max_usd=2, max_tokens=9), ["the user x of $2.00", " and 9 tokens", "/api/v1/users/x"]),
        (BudgetKind.SESSION, Budget(max_usd=0.0001), ["the session's budget of $0.0001 ($0.2500 spent)"]),
        (BudgetKind.USER_DAY, Budget(max_usd=0), ["the daily budget", "from 2026-11-22 00:00 UTC", "daily_budget"]),
    ],
)
def test_the_message_says_which_how_large_and_how_to_go_on(kind: BudgetKind, budget: Budget, words: list[str]) -> None:
    tomorrow = NOON.replace(hour=0) + timedelta(days=1)
    full = replace(account(budget), kind=kind, of="x", spent_usd=0.25, spent_tokens=1_200, resets_at=tomorrow)
    with pytest.raises(BudgetReached) as caught:
        grant([full], bound(input_usd=9.0))
    for word in words:
        assert word in caught.value.message


def test_the_message_tells_what_others_hold() -> None:
    with pytest.raises(BudgetReached, match=r"\$0\.0100 spent, \$0\.0900 reserved"):
        grant([account(Budget(max_usd=0.1), spent_usd=0.01, reserved_usd=0.09)], bound())


# ------------------------------------------------------------------------------------------------- over real rows


@contextmanager
def transaction() -> Iterator[SqlTransaction]:
    engine = sa.create_engine("sqlite://")
    try:
        with engine.connect() as connection:
            tables.metadata.create_all(connection)
            yield SqlTransaction(connection, writing=True)
    finally:
        engine.dispose()


def add_session(tx: SqlTransaction, number: int, *, budget: Budget | None = None, owner: str = "alice") -> Session:
    now = utc_now()
    session = Session(
        id=new_id(),
        number=number,
        owner=owner,
        status=SessionStatus.RUNNING,
        spec={},
        cost_usd=0.0,
        budget=budget,
        created_at=now,
        last_active_at=now,
    )
    tx.sessions.add(session)
    return session


def add_turn(tx: SqlTransaction, session: Session, **options: Any) -> Turn:
    turn = Turn(
        id=new_id(),
        session_id=session.id,
        number=tx.turns.next_number(session.id),
        status=TurnStatus.RUNNING,
        options=options,
        created_at=utc_now(),
    )
    tx.turns.add(turn)
    return turn


def reserve(tx: SqlTransaction, session: Session, asked: Bound, allowances: Allowances = UNLIMITED) -> Any:
    return _reserve(tx, session.id, asked, allowances, last=True)


def test_own_budgets_win_over_those_of_the_settings() -> None:
    allowances = Allowances(
        turn=Budget(max_usd=1), session=Budget(max_usd=2), user=Budget(max_usd=3), user_day=Budget(max_usd=4)
    )
    with transaction() as tx:
        session = add_session(tx, 1)
        turn = add_turn(tx, session)

        def sizes(session: Session, turn: Turn) -> list[float | None]:
            found = accounts_of(tx, allowances, user_id="alice", session=session, turn=turn, now=NOON)
            return [a.budget.max_usd for a in found]

        assert sizes(session, turn) == [1, 2, 3, 4]
        tx.users.ensure("alice", NOON)
        tx.users.update("alice", budget=Budget(max_usd=30), daily_budget=Budget())
        own = session.model_copy(update={"budget": Budget(max_usd=20)})
        assert sizes(own, add_turn(tx, session, budget={"max_usd": 10})) == [10, 20, 30]


def test_a_day_begins_at_midnight_in_utc_and_holds_what_is_under_way() -> None:
    with transaction() as tx:
        for at, cost in ((NOON - timedelta(hours=12, seconds=1), 5.0), (NOON - timedelta(hours=12), 0.25)):
            record = abc.UsageRecord(
                id=new_id(),
                session_id="gone",
                user_id="alice",
                turn_id=None,
                model="m",
                usage=Usage(input_tokens=1),
                cost_usd=cost,
                at=at,
            )
            tx.usage.add(record)
        held = abc.Reservation(
            id=new_id(),
            session_id="gone",
            user_id="alice",
            turn_id=None,
            model="m",
            tokens=7,
            cost_usd=0.5,
            at=NOON - timedelta(days=1),
        )
        tx.usage.reserve(held)
        found = accounts_of(tx, UNLIMITED, user_id="alice", now=NOON, unlimited=True)
        user, day = found
        assert (user.kind, user.spent_usd, user.reserved_usd) == (BudgetKind.USER, 5.25, 0.5)
        assert (day.kind, day.spent_usd, day.reserved_tokens) == (BudgetKind.USER_DAY, 0.25, 7)
        assert day.resets_at == datetime(2026, 11, 22, tzinfo=UTC)


def test_a_refusal_marks_the_turn_once_and_refuses_whatever_follows() -> None:
    with transaction() as tx:
        session = add_session(tx, 1, budget=Budget(max_tokens=5))
        turn = add_turn(tx, session)
        assert isinstance(reserve(tx, session, bound()), BudgetReached)
        marked = tx.turns.get(turn.id)
        assert marked is not None
        assert marked.interrupt_reason == "budget_reached"
        assert marked.error is not None
        assert marked.error.code == "budget_reached"
        tx.sessions.update(session.id, budget=None)
        again = reserve(tx, session, bound(max_tokens=1, input_tokens=0))
        assert again.message == marked.error.message


def test_what_is_held_by_others_makes_a_request_wait() -> None:
    with transaction() as tx:
        session = add_session(tx, 1, budget=Budget(max_tokens=20_000))
        first = reserve(tx, session, bound())
        assert first.tokens == 20_000
        assert _reserve(tx, session.id, bound(), UNLIMITED, last=False) is None
        assert isinstance(_reserve(tx, session.id, bound(), UNLIMITED, last=True), BudgetReached)
        _release(tx, first)
        assert _reserve(tx, session.id, bound(), UNLIMITED, last=False).tokens == 20_000  # type: ignore[union-attr]


def test_a_settlement_counts_once() -> None:
    with transaction() as tx:
        session = add_session(tx, 1)
        held = reserve(tx, session, bound())
        for _ in range(2):
            _settle(tx, held, "m", Usage(input_tokens=3), 0.25)
        (total,) = tx.usage.sums(abc.UsageFilter(session_id=session.id))
        assert (total.requests, total.cost_usd) == (1, 0.25)
        assert tx.usage.reserved(abc.UsageFilter()) == (0, 0.0)
        told = tx.sessions.get(session.id)
        assert told is not None
        assert (told.cost_usd, told.usage.total) == (0.25, 3)


def test_what_a_deleted_session_spent_stays_spent() -> None:
    with transaction() as tx:
        session = add_session(tx, 1)
        held = reserve(tx, session, bound())
        tx.sessions.mark_deleting(session.id)
        tx.sessions.remove(session.id)
        assert tx.usage.reserved(abc.UsageFilter(user_id="alice"))[0] == held.tokens
        _settle(tx, held, "m", Usage(input_tokens=3), 0.25)
        (total,) = tx.usage.sums(abc.UsageFilter(user_id="alice"))
        assert (total.requests, total.cost_usd) == (1, 0.25)


def test_a_turn_that_has_ended_gets_what_its_last_request_took() -> None:
    with transaction() as tx:
        session = add_session(tx, 1)
        turn = add_turn(tx, session)
        held = reserve(tx, session, bound())
        tx.turns.update(turn.id, status=TurnStatus.INTERRUPTED)
        _settle(tx, held, "m", Usage(output_tokens=9), 0.5)
        told = tx.turns.get(turn.id)
        assert told is not None
        assert (told.usage.output_tokens, told.cost_usd) == (9, 0.5)
        (event,) = tx.events.page(session.id, after=0, limit=5)
        assert (event.type, event.turn_id) == ("usage.recorded", turn.id)


BUDGETS = st.builds(
    Budget,
    max_usd=st.none() | st.floats(0, 3, allow_nan=False),
    max_tokens=st.none() | st.integers(0, 400_000),
)
REQUESTS = st.tuples(
    st.integers(0, 2),  # whose session
    st.integers(0, 60_000),  # input tokens at most
    st.integers(1, 64_000),  # max_tokens
    st.floats(0, 1),  # how much of what was reserved is used
    st.integers(0, 5),  # how many stay open before one is settled
)


@settings(max_examples=20, deadline=None)
@given(
    session_budgets=st.lists(BUDGETS, min_size=3, max_size=3),
    turn_budget=BUDGETS,
    user=BUDGETS,
    day=BUDGETS,
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    prices=st.tuples(st.floats(0, 1e-4), st.floats(0, 5e-4)),
)
def test_no_budget_is_ever_exceeded(
    session_budgets: list[Budget],
    turn_budget: Budget,
    user: Budget,
    day: Budget,
    requests: list[tuple[int, int, int, float, int]],
    prices: tuple[float, float],
) -> None:
    allowances = Allowances(user=user, user_day=day)
    input_price, output_price = prices
    with transaction() as tx:
        sessions = [add_session(tx, n, budget=budget) for n, budget in enumerate(session_budgets, 1)]
        turns = [add_turn(tx, session, budget=turn_budget.model_dump()) for session in sessions]
        open_ones: list[tuple[abc.Reservation, float]] = []

        def check() -> None:
            for session, turn in zip(sessions, turns, strict=True):
                for held in accounts_of(tx, allowances, user_id="alice", session=session, turn=turn, now=utc_now()):
                    if held.budget.max_tokens is not None:
                        assert held.spent_tokens + held.reserved_tokens <= held.budget.max_tokens
                    if held.budget.max_usd is not None:
                        assert held.spent_usd + held.reserved_usd <= held.budget.max_usd + 1e-9

        def settle() -> None:
            held, share = open_ones.pop(0)
            assert held.cost_usd is not None
            used = Usage(output_tokens=int(held.tokens * share))
            _settle(tx, held, "m", used, held.cost_usd * share)

        for whose, input_tokens, max_tokens, share, stay_open in requests:
            asked = Bound(
                model="m",
                input_tokens=input_tokens,
                max_tokens=max_tokens,
                least_max_tokens=min(1_024, max_tokens),
                input_usd=input_tokens * input_price,
                output_usd=output_price,
            )
            # A turn that was refused is over; another one follows it, under the same budgets but its own.
            if (now := tx.turns.get(turns[whose].id)) is not None and now.error is not None:
                tx.turns.update(now.id, status=TurnStatus.FAILED)
                turns[whose] = add_turn(tx, sessions[whose], budget=turn_budget.model_dump())
            found = reserve(tx, sessions[whose], asked, allowances)
            if isinstance(found, abc.Reservation):
                granted = found.tokens - input_tokens
                assert min(1_024, max_tokens) <= granted <= max_tokens
                open_ones.append((found, share))
            check()
            while len(open_ones) > stay_open:
                settle()
            check()
        while open_ones:
            settle()
        check()
        assert tx.usage.reserved(abc.UsageFilter()) == (0, 0.0)
