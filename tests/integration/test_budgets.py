"""Budgets on the real CLI: each is reached, ends its turn and nothing else, and goes on when it is raised."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from carrel import abc
from carrel.model import Budget, Usage, new_id, utc_now

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

MODEL = "claude-opus-5-5"
STEPS = 12
SPENDTHRIFT = " ".join(f"[[bash: echo {n} >> n.txt]]" for n in range(STEPS))
# What a request has to have room for beside what is spent: its input as far as it was counted before, 1,024 tokens of
# output, and some bytes that are new.
ROOM_USD = 0.11
ROOM_TOKENS = 17_000


async def counted(api: Any) -> str:
    """A session whose conversation has been counted once, so that later requests are bounded closely."""
    session: str = await api.session(model=MODEL)
    await api.run(session, "hello")
    return session


async def spent(api: Any, **which: Any) -> dict[str, Any]:
    total: dict[str, Any] = (await api.ask("GET", "/usage", params=which))["total"]
    return total


def tokens(total: dict[str, Any]) -> int:
    return sum(value for name, value in total.items() if name.endswith("_tokens"))


async def lines(api: Any, session: str) -> int:
    answer = await api.http.get(f"/sessions/{session}/files/n.txt")
    return len(answer.text.split()) if answer.is_success else 0


def reached(result: dict[str, Any], words: str) -> None:
    assert (result["status"], result["stop_reason"]) == ("failed", "budget_reached")
    assert result["error"]["code"] == "budget_reached"
    assert words in result["error"]["message"]


async def test_a_turns_budget_ends_it_and_the_next_turn_has_its_own(api):
    session = await counted(api)
    result = await api.run(session, SPENDTHRIFT, budget={"max_usd": ROOM_USD})
    reached(result, "the turn's budget of $0.11")
    assert 0 < result["cost_usd"] <= ROOM_USD
    assert 1 <= await lines(api, session) < STEPS
    events = await api.events(session)
    ended = next(event["data"] for event in events if event["type"] == "turn.completed" and event["data"]["error"])
    assert ended["error"] == result["error"]
    # Claude Code was not told to try again, and did not.
    assert not [event for event in events if event["data"].get("subtype") == "api_retry"]
    assert (await api.run(session, "hello", budget={"max_usd": 5.0}))["status"] == "succeeded"


async def test_a_sessions_budget_is_reached_and_raised(api):
    session = await counted(api)
    before = (await spent(api, session_id=session))["cost_usd"]
    raised = {"budget": {"max_usd": before + ROOM_USD}}
    assert (await api.ask("PATCH", f"/sessions/{session}", json=raised))["budget"]["max_usd"] == before + ROOM_USD
    reached(await api.run(session, SPENDTHRIFT), "the session's budget")
    assert before < (await spent(api, session_id=session))["cost_usd"] <= before + ROOM_USD
    assert (await api.ask("GET", f"/sessions/{session}"))["stop_reason"] == "budget_reached"
    await api.ask("PATCH", f"/sessions/{session}", json={"budget": None})
    assert (await api.run(session, "hello"))["status"] == "succeeded"


async def test_a_sessions_budget_in_tokens(api):
    session = await counted(api)
    before = tokens(await spent(api, session_id=session))
    await api.ask("PATCH", f"/sessions/{session}", json={"budget": {"max_tokens": before + 2 * ROOM_TOKENS}})
    reached(await api.run(session, SPENDTHRIFT), "tokens")
    assert before < tokens(await spent(api, session_id=session)) <= before + 2 * ROOM_TOKENS


@pytest.mark.parametrize("column", ["budget", "daily_budget"])
async def test_a_users_budgets_are_reached_and_raised(api, column):
    session, store = await counted(api), api.server.services.store
    before = (await spent(api))["cost_usd"]

    async def allow(usd: float) -> None:
        await store.write(lambda tx: tx.users.ensure("admin", utc_now()))
        await store.write(lambda tx: tx.users.update("admin", **{column: Budget(max_usd=usd)}))

    await allow(before + ROOM_USD)
    result = await api.run(session, SPENDTHRIFT)
    reached(
        result, "the daily budget of the user admin" if column == "daily_budget" else "the budget of the user admin"
    )
    assert (await spent(api))["cost_usd"] <= before + ROOM_USD
    # Other sessions of the user share it.
    reached(await api.run(await api.session(model=MODEL), "something else"), "the user admin")
    await allow(100.0)
    assert (await api.run(session, "hello"))["status"] == "succeeded"


async def test_what_was_spent_yesterday_is_not_of_today(api):
    session, store = await counted(api), api.server.services.store

    def spend(tx: Any) -> None:
        tx.users.ensure("admin", utc_now())
        tx.users.update("admin", daily_budget=Budget(max_usd=5.0))
        record = abc.UsageRecord(
            id=new_id(),
            session_id=session,
            user_id="admin",
            turn_id=None,
            model=MODEL,
            usage=Usage(input_tokens=1),
            cost_usd=50.0,
            at=utc_now() - timedelta(days=1),
        )
        tx.usage.add(record)

    await store.write(spend)
    assert (await api.run(session, "hello"))["status"] == "succeeded"


async def test_a_turn_that_waits_fails_at_once_where_nothing_is_left(api):
    session = await api.session(model=MODEL, budget={"max_tokens": 0})
    result = await api.run(session, "hello")
    reached(result, "the session's budget of 0 tokens")
    types = [event["type"] for event in await api.events(session)]
    assert "turn.started" not in types
    assert not [e for e in await api.events(session) if e["data"].get("status") == "starting"], "no process was started"
    await api.ask("PATCH", f"/sessions/{session}", json={"budget": {"max_tokens": 1_000_000}})
    assert (await api.run(session, "hello"))["status"] == "succeeded"
    # And where an agent is at hand.
    reached(await api.run(session, "hello", budget={"max_usd": 0}), "the turn's budget of $0.00")


async def test_a_small_budget_is_used_to_its_end(api):
    """`max_tokens` is lowered: the CLI asks for far more output than the budget could ever pay."""
    session = await counted(api)
    result = await api.run(session, "[[count: 100]]", budget={"max_usd": 0.12})
    assert result["status"] == "succeeded"


async def test_a_model_without_a_price_is_refused_under_dollars_alone(api):
    session = await api.session(model="some-model-of-tomorrow", budget={"max_usd": 100})
    result = await api.run(session, "hello")
    assert (result["status"], result["stop_reason"]) == ("failed", "error")
    assert result["error"]["code"] == "price_unknown"
    assert "some-model-of-tomorrow" in result["error"]["message"]
    await api.ask("PATCH", f"/sessions/{session}", json={"budget": {"max_tokens": 1_000_000}})
    assert (await api.run(session, "hello"))["status"] == "succeeded"


async def test_a_table_of_ones_own_gives_a_price(start, tmp_path):
    table = tmp_path / "prices.yaml"
    table.write_text("models: {some-model: {input: 1, output: 2, cache_write: 3, cache_read: 4}}")
    api = await start(prices_file=table)
    session = await api.session(model="some-model-of-tomorrow", budget={"max_usd": 100})
    result = await api.run(session, "hello")
    usage = result["usage"]
    price = {"input_tokens": 1, "output_tokens": 2, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 4}
    assert result["cost_usd"] == pytest.approx(sum(usage[name] * price[name] for name in price) / 1e6)


async def test_budgets_of_the_settings_hold_where_there_is_no_other(start):
    api = await start(budgets={"session": {"max_tokens": 0}, "turn": {"max_tokens": 10**9}})
    reached(await api.run(await api.session(), "hello"), "the session's budget of 0 tokens")
    assert (await api.run(await api.session(budget={}), "hello"))["status"] == "succeeded"


@pytest.mark.parametrize("unit", ["max_usd", "max_tokens"])
@pytest.mark.parametrize("scope", ["turn", "session", "user", "user_day"])
async def test_each_budget_of_the_settings_is_held(start, scope, unit):
    api = await start(budgets={scope: {unit: 0}})
    result = await api.run(await api.session(), "hello")
    assert (result["status"], result["stop_reason"]) == ("failed", "budget_reached")
    named = {
        "turn": "the turn",
        "session": "the session",
        "user": "the user",
        "user_day": "the daily budget of the user",
    }
    assert named[scope] in result["error"]["message"]
    assert ("$" in result["error"]["message"] or "USD" in result["error"]["message"]) == (unit == "max_usd")


async def test_a_fork_has_the_budget_of_its_source(api):
    session = await api.session(budget={"max_tokens": 123})
    fork = await api.ask("POST", f"/sessions/{session}/fork", json={})
    assert fork["budget"] == {"max_usd": None, "max_tokens": 123}


async def test_twenty_sessions_of_one_user_never_overspend_together(start):
    api = await start(budgets={"user": {"max_tokens": 0}})
    store = api.server.services.store
    await store.write(lambda tx: tx.users.ensure("admin", utc_now()))
    await store.write(lambda tx: tx.users.update("admin", budget=Budget()))
    await counted(api)
    before = await spent(api)
    # A request of these is bounded by what the first one had, and takes as much.
    each = tokens(before)
    limit = tokens(before) + 5 * each + ROOM_TOKENS
    await store.write(lambda tx: tx.users.update("admin", budget=Budget(max_tokens=limit)))
    sessions = [await api.session(model=MODEL) for _ in range(20)]
    over: list[int] = []
    watching = asyncio.create_task(watch(store, over), name="watch")
    results = await asyncio.gather(
        *(api.run(session, "[[say: one]] [[bash: true]] [[say: two]]") for session in sessions)
    )
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    after = await spent(api)
    assert tokens(after) <= limit
    assert max(over) <= limit, "not even what is held with what is spent"
    assert after["requests"] - before["requests"] >= 3
    ends = [(result["status"], result["stop_reason"]) for result in results]
    assert set(ends) <= {("succeeded", "end_turn"), ("failed", "budget_reached")}
    assert ends.count(("failed", "budget_reached")) >= 15
    (account,) = [a for a in (await api.ask("GET", "/usage/budgets"))["data"] if a["kind"] == "user"]
    assert (account["reserved_tokens"], account["spent_tokens"]) == (0, tokens(after))
    assert account["left_tokens"] == limit - tokens(after)


async def watch(store: Any, seen: list[int]) -> None:
    def both(tx: Any) -> int:
        which = abc.UsageFilter(user_id="admin")
        (gone,) = tx.usage.sums(which)
        held: int = tx.usage.reserved(which)[0]
        return gone.usage.total + held

    while True:
        # A writing transaction: what it sees is one moment.
        seen.append(await store.write(both))
        await asyncio.sleep(0.005)


async def test_an_interrupted_request_is_charged_for_what_came_of_it(api):
    session = await api.session(model=MODEL)
    turn = await api.send(session, "[[count: 2000 @100]]")
    async with api.stream("GET", f"/sessions/{session}/events", params={"deltas": True}) as stream:
        async for frame in stream:
            if frame["event"] == "delta" and frame["data"]["text"].startswith("50"):
                break
    await api.ask("POST", f"/sessions/{session}/interrupt", 202)
    recorded = await api.until_event(session, "usage.recorded", turn)
    assert recorded["data"]["usage"]["output_tokens"] >= 50
    (row,) = (await api.ask("GET", "/usage", params={"group_by": "turn", "turn_id": turn}))["data"]
    told = await api.ask("GET", f"/sessions/{session}/turns/{turn}")
    assert told["cost_usd"] == pytest.approx(row["cost_usd"]) == pytest.approx(recorded["data"]["cost_usd"])
