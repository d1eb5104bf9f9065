"""Limits: sessions, turns at work, and who is next among those that wait."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from carrel import abc
from carrel.errors import QueueFull, SessionLimitReached
from carrel.model import Principal, SessionStatus, TurnStatus, new_id
from carrel.protocol.spec import CreateSession, CreateTurn
from carrel.sessions import steps
from carrel.sessions.admission import fair_order
from carrel.sessions.service import ServiceOptions

T0 = datetime(2026, 1, 1, tzinfo=UTC)
ALICE, BOB = Principal.of_user("alice"), Principal.of_user("bob")


def waiting(name: str, owner: str, *, second: int, running: int = 0, last: int | None = None) -> abc.WaitingTurn:
    return abc.WaitingTurn(
        turn_id=name,
        session_id=name,
        owner=owner,
        created_at=T0 + timedelta(seconds=second),
        running=running,
        last_started_at=None if last is None else T0 + timedelta(seconds=last),
    )


def names(turns: list[abc.WaitingTurn]) -> list[str]:
    return [turn.turn_id for turn in turns]


def test_users_take_turns_however_many_each_has_queued() -> None:
    many = [waiting(f"a{i}", "alice", second=i) for i in range(4)]
    late = [waiting("b0", "bob", second=10), waiting("c0", "carol", second=11), waiting("b1", "bob", second=12)]
    assert names(fair_order([*many, *late])) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_who_has_fewer_at_work_comes_first_then_who_has_waited_longer() -> None:
    turns = [
        waiting("busy", "alice", second=0, running=2),
        waiting("recent", "bob", second=1, running=1, last=9),
        waiting("long ago", "carol", second=2, running=1, last=5),
        waiting("idle", "dave", second=3),
    ]
    assert names(fair_order(turns)) == ["idle", "long ago", "recent", "busy"]


@pytest.mark.parametrize("options", [{"max_sessions": 7}, {"max_sessions_per_user": 7}])
async def test_fifty_at_once_pass_exactly_to_the_limit(open_gateway, options) -> None:
    gateway = await open_gateway(service_options=ServiceOptions(**options))
    made = await asyncio.gather(*(gateway.create() for _ in range(50)), return_exceptions=True)
    refused = [error for error in made if isinstance(error, BaseException)]
    assert len(made) - len(refused) == 7
    assert all(isinstance(error, SessionLimitReached) and error.retry_after_seconds for error in refused)
    await gateway.service.delete(ALICE, next(s.id for s in made if not isinstance(s, BaseException)))
    await gateway.create()
    with pytest.raises(SessionLimitReached):
        await gateway.create()


async def test_a_limit_of_one_user_leaves_the_others_alone(open_gateway) -> None:
    gateway = await open_gateway(service_options=ServiceOptions(max_sessions_per_user=1))
    session = await gateway.create()
    with pytest.raises(SessionLimitReached, match="This user has 1 sessions"):
        await gateway.service.fork(ALICE, session.id, None)
    await gateway.service.create(BOB, CreateSession())
    await gateway.store.write(lambda tx: tx.users.update("alice", max_sessions=2))
    await gateway.create()
    with pytest.raises(SessionLimitReached):
        await gateway.create()


async def test_turns_over_the_limit_wait_and_the_users_take_turns(open_gateway, host) -> None:
    at_work: set[str] = set()
    most = 0
    order: list[str] = []
    go = asyncio.Event()

    async def count(turn) -> None:
        nonlocal most
        order.append(turn.prompt)
        at_work.add(turn.prompt)
        most = max(most, len(at_work))
        await go.wait()
        await asyncio.sleep(0.01)
        at_work.discard(turn.prompt)
        turn.finish()

    host.scripts |= {f"count {name}": count for name in ("a0", "a1", "a2", "a3", "a4", "a5", "b")}
    gateway = await open_gateway(max_concurrent_turns=2)
    turns = []
    for i in range(6):
        session = await gateway.create()
        turns.append(await gateway.prompt(session.id, f"count a{i}"))
    bobs = await gateway.service.create(BOB, CreateSession())
    turn, _ = await gateway.service.create_turn(BOB, bobs.id, CreateTurn(prompt="count b"))
    queued = [e for e in await gateway.service.events(BOB, bobs.id, after=0, limit=9) if e.type == "turn.queued"]
    assert queued[0].data["place"] == 0, "bob has nothing at work, so he is next although five wait"
    last = (await gateway.service.events(ALICE, turns[-1].session_id, after=0, limit=9))[-1]
    assert (last.type, last.data["place"]) == ("turn.queued", 3), "four wait before it but its own user's come first"
    go.set()
    for item in turns:
        assert (await gateway.ended(item)).status is TurnStatus.SUCCEEDED
    await gateway.service.wait_for_turn(BOB, bobs.id, turn.id, after=0)
    assert most == 2
    assert order.index("count b") <= 3, order
    of_alice = [name for name in order if name != "count b"]
    assert all(abs(of_alice.index(f"count a{i}") - i) <= 1 for i in range(6)), "two start at once, in either order"


async def test_who_waits_goes_on_after_a_restart(open_gateway, host, eventually) -> None:
    first = await open_gateway(max_concurrent_turns=1)
    working = await first.create()
    held = await first.prompt(working.id, "hold")
    await eventually(lambda: host.alive)
    waiting_sessions = [await first.create() for _ in range(3)]
    turns = [await first.prompt(session.id, "hello") for session in waiting_sessions]
    await first.__aexit__(None, None, None)
    second = await open_gateway(max_concurrent_turns=1)
    assert (await second.service.turn(ALICE, working.id, held.id)).status is TurnStatus.RUNNING
    for turn in turns:
        assert (await second.service.turn(ALICE, turn.session_id, turn.id)).status is TurnStatus.QUEUED
    await second.service.interrupt(ALICE, working.id)
    for turn in turns:
        assert (await second.ended(turn)).status is TurnStatus.SUCCEEDED


async def test_no_more_may_wait_than_the_server_has_room_for(open_gateway) -> None:
    options = ServiceOptions(max_waiting_turns=2)
    gateway = await open_gateway(max_concurrent_turns=1, service_options=options)
    held = await gateway.create()
    await gateway.prompt(held.id, "hold")
    await gateway.until(held.id, SessionStatus.RUNNING)
    sessions = [await gateway.create() for _ in range(3)]
    turns = [await gateway.prompt(session.id, "hello") for session in sessions[:2]]
    with pytest.raises(QueueFull, match="On this server there are already 2 turns queued"):
        await gateway.prompt(sessions[2].id, "hello")
    await gateway.service.interrupt(ALICE, held.id)
    for turn in turns:
        await gateway.ended(turn)
    await gateway.run(sessions[2].id, "hello")


async def test_a_session_that_waits_for_a_place_can_be_cancelled_stopped_and_deleted(open_gateway, host, eventually):
    gateway = await open_gateway(max_concurrent_turns=1)
    held = await gateway.create()
    await gateway.prompt(held.id, "hold")
    await eventually(lambda: host.alive)
    cancelled, stopped, deleted = [await gateway.create() for _ in range(3)]
    turns = [await gateway.prompt(session.id, "hello") for session in (cancelled, stopped, deleted)]
    await gateway.service.cancel_turn(ALICE, cancelled.id, turns[0].id)
    await gateway.service.stop(ALICE, stopped.id)
    await gateway.service.delete(ALICE, deleted.id)
    assert len(host.alive) == 1, "nobody who waits has a process"
    await gateway.service.interrupt(ALICE, held.id)
    await gateway.run(cancelled.id, "hello")


async def test_no_sandbox_is_launched_for_a_turn_that_was_cancelled_meanwhile(open_gateway):
    """The owner reads the rows, and stores the sandbox in a transaction of its own."""
    gateway = await open_gateway()
    session = await gateway.create()
    spec = abc.LaunchSpec(
        sandbox_id=new_id(),
        session_id=session.id,
        session_number=session.number,
        generation=session.generation + 1,
        link_token="l",
        agent_token="a",
        workspace="/w",
        home="/h",
        owner=None,
    )
    stored = await gateway.store.write(lambda tx: steps.launching(tx, spec, "fake", gateway.admission))
    assert stored is steps.Launching.OUTDATED
    assert await gateway.store.read(lambda tx: tx.sandboxes.current(session.id)) is None
