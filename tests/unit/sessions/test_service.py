"""What callers may do, whole: the real store, owner, hub and streams over fake sandboxes."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from carrel import abc
from carrel.errors import (
    Draining,
    Forbidden,
    InvalidCursor,
    MissingCredential,
    NothingToInterrupt,
    QueueFull,
    SessionFailed,
    SessionNotFound,
    SessionStopped,
    TurnNotCancellable,
    TurnNotFinished,
    TurnNotFound,
)
from carrel.model import PermissionMode, Principal, SessionStatus, StopReason, TurnStatus
from carrel.protocol.events import Delta, StoredEvent
from carrel.protocol.spec import CreateSession, SessionSpec, UpdateSession
from carrel.sessions.service import Mark, ServiceOptions
from carrel.testing import FakeGateway, FakeHost, FakeTurn
from carrel.testing.conformance.store import NOW
from carrel.testing.fakes import FakeRunner
from carrel.testing.faulty import RuntimeThatFailsToLaunch

ALICE = Principal.of_user("alice")
BOB = Principal.of_user("bob")


Story = Callable[[list[StoredEvent]], list[str]]
Eventually = Any
OpenGateway = Any


async def test_one_turn_from_start_to_end(gateway: FakeGateway, host: FakeHost, story: Story) -> None:
    session = await gateway.create(title="first")
    assert (session.status, session.turn_count, host.alive) == (SessionStatus.IDLE, 0, [])
    result = await gateway.run(session.id, "hello")
    assert (result.status, result.stop_reason, result.text) == ("succeeded", "end_turn", "turn 1: hello")
    assert result.num_turns == 1
    assert story(await gateway.log(session.id)) == [
        "session.created",
        "turn.queued",
        "session.status_changed starting",
        "session.status_changed ready",
        "session.status_changed running",
        "turn.started",
        "message.user hello",
        "message.assistant turn 1: hello",
        "turn.completed succeeded",
        "session.status_changed ready",
    ]
    now = await gateway.session(session.id)
    assert (now.status, now.turn_count, now.stop_reason) == (SessionStatus.READY, 1, StopReason.END_TURN)


async def test_a_second_turn_uses_the_same_agent_which_remembers(gateway: FakeGateway, host: FakeHost) -> None:
    session = await gateway.create()
    texts = [(await gateway.run(session.id, p)).text for p in ("a", "b", "c")]
    assert texts == ["turn 1: a", "turn 2: b", "turn 3: c"]
    assert len(host.runners) == 1


async def test_turns_are_run_in_the_order_they_came(gateway: FakeGateway, story: Story) -> None:
    session = await gateway.create()
    turns = [await gateway.prompt(session.id, str(i)) for i in range(6)]
    assert [turn.number for turn in turns] == [1, 2, 3, 4, 5, 6]
    results = await asyncio.gather(*(gateway.ended(turn) for turn in reversed(turns)))
    assert [result.text for result in reversed(results)] == [f"turn {i + 1}: {i}" for i in range(6)]
    log = await gateway.log(session.id)
    running = [e.turn_id for e in log if e.type in ("turn.started", "turn.completed")]
    assert running == [turn.id for turn in turns for _ in range(2)], "one after the other"
    ahead = [event.data["ahead"] for event in log if event.type == "turn.queued"]
    assert ahead[0] == 0
    assert ahead == sorted(ahead)
    story(log)


async def test_tools_and_structured_output_are_in_the_result(gateway: FakeGateway, host: FakeHost) -> None:
    async def work(turn: FakeTurn) -> None:
        turn.say("first ")
        turn.call("Bash", {"command": "ls"}, "a\nb")
        turn.say("second")
        turn.structured_output = {"answer": 42}

    host.scripts["work"] = work
    session = await gateway.create()
    result = await gateway.run(session.id, "work")
    assert result.text == "first second"
    assert [(call.tool, call.result) for call in result.tool_calls] == [("Bash", "a\nb")]
    assert result.structured_output == {"answer": 42}


async def test_interrupt_ends_the_turn_and_the_session_goes_on(gateway: FakeGateway) -> None:
    session = await gateway.create()
    with pytest.raises(NothingToInterrupt):
        await gateway.service.interrupt(ALICE, session.id)
    turn = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    await gateway.service.interrupt(ALICE, session.id)
    result = await gateway.ended(turn)
    assert (result.status, result.stop_reason, result.text) == ("interrupted", "interrupted", "half a ")
    assert (await gateway.run(session.id, "next")).status == "succeeded"
    with pytest.raises(NothingToInterrupt):
        await gateway.service.interrupt(ALICE, session.id, turn.id)


async def test_a_turn_that_takes_too_long_is_interrupted(gateway: FakeGateway) -> None:
    session = await gateway.create()
    result = await gateway.run(session.id, "hold", timeout_seconds=0.1)
    assert (result.status, result.stop_reason) == ("failed", "timeout")
    assert result.error is not None
    assert result.error.code == "turn_timed_out"
    assert (await gateway.run(session.id, "next")).status == "succeeded"


async def test_a_queued_turn_can_be_cancelled_and_no_other(gateway: FakeGateway) -> None:
    session = await gateway.create()
    running, queued, last = [await gateway.prompt(session.id, p) for p in ("hold", "never", "last")]
    await gateway.until(session.id, SessionStatus.RUNNING)
    with pytest.raises(TurnNotCancellable):
        await gateway.service.cancel_turn(ALICE, session.id, running.id)
    cancelled = await gateway.service.cancel_turn(ALICE, session.id, queued.id)
    assert cancelled.status is TurnStatus.CANCELLED
    assert (await gateway.ended(queued)).status == "cancelled"
    with pytest.raises(TurnNotCancellable):
        await gateway.service.cancel_turn(ALICE, session.id, queued.id)
    await gateway.service.interrupt(ALICE, session.id)
    assert (await gateway.ended(last)).text == "turn 2: last", "the cancelled one never reached the agent"


async def test_a_turn_that_waits_too_long_expires_while_another_runs(gateway: FakeGateway) -> None:
    session = await gateway.create()
    running = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    waiting = await gateway.prompt(session.id, "never", queue_timeout_seconds=0.1)
    async with asyncio.timeout(5):
        assert (await gateway.ended(waiting)).status == "expired"
    assert (await gateway.service.turn(ALICE, session.id, running.id)).status is TurnStatus.RUNNING


async def test_stop_ends_everything_and_resume_goes_on(gateway: FakeGateway, host: FakeHost, story: Story) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "one")
    running, queued = [await gateway.prompt(session.id, p) for p in ("hold", "never")]
    await gateway.until(session.id, SessionStatus.RUNNING)
    stopped = await gateway.service.stop(ALICE, session.id)
    assert (stopped.status, host.alive, host.remains) == (SessionStatus.STOPPED, [], set())
    assert (await gateway.ended(running)).status == "interrupted"
    assert (await gateway.ended(queued)).status == "cancelled"
    with pytest.raises(SessionStopped):
        await gateway.prompt(session.id, "refused")
    assert (await gateway.service.stop(ALICE, session.id)).status is SessionStatus.STOPPED
    assert (await gateway.service.resume(ALICE, session.id)).status is SessionStatus.IDLE
    assert (await gateway.run(session.id, "two")).text == "turn 3: two"
    log = story(await gateway.log(session.id))
    assert [line for line in log if line.startswith("turn.completed")] == [
        "turn.completed succeeded", "turn.completed interrupted", "turn.completed cancelled", "turn.completed succeeded",
    ]  # fmt: skip


async def test_deleted_stays_deleted(gateway: FakeGateway, host: FakeHost) -> None:
    session, other = await gateway.create(), await gateway.create()
    await gateway.run(other.id, "stays")
    await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    seen: list[str] = []

    async def view() -> None:
        async for batch in gateway.streams.follow(session.id, after=0):
            seen.extend(frame.type for frame in batch if isinstance(frame, StoredEvent))

    viewing = asyncio.ensure_future(view())
    await gateway.service.delete(ALICE, session.id)
    await asyncio.wait_for(viewing, 5)
    assert seen[-1] == "session.deleted"
    assert [runner.spec.session_id for runner in host.alive] == [other.id]
    for call in (gateway.session(session.id), gateway.service.delete(ALICE, session.id)):
        with pytest.raises(SessionNotFound):
            await call
    assert [s.id for s in (await gateway.service.page(ALICE, status=None, cursor=None, limit=9)).items] == [other.id]
    assert not (gateway.folders._root / session.id).exists()
    assert (gateway.folders._root / other.id).exists()

    def rows(tx: abc.Transaction) -> dict[str, int]:
        connection = tx.events._connection  # type: ignore[attr-defined]
        tables = ("turns", "events", "sandboxes", "transcript_entries", "usage")
        query = "SELECT count(*) FROM {} WHERE session_id = :s"
        return {table: connection.execute(text(query.format(table)), {"s": session.id}).scalar() for table in tables}

    assert set((await gateway.store.read(rows)).values()) == {0}


async def test_a_session_that_is_not_used_for_its_time_to_live_is_deleted(
    gateway: FakeGateway, eventually: Eventually
) -> None:
    session = await gateway.create(ttl_seconds=1)
    used = await gateway.create(ttl_seconds=3_600)
    await gateway.store.write(lambda tx: tx.sessions.update(session.id, expires_at=NOW))
    await gateway.reconciler.sweep()
    await gateway.scheduler.settle(session.id)
    await gateway.scheduler.settle(session.id)
    with pytest.raises(SessionNotFound):
        await gateway.session(session.id)
    assert (await gateway.session(used.id)).expires_at is not None


async def test_without_a_credential_a_turn_fails_at_once(open_gateway: OpenGateway, host: FakeHost) -> None:
    def missing() -> None:
        raise MissingCredential

    gateway = await open_gateway(check_model=missing)
    session = await gateway.create()
    turns = [await gateway.prompt(session.id, "x") for _ in range(2)]
    for turn in turns:
        result = await gateway.ended(turn)
        assert (result.status, result.stop_reason) == ("failed", "error")
        assert result.error is not None
        assert result.error.code == "missing_credential"
        assert "ANTHROPIC_API_KEY" in result.error.message
    assert host.runners == {}
    assert (await gateway.session(session.id)).status is SessionStatus.IDLE


async def test_a_fork_goes_on_from_the_end_of_a_turn(gateway: FakeGateway, host: FakeHost) -> None:
    session = await gateway.create(title="t", metadata={"a": 1})
    turns = []
    for prompt in ("one", "two", "three"):
        turns.append(await gateway.prompt(session.id, prompt))
        await gateway.ended(turns[-1])
    fork = await gateway.service.fork(ALICE, session.id, turns[1].id)
    assert (fork.forked_from, fork.title, fork.metadata, fork.turn_count) == (session.id, "t", {"a": 1}, 0)
    assert (await gateway.run(fork.id, "other")).text == "turn 3: other"
    assert (await gateway.run(session.id, "four")).text == "turn 4: four", "the source knows nothing of it"
    whole = await gateway.service.fork(ALICE, session.id, None)
    assert (await gateway.run(whole.id, "five")).text == "turn 5: five"
    created = (await gateway.log(fork.id))[0].data
    assert (created["forked_from"], created["forked_at_turn"]) == (session.id, turns[1].id)
    agents = {runner.spec.session_id: runner._agent_session_id for runner in host.alive}
    assert len(set(agents.values())) == 3, "each conversation has an id of its own"
    lines = await gateway.store.read(lambda tx: tx.transcripts.page(fork.id, "", after=0, limit=99))
    assert {json.loads(line)["sessionId"] for _, line in lines} == {agents[fork.id]}


async def test_a_fork_of_a_fork_that_has_said_nothing_yet_remembers(gateway: FakeGateway) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "one")
    again = await gateway.service.fork(ALICE, (await gateway.service.fork(ALICE, session.id, None)).id, None)
    assert (await gateway.run(again.id, "two")).text == "turn 2: two"


async def test_a_fork_copies_the_files_as_they_are(gateway: FakeGateway) -> None:
    session = await gateway.create()
    await asyncio.to_thread(gateway.folders.make, session)
    workspace = gateway.folders.workspace(session)
    with open(f"{workspace}/file", "w") as file:  # noqa: ASYNC230
        file.write("content")
    fork = await gateway.service.fork(ALICE, session.id, None)
    copied = gateway.folders.workspace(fork)
    with open(f"{copied}/file") as file:  # noqa: ASYNC230
        assert file.read() == "content"


async def test_a_turn_that_runs_cannot_be_forked_at(gateway: FakeGateway) -> None:
    session, other = await gateway.create(), await gateway.create()
    turn = await gateway.prompt(session.id, "hold")
    with pytest.raises(TurnNotFinished):
        await gateway.service.fork(ALICE, session.id, turn.id)
    with pytest.raises(TurnNotFound):
        await gateway.service.fork(ALICE, other.id, turn.id)
    page = await gateway.service.page(ALICE, status=None, cursor=None, limit=9)
    assert len(page.items) == 2, "nothing was made"


async def test_nobody_reaches_another_principals_session(gateway: FakeGateway) -> None:
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "hello")
    service = gateway.service
    calls = [
        service.get(BOB, session.id),
        service.update(BOB, session.id, UpdateSession(title="x")),
        service.delete(BOB, session.id),
        service.stop(BOB, session.id),
        service.resume(BOB, session.id),
        service.interrupt(BOB, session.id),
        service.fork(BOB, session.id, None),
        service.export(BOB, session.id),
        service.turn(BOB, session.id, turn.id),
        service.turns(BOB, session.id, cursor=None, limit=5),
        service.cancel_turn(BOB, session.id, turn.id),
        service.events(BOB, session.id, after=0, limit=5),
        service.result(BOB, session.id, turn.id),
    ]
    for call in calls:
        with pytest.raises(SessionNotFound):
            await call
    assert (await service.page(BOB, status=None, cursor=None, limit=5)).items == []
    with pytest.raises(InvalidCursor):
        await service.page(ALICE, status=None, cursor="?", limit=5)
    other = await gateway.create()
    with pytest.raises(TurnNotFound):
        await service.turn(ALICE, other.id, turn.id)
    await gateway.ended(turn)


async def test_the_queue_is_bounded(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(service_options=ServiceOptions(max_queued_turns=2))
    session = await gateway.create()
    await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    for _ in range(2):
        await gateway.prompt(session.id, "x")
    with pytest.raises(QueueFull):
        await gateway.prompt(session.id, "x")
    page = await gateway.service.turns(ALICE, session.id, cursor=None, limit=9)
    assert [turn.number for turn in page.items] == [3, 2, 1]


async def test_bypass_is_refused_where_it_is_not_allowed(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(service_options=ServiceOptions(allow_bypass=False))
    with pytest.raises(Forbidden):
        await gateway.create(permission_mode="bypassPermissions")
    session = await gateway.create(permission_mode="plan")
    with pytest.raises(Forbidden):
        await gateway.service.update(ALICE, session.id, UpdateSession(permission_mode=PermissionMode.BYPASS))


async def test_what_a_creator_does_not_name_comes_from_the_defaults(open_gateway: OpenGateway) -> None:
    defaults = SessionSpec(system_prompt="be brief", model="one", permission_mode=PermissionMode.PLAN)
    gateway = await open_gateway(service_options=ServiceOptions(defaults=defaults, default_ttl_seconds=60))
    session = await gateway.create(model="two")
    assert session.spec == {"system_prompt": "be brief", "model": "two", "permission_mode": "plan"}
    assert session.ttl_seconds == 60
    assert (await gateway.create(ttl_seconds=7)).ttl_seconds == 7
    added = await gateway.create(append_system_prompt="and kind")
    assert "system_prompt" not in added.spec
    changed = await gateway.service.update(ALICE, session.id, UpdateSession(model=None, effort="low"))
    assert changed.spec == session.spec | {"model": "one", "effort": "low"}
    changed = await gateway.service.update(
        ALICE, session.id, UpdateSession(system_prompt=None, append_system_prompt="and kind")
    )
    assert changed.spec["append_system_prompt"] == "and kind"
    assert "system_prompt" not in changed.spec


async def test_some_options_reach_a_running_agent_and_the_others_its_next_start(
    gateway: FakeGateway, runner_of: Callable[[], FakeRunner], eventually: Eventually
) -> None:
    session = await gateway.create(model="one", system_prompt="be brief")
    await gateway.run(session.id, "hello")
    runner = runner_of()
    assert runner.bind is not None
    assert (runner.model, runner.permission_mode) == ("one", "bypassPermissions")
    body = UpdateSession.model_validate({"model": "two", "permission_mode": "plan", "tools": ["Bash"], "title": "new"})
    updated = await gateway.service.update(ALICE, session.id, body)
    assert (updated.title, updated.spec["model"], updated.spec["tools"]) == ("new", "two", ["Bash"])
    await eventually(lambda: (runner.model, runner.permission_mode) == ("two", "plan"))
    assert runner.bind.spec.tools is None
    event = next(e for e in await gateway.log(session.id) if e.type == "session.updated").data
    assert event == {"changed": ["model", "permission_mode", "title", "tools"], "at_next_launch": ["tools"]}
    await gateway.service.stop(ALICE, session.id)
    await gateway.service.resume(ALICE, session.id)
    await gateway.run(session.id, "again")
    bind = runner_of().bind
    assert bind is not None
    assert (bind.spec.tools, bind.spec.system_prompt, bind.permission_mode) == (["Bash"], "be brief", "plan")
    cleared = await gateway.service.update(ALICE, session.id, UpdateSession.model_validate({"tools": None}))
    assert "tools" not in cleared.spec
    seq = (await gateway.session(session.id)).last_seq
    await gateway.service.update(ALICE, session.id, UpdateSession())
    assert (await gateway.session(session.id)).last_seq == seq, "nothing given, nothing said"


async def test_a_turn_may_bring_its_own_model(gateway: FakeGateway, runner_of: Callable[[], FakeRunner]) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "hello", model="other")
    assert runner_of().model == "other"


async def test_an_export_has_everything(gateway: FakeGateway) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "hello")
    lines = [json.loads(line) async for line in await gateway.service.export(ALICE, session.id)]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "session"
    assert list(dict.fromkeys(kinds)) == ["session", "turn", "event", "transcript"]
    assert kinds.count("event") == 10
    assert kinds.count("transcript") == 2
    assert "alice" not in json.dumps(lines[0]), "what is private to us stays so"


async def test_a_request_notes_what_it_made_in_the_transaction_that_made_it(gateway: FakeGateway) -> None:
    record = abc.IdempotencyRecord(
        principal="alice", key="k", fingerprint="f", boot_id="b", object_id=None, status=None, body=None, created_at=NOW
    )
    await gateway.store.write(lambda tx: tx.idempotency.reserve(record))
    session = await gateway.service.create(ALICE, CreateSession(), Mark("alice", "k"))
    found = await gateway.store.write(lambda tx: tx.idempotency.reserve(record))
    assert found is not None
    assert found.object_id == session.id


async def test_a_draining_server_takes_no_turns_and_starts_none(
    gateway: FakeGateway, host: FakeHost, eventually: Eventually
) -> None:
    session, other = await gateway.create(), await gateway.create()
    running = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    queued = await gateway.prompt(session.id, "waits")
    gateway.owner.draining = True
    with pytest.raises(Draining):
        await gateway.prompt(other.id, "refused")
    await gateway.service.interrupt(ALICE, session.id)
    assert (await gateway.ended(running)).status == "interrupted"
    await gateway.scheduler.settle(session.id)
    assert (await gateway.service.turn(ALICE, session.id, queued.id)).status is TurnStatus.QUEUED
    gateway.owner.draining = False
    gateway.service.poke(session.id)
    assert (await gateway.ended(queued)).status == "succeeded"


async def test_a_session_that_could_not_start_says_why_and_may_try_again(
    open_gateway: OpenGateway, host: FakeHost
) -> None:
    gateway = await open_gateway(wrap_runtime=lambda runtime: RuntimeThatFailsToLaunch(runtime, times=1))
    session = await gateway.create()
    result = await gateway.run(session.id, "x")
    assert (result.status, result.stop_reason) == ("failed", "error")
    assert result.error is not None
    assert result.error.code == "sandbox_launch_failed"
    assert "purpose" not in result.error.message, "that is for the operator"
    failed = await gateway.until(session.id, SessionStatus.FAILED)
    assert failed.error == result.error
    with pytest.raises(SessionFailed):
        await gateway.prompt(session.id, "x")
    await gateway.scheduler.settle(session.id)
    assert (host.alive, host.remains) == ([], set())
    assert (await gateway.service.resume(ALICE, session.id)).error is None
    assert (await gateway.run(session.id, "x")).status == "succeeded"


async def test_many_viewers_see_the_same_thing(gateway: FakeGateway, host: FakeHost) -> None:
    async def speak(turn: FakeTurn) -> None:
        for i in range(10):
            turn.say(*(f"{i}.{j} " for j in range(10)))
            await asyncio.sleep(0)

    host.scripts["speak"] = speak
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "speak")

    async def view() -> tuple[list[int], str]:
        events, pieces = [], []
        async for batch in gateway.streams.follow(session.id, after=0, deltas=True, until_turn=turn.id):
            events += [frame.seq for frame in batch if isinstance(frame, StoredEvent)]
            pieces += [frame.text for frame in batch if isinstance(frame, Delta)]
        return events, "".join(pieces)

    async with asyncio.timeout(20):
        seen = await asyncio.gather(*(view() for _ in range(20)))
    assert {tuple(events) for events, _ in seen} == {tuple(seen[0][0])}
    whole = "".join(f"{i}.{j} " for i in range(10) for j in range(10))
    assert max(len(said) for _, said in seen) <= len(whole)
    assert (await gateway.ended(turn)).text == whole
