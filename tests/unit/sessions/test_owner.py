"""Life and death of a session's sandbox, and a gateway that is gone at any instant."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carrel import abc
from carrel.errors import AgentStartFailed, SandboxLost
from carrel.model import Failure, Principal, Sandbox, SandboxStatus, SessionStatus, StopReason, TurnStatus, utc_now
from carrel.protocol.events import StoredEvent
from carrel.sessions.owner import OwnerOptions
from carrel.testing import FakeGateway, FakeHost, FakeTurn
from carrel.testing.conformance.store import new_sandbox, new_session, new_turn
from carrel.testing.fakes import FakeRunner
from carrel.testing.faulty import (
    BusThatLosesFrames,
    RuntimeThatDiesAfterStart,
    RuntimeThatNeverConnects,
    StoreThatFailsCommits,
    StoreThatIsSlow,
)

ALICE = Principal.of_user("alice")


Story = Callable[[list[StoredEvent]], list[str]]
RunnerOf = Callable[[], FakeRunner]
Eventually = Any
OpenGateway = Any


def shown(log: list[StoredEvent]) -> list[tuple[str, Any]]:
    """What a log says, ids and times aside."""
    return [(e.type, e.data.get("status") or e.data.get("text") or e.data.get("content")) for e in log]


# -------------------------------------------------------------------------------------------------- idling and waking


async def test_an_idle_session_costs_no_process_and_wakes_on_the_same_conversation(
    open_gateway: OpenGateway, host: FakeHost, story: Story
) -> None:
    gateway = await open_gateway(idle_timeout_seconds=0.1)
    session = await gateway.create()
    await gateway.run(session.id, "one")
    idle = await gateway.until(session.id, SessionStatus.IDLE)
    await gateway.scheduler.settle(session.id)
    assert (host.alive, host.remains) == ([], set())
    assert idle.stop_reason is StopReason.END_TURN
    assert (await gateway.run(session.id, "two")).text == "turn 2: two"
    assert len(host.runners) == 2
    assert [r.spec.generation for r in host.runners.values()] == [1, 2]


async def test_it_wakes_also_where_its_home_was_lost(open_gateway: OpenGateway, host: FakeHost) -> None:
    gateway = await open_gateway(idle_timeout_seconds=0.1)
    session = await gateway.create()
    for prompt in ("one", "two"):
        await gateway.run(session.id, prompt)
    await gateway.until(session.id, SessionStatus.IDLE)
    await gateway.scheduler.settle(session.id)
    host.disks.clear()
    assert (await gateway.run(session.id, "three")).text == "turn 3: three"


async def test_background_tasks_keep_a_session_awake(
    open_gateway: OpenGateway, runner_of: RunnerOf, host: FakeHost
) -> None:
    gateway = await open_gateway(idle_timeout_seconds=0.1)

    async def detach(turn: FakeTurn) -> None:
        turn.runner.background(1)
        turn.say("it goes on")

    host.scripts["detach"] = detach
    session = await gateway.create()
    await gateway.run(session.id, "detach")
    runner = runner_of()
    await gateway.scheduler.settle(session.id)
    await asyncio.sleep(0.25)  # longer than the idle timeout: nothing happens, which nothing tells
    assert (await gateway.session(session.id)).status is SessionStatus.READY
    runner.background(0)
    await gateway.until(session.id, SessionStatus.IDLE)


async def test_a_run_the_agent_begins_by_itself_is_a_turn(gateway: FakeGateway, runner_of: RunnerOf) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "one")

    async def report(turn: FakeTurn) -> None:
        turn.say("the background task is done")

    await runner_of().begin(report)
    async with asyncio.timeout(10):
        while len((page := await gateway.service.turns(ALICE, session.id, cursor=None, limit=9)).items) < 2:
            await asyncio.sleep(0.002)
    result = await gateway.ended(page.items[0])
    assert result.text == "the background task is done"
    turn = await gateway.service.turn(ALICE, session.id, page.items[0].id)
    assert (turn.origin, turn.number, turn.status) == ("agent", 2, TurnStatus.SUCCEEDED)
    assert (await gateway.session(session.id)).turn_count == 2
    assert (await gateway.run(session.id, "two")).status == "succeeded"


# --------------------------------------------------------------------------------------------------------- its death


async def test_a_turn_whose_sandbox_is_lost_fails_and_the_next_one_remembers(
    gateway: FakeGateway, runner_of: RunnerOf, host: FakeHost, story: Story
) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "one")
    turn, queued = [await gateway.prompt(session.id, p) for p in ("hold", "after")]
    await gateway.until(session.id, SessionStatus.RUNNING)
    runner_of().kill()
    result = await gateway.ended(turn)
    assert (result.status, result.stop_reason) == ("failed", "sandbox_lost")
    assert result.error == Failure(code=SandboxLost.code, message=SandboxLost().message)
    assert (await gateway.ended(queued)).text == "turn 3: after"
    assert len(host.remains) == 1, "what the dead one left is cleared away"
    log = story(await gateway.log(session.id))
    lost = log.index("turn.completed failed")
    assert log[lost + 1 : lost + 4] == [
        "session.status_changed idle", "session.status_changed starting", "session.status_changed ready",
    ]  # fmt: skip


async def test_a_turn_that_may_continue_is_taken_up_by_a_new_agent(
    gateway: FakeGateway, runner_of: RunnerOf, host: FakeHost, eventually: Eventually
) -> None:
    async def twice(turn: FakeTurn) -> None:
        if not turn.resumed:
            turn.say("begun ")
            turn.delta("half")
            await asyncio.Event().wait()
        turn.say("finished")

    host.scripts["twice"] = twice
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "twice", on_sandbox_lost="continue")
    seen: list[str] = []

    async def view() -> None:
        async for batch in gateway.streams.follow(session.id, after=0, deltas=True, until_turn=turn.id):
            seen.extend(f"{frame.seq}" if isinstance(frame, StoredEvent) else frame.kind for frame in batch)

    viewing = asyncio.ensure_future(view())
    await eventually(lambda: seen.count("text") == 2)
    runner_of().kill()
    result = await gateway.ended(turn)
    await viewing
    assert (result.status, result.text) == ("succeeded", "begun finished")
    starts = [e.data["attempt"] for e in await gateway.log(session.id) if e.type == "turn.started"]
    assert starts == [1, 2]
    assert seen.count("reset") == 1, "what was half said is made anew, and viewers hear of it"


async def test_a_prompt_is_never_handed_over_twice_by_a_new_sandbox(
    gateway: FakeGateway, runner_of: RunnerOf, host: FakeHost, eventually: Eventually
) -> None:
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "forget")
    await eventually(lambda: host.alive and "start_turn" in runner_of().log)
    runner_of().kill()
    await gateway.ended(turn)
    await gateway.run(session.id, "next")
    told = [line for runner in host.runners.values() for line in runner.log if line == "start_turn"]
    assert len(told) <= 2
    assert runner_of().turns_remembered == 2


async def test_a_sandbox_lost_between_turns_costs_nothing(
    gateway: FakeGateway, runner_of: RunnerOf, host: FakeHost
) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "one")
    runner_of().kill()
    idle = await gateway.until(session.id, SessionStatus.IDLE)
    assert idle.stop_reason is StopReason.END_TURN
    assert (await gateway.run(session.id, "two")).text == "turn 2: two"


async def test_a_runner_that_dies_at_once_is_tried_again_and_then_given_up(open_gateway: OpenGateway) -> None:
    made: list[RuntimeThatDiesAfterStart] = []

    def wrap(runtime: abc.Runtime) -> abc.Runtime:
        made.append(RuntimeThatDiesAfterStart(runtime, times=5))
        return made[0]

    gateway = await open_gateway(wrap_runtime=wrap)
    session = await gateway.create()
    result = await gateway.run(session.id, "x")
    assert (result.status, result.error.code) == ("failed", "sandbox_launch_failed")
    await gateway.until(session.id, SessionStatus.FAILED)
    assert made[0].launches == 3
    await gateway.service.resume(ALICE, session.id)
    assert (await gateway.run(session.id, "y")).status == "succeeded", "two more die, the third lives"
    assert made[0].launches == 6


async def test_a_runner_that_never_connects_is_ended_when_its_time_is_over(open_gateway: OpenGateway) -> None:
    made: list[RuntimeThatNeverConnects] = []

    def wrap(runtime: abc.Runtime) -> abc.Runtime:
        made.append(RuntimeThatNeverConnects(runtime))
        return made[0]

    gateway = await open_gateway(wrap_runtime=wrap, launch_timeout_seconds=0.1)
    session = await gateway.create()
    result = await gateway.run(session.id, "x")
    assert (result.status, result.error.code) == ("failed", "sandbox_launch_failed")
    assert (made[0].launches, await made[0].owned()) == (3, {})


async def test_an_agent_that_cannot_start_fails_the_session_with_its_reason(
    gateway: FakeGateway, host: FakeHost, runner_of: RunnerOf, eventually: Eventually
) -> None:
    async def no_agent(runner: FakeRunner, bind: object) -> None:
        runner.fail(Failure(code=AgentStartFailed.code, message="No."), "the operator's detail")

    original, FakeRunner._work = FakeRunner._work, no_agent  # type: ignore[method-assign,assignment]
    try:
        session = await gateway.create()
        result = await gateway.run(session.id, "x")
    finally:
        FakeRunner._work = original  # type: ignore[method-assign]
    assert (result.status, result.error) == ("failed", Failure(code="agent_start_failed", message="No."))
    assert (await gateway.until(session.id, SessionStatus.FAILED)).error == result.error
    await gateway.scheduler.settle(session.id)
    assert (host.alive, host.remains) == ([], set())


async def test_a_runner_that_stays_away_too_long_is_given_up(
    open_gateway: OpenGateway, host: FakeHost, runner_of: RunnerOf
) -> None:
    gateway = await open_gateway(reconnect_window_seconds=0.1, reconnect_margin_seconds=0.1)
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    runner = runner_of()
    await host.disconnect()
    result = await gateway.ended(turn)
    assert (result.status, result.stop_reason) == ("failed", "sandbox_lost")
    assert not runner.alive, "a second sandbox starts only when the first is gone"


async def test_delete_while_a_sandbox_is_being_launched(open_gateway: OpenGateway, host: FakeHost) -> None:
    held = asyncio.Event()

    class Slow(RuntimeThatDiesAfterStart):
        async def launch(self, spec: abc.LaunchSpec):  # type: ignore[no-untyped-def,override]
            async for state in self._inner.launch(spec):
                yield state
                held.set()
                await asyncio.sleep(0.02)

    gateway = await open_gateway(wrap_runtime=Slow)
    session = await gateway.create()
    await gateway.prompt(session.id, "x")
    await held.wait()
    await gateway.service.delete(ALICE, session.id)
    assert (host.alive, host.remains) == ([], set())


# ---------------------------------------------------------------------------------------------------- the gateway's death


async def test_a_turn_goes_on_over_a_restart_of_the_gateway(
    open_gateway: OpenGateway, host: FakeHost, story: Story, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def long(turn: FakeTurn) -> None:
        turn.say("before ")
        turn.call("Bash", {}, "once")
        turn.delta("over the gap")
        await go_on.wait()
        turn.finish()
        turn.say(" after")

    host.scripts["long"] = long
    unbroken = FakeGateway(host, tmp_path / "unbroken")
    (tmp_path / "unbroken").mkdir()
    async with unbroken:
        go_on.set()
        other = await unbroken.create()
        await unbroken.run(other.id, "long")
        wanted = shown(await unbroken.log(other.id))
        await unbroken.service.delete(ALICE, other.id)
    go_on.clear()

    async with FakeGateway(host, tmp_path) as first:
        session = await first.create()
        turn = await first.prompt(session.id, "long")
        await first.until(session.id, SessionStatus.RUNNING)
    (runner,) = host.alive
    go_on.set()
    gateway = await open_gateway()
    result = await gateway.ended(turn)
    assert (result.status, result.text) == ("succeeded", "before over the gap after")
    assert host.alive == [runner], "the same runner"
    assert runner.connections == 2
    assert shown(await gateway.log(session.id)) == wanted
    story(await gateway.log(session.id))
    assert (await gateway.run(session.id, "next")).text == "turn 2: next"


async def test_what_was_done_while_no_gateway_was_there_arrives_later(host: FakeHost, tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def alone(turn: FakeTurn) -> None:
        await go_on.wait()
        turn.say("nobody was there")

    host.scripts["alone"] = alone
    async with FakeGateway(host, tmp_path) as first:
        session = await first.create()
        turn = await first.prompt(session.id, "alone")
        await first.until(session.id, SessionStatus.RUNNING)
    (runner,) = host.alive
    go_on.set()
    while runner.running is not None:
        await asyncio.sleep(0.001)
    async with FakeGateway(host, tmp_path) as second:
        result = await second.ended(turn)
        assert (result.status, result.text) == ("succeeded", "nobody was there")
        assert (await second.session(session.id)).status is SessionStatus.READY


async def test_a_runner_that_died_with_the_gateway_is_noticed_at_the_next_start(host: FakeHost, tmp_path: Path) -> None:
    async with FakeGateway(host, tmp_path) as first:
        session = await first.create()
        turn, queued = [await first.prompt(session.id, p) for p in ("hold", "next")]
        await first.until(session.id, SessionStatus.RUNNING)
    for runner in host.alive:
        runner.kill()
    async with FakeGateway(host, tmp_path) as second:
        assert (await second.ended(turn)).stop_reason == "sandbox_lost"
        assert (await second.ended(queued)).status == "succeeded"


QUICK = {
    "launch_timeout_seconds": 1.5, "reconnect_window_seconds": 0.1, "reconnect_margin_seconds": 0.05,
    "shutdown_grace_seconds": 1.0,
}  # fmt: skip
BEGUN, FORKED = {"folder": "x"}, {"folder": "x", "pid": 1}
SANDBOXES: list[tuple[SandboxStatus, dict[str, Any]] | None] = [
    None,
    (SandboxStatus.LAUNCHING, {}),
    (SandboxStatus.LAUNCHING, BEGUN),
    (SandboxStatus.LAUNCHING, FORKED),
    (SandboxStatus.LIVE, FORKED),
    (SandboxStatus.ENDING, {}),
    (SandboxStatus.ENDING, FORKED),
    (SandboxStatus.GONE, FORKED),
]


def left_behind(tx: abc.Transaction, status: SessionStatus, sandbox: Sandbox | None, turns: str) -> str:
    """Rows as a dead gateway may leave them: q is a queued turn, r a running one, c one that may continue."""
    session = new_session(tx.sessions.next_number(), status=status, generation=1, agent_session_id=None)
    session = session.model_copy(update={"ttl_seconds": None, "expires_at": None})
    tx.sessions.add(session)
    if sandbox is not None:
        tx.sandboxes.add(sandbox.model_copy(update={"session_id": session.id}))
    for number, kind in enumerate(turns, start=1):
        turn_status = TurnStatus.QUEUED if kind == "q" else TurnStatus.RUNNING
        options = {"on_sandbox_lost": "continue"} if kind == "c" else {}
        owner = None if kind == "q" or sandbox is None else sandbox.id
        tx.turns.add(new_turn(session, number, turn_status, options=options, sandbox_id=owner))
    return session.id


@pytest.mark.slow
async def test_whatever_rows_a_dead_gateway_left_every_session_ends_in_a_true_state(
    host: FakeHost, tmp_path: Path, eventually: Eventually
) -> None:
    """Every mixture of a session's, a sandbox's and its turns' statuses, possible ones and others: no step fails,
    queued turns run, and nothing is called alive that does not live."""
    gateway = FakeGateway(host, tmp_path, owner_options=OwnerOptions(**QUICK))
    made: dict[str, tuple[SessionStatus, Sandbox | None, str]] = {}

    def arrange(tx: abc.Transaction) -> None:
        for status, left, turns in itertools.product(SessionStatus, SANDBOXES, ("", "q", "rq", "cq")):
            if len(turns) > 1 and left not in (None, (SandboxStatus.LIVE, FORKED)):
                continue
            sandbox = None
            if left is not None:
                sandbox = new_sandbox(session, 1, left[0], created_at=utc_now())
                full = {"sandbox_id": sandbox.id} | left[1] if left[1] else {}
                sandbox = sandbox.model_copy(update={"state": full})
            made[left_behind(tx, status, sandbox, turns)] = (status, sandbox, turns)

    async with FakeGateway(host, tmp_path) as writer:
        session = await writer.create()
        await writer.store.write(arrange)
    assert len(made) == 7 * (8 * 2 + 2 * 2)

    def untrue(tx: abc.Transaction, looked_at: list[str]) -> dict[str, object]:
        alive = {runner.spec.session_id for runner in host.alive}
        found: dict[str, object] = {}
        for session_id in looked_at:
            before, sandbox, turns = made[session_id]
            now = tx.sessions.get(session_id)
            assert now is not None
            ended = {turn.number: turn.status for turn in tx.turns.page(session_id, cursor=None, limit=9).items}
            stays = before in (SessionStatus.STOPPED, SessionStatus.FAILED)
            wanted = {i: _end_of(kind) for i, kind in enumerate(turns, start=1)}
            at_rest = now.status in (SessionStatus.IDLE, SessionStatus.READY)
            true = at_rest and (now.status is SessionStatus.READY) is (session_id in alive) and ended == wanted
            if not (now.status is before and session_id not in alive if stays else true):
                found[session_id] = (before, sandbox and (sandbox.status, sandbox.state), turns, now.status, ended)
        return found

    deadline = time.monotonic() + 100
    async with gateway:
        left: dict[str, object] = dict.fromkeys(made)
        # Those that were true are looked at once more in the end: they stay so.
        while left := await gateway.store.read(lambda tx: untrue(tx, list(left)) or untrue(tx, list(made))):
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.3)
            failing = [key for key, work in gateway.scheduler._keys.items() if work.failures]
            assert failing == [], [made[key] for key in failing]


def _end_of(kind: str) -> TurnStatus:
    return TurnStatus.FAILED if kind == "r" else TurnStatus.SUCCEEDED


# ----------------------------------------------------------------------------------------------------- over faulty parts


@pytest.mark.parametrize("every", [3, 4, 7])
async def test_turns_survive_a_store_that_fails_commits(open_gateway: OpenGateway, story: Story, every: int) -> None:
    made: list[StoreThatFailsCommits] = []

    def wrap(store: abc.Store) -> abc.Store:
        made.append(StoreThatFailsCommits(store, every=every))
        made[0].failing = False
        return made[0]

    gateway = await open_gateway(wrap_store=wrap)
    session = await gateway.create()
    for i in range(2):
        turn = await gateway.prompt(session.id, str(i))
        made[0].failing = True
        assert (await gateway.ended(turn)).text == f"turn {i + 1}: {i}"
        made[0].failing = False
    assert made[0].failed > 0
    log = story(await gateway.log(session.id))
    assert log.count("turn.completed succeeded") == 2
    assert log.count("turn.started") == 2


async def test_a_slow_store_and_a_lossy_bus_change_nothing_but_the_pace(
    open_gateway: OpenGateway, story: Story
) -> None:
    gateway = await open_gateway(wrap_store=StoreThatIsSlow, wrap_bus=lambda bus: BusThatLosesFrames(bus, share=0.2))
    session = await gateway.create()
    turns = [await gateway.prompt(session.id, str(i)) for i in range(3)]
    async with asyncio.timeout(15):
        for turn in turns:
            async for _ in gateway.streams.follow(session.id, after=0, until_turn=turn.id, heartbeat_seconds=0.05):
                pass
    assert story(await gateway.log(session.id)).count("turn.completed succeeded") == 3


@pytest.mark.slow
async def test_two_hundred_sessions_at_once(gateway: FakeGateway, host: FakeHost, eventually: Eventually) -> None:
    sessions = await asyncio.gather(*(gateway.create() for _ in range(200)))
    assert len({session.number for session in sessions}) == 200
    results = await asyncio.gather(*(gateway.run(session.id, "hi") for session in sessions[:20]))
    assert {result.text for result in results} == {"turn 1: hi"}
    await asyncio.gather(*(gateway.service.delete(ALICE, session.id) for session in sessions))
    assert (host.alive, host.remains) == ([], set())
    await eventually(lambda: not len(gateway.hub) and not gateway.scheduler._keys)
    assert gateway.live._talks == {}
    assert (gateway.owner._launches, gateway.owner._missed_since) == ({}, {})
