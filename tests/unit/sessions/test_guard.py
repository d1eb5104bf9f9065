"""The guard ends the one sandbox that runs wild, and frees idle ones when memory is short."""

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from carrel import abc
from carrel.errors import DiskFull, OutOfMemory, SessionNotFound, StoreFull
from carrel.model import Failure, Principal, SandboxStatus, SessionStatus, StopReason, TurnStatus
from carrel.protocol.spec import CreateSession, CreateTurn
from carrel.sessions.memory import Memory
from carrel.store import SqliteStore
from carrel.testing import FakeGateway, FakeHost, FakeRuntime
from carrel.testing.fakes import FakeRunner

MIB = 2**20


def runner_of(host: FakeHost, session_id: str) -> FakeRunner:
    (found,) = [runner for runner in host.alive if runner.spec.session_id == session_id]
    return found


def takes(runner: FakeRunner, mib: int, excess: abc.Excess | None = None) -> None:
    runner.usage = abc.SandboxUsage(memory_bytes=mib * MIB, processes=10, cpu_seconds=1.0, excess=excess)


@pytest.mark.parametrize(
    ("excess", "code"),
    [
        (abc.Excess.MEMORY, "sandbox_out_of_memory"),
        (abc.Excess.PROCESSES, "sandbox_out_of_processes"),
        (abc.Excess.DISK, "sandbox_out_of_disk"),
    ],
)
@pytest.mark.parametrize("on_sandbox_lost", ["fail", "continue"])
async def test_the_one_that_runs_wild_is_ended_alone(
    gateway: FakeGateway, host: FakeHost, excess: abc.Excess, code: str, on_sandbox_lost: str
) -> None:
    wild, neighbour = await gateway.create(), await gateway.create()
    await gateway.run(wild.id, "one")
    turn = await gateway.prompt(wild.id, "hold", on_sandbox_lost=on_sandbox_lost)
    other = await gateway.prompt(neighbour.id, "hold")
    for session in (wild, neighbour):
        await gateway.until(session.id, SessionStatus.RUNNING)
    takes(runner_of(host, wild.id), 9000, excess)
    await gateway.guard.look()
    result = await gateway.ended(turn)
    assert (result.status, result.stop_reason) == (TurnStatus.FAILED, StopReason.ERROR)
    assert result.error is not None
    assert result.error.code == code
    assert (await gateway.until(wild.id, SessionStatus.IDLE)).stop_reason is StopReason.ERROR
    assert [runner.spec.session_id for runner in host.alive] == [neighbour.id]
    assert (await gateway.run(wild.id, "again")).text == "turn 3: again"
    await gateway.service.interrupt(gateway.principal, neighbour.id)
    assert (await gateway.ended(other)).status is TurnStatus.INTERRUPTED


async def test_between_turns_it_is_ended_too(gateway: FakeGateway, host: FakeHost) -> None:
    session = await gateway.create()
    await gateway.run(session.id, "one")
    takes(runner_of(host, session.id), 9000, abc.Excess.MEMORY)
    await gateway.guard.look()
    await gateway.until(session.id, SessionStatus.IDLE)
    assert host.alive == []
    assert (await gateway.run(session.id, "two")).text == "turn 2: two"


async def test_an_agent_that_died_of_it_is_told_so(gateway: FakeGateway, host: FakeHost) -> None:
    """Its runner sees no more than that it is gone; nobody has looked yet."""
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    runner = runner_of(host, session.id)
    takes(runner, 10, abc.Excess.MEMORY)
    runner.fail(Failure(code="sandbox_lost", message="It died."))
    result = await gateway.ended(turn)
    assert result.error is not None
    assert result.error.code == "sandbox_out_of_memory"


async def test_another_reason_of_the_agents_is_kept(gateway: FakeGateway, host: FakeHost) -> None:
    session = await gateway.create()
    turn = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    runner = runner_of(host, session.id)
    takes(runner, 10, abc.Excess.MEMORY)
    runner.fail(Failure(code="spool_full", message="Full."))
    result = await gateway.ended(turn)
    assert result.error is not None
    assert result.error.code == "spool_full"


async def test_what_was_found_is_there_to_be_told(gateway: FakeGateway, host: FakeHost) -> None:
    assert gateway.guard.latest().memory_bytes == 0
    sessions = [await gateway.create() for _ in range(2)]
    for number, session in enumerate(sessions):
        await gateway.run(session.id, "x")
        takes(runner_of(host, session.id), 100 + number)
    await gateway.guard.look()
    found = gateway.guard.latest()
    assert (found.memory_bytes, found.processes) == (201 * MIB, 20)
    assert set(found.sandboxes) == {runner.spec.sandbox_id for runner in host.alive}


# ------------------------------------------------------------------------------------------------------- the soft limit


@pytest.fixture
async def short(open_gateway: Any) -> FakeGateway:
    """A gateway whose sandboxes may take 500 MiB together."""
    gateway: FakeGateway = await open_gateway(memory=Memory(500 * MIB, wait_seconds=0.05))
    return gateway


async def rest(gateway: FakeGateway, count: int) -> list[str]:
    """Sessions that rest, the least recently used first."""
    sessions = [(await gateway.create()).id for _ in range(count)]
    for session_id in sessions:
        gateway.owner.memory.report(0, sessions)
        await gateway.run(session_id, "x")
    return sessions


async def test_idle_ones_are_freed_least_recently_used_first(short: FakeGateway, host: FakeHost) -> None:
    first, second, third, fourth = await rest(short, 4)
    await short.run(first, "used again")
    for session_id in (first, second, third, fourth):
        takes(runner_of(host, session_id), 140)
    await short.guard.look()
    await short.until(second, SessionStatus.IDLE)
    for session_id in (first, third, fourth):
        assert (await short.session(session_id)).status is SessionStatus.READY, "one was enough"
    await short.scheduler.settle(second)
    takes(runner_of(host, first), 300)
    await short.guard.look()
    await short.until(third, SessionStatus.IDLE)
    assert (await short.session(fourth)).status is SessionStatus.READY
    assert (await short.session(first)).status is SessionStatus.READY


async def test_what_is_ending_already_is_counted_as_back(short: FakeGateway, host: FakeHost) -> None:
    first, second, third = await rest(short, 3)
    for session_id in (first, second, third):
        takes(runner_of(host, session_id), 200)
    sandbox_id = runner_of(host, first).spec.sandbox_id
    await short.store.write(lambda tx: tx.sandboxes.update(sandbox_id, status=SandboxStatus.ENDING))
    await short.guard.look()
    for session_id in (second, third):
        assert (await short.session(session_id)).status is SessionStatus.READY


async def test_busy_ones_are_never_freed(short: FakeGateway, host: FakeHost) -> None:
    busy, background = await rest(short, 2)
    turn = await short.prompt(busy, "hold")
    await short.until(busy, SessionStatus.RUNNING)
    runner = runner_of(host, background)
    runner.background(1)
    await asyncio.wait_for(_background(short, runner), 10)
    for session_id in (busy, background):
        takes(runner_of(host, session_id), 900)
    await short.guard.look()
    assert len(host.alive) == 2
    assert (await short.session(background)).status is SessionStatus.READY
    await short.service.interrupt(short.principal, busy)
    await short.ended(turn)


async def _background(gateway: FakeGateway, runner: FakeRunner) -> None:
    while (link := gateway.hub.link(runner.spec.sandbox_id)) is None or link.background_tasks == 0:
        await asyncio.sleep(0.002)


async def test_a_turn_that_comes_at_that_moment_wins(open_gateway: Any, host: FakeHost) -> None:
    """It comes after the guard has looked and before it acts."""
    turns: list[Any] = []

    class RuntimeDuringWhichPromptsCome(FakeRuntime):
        prompts: bool = False

        async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
            found = await super().measure(states)
            if self.prompts:
                turns.append(await gateway.prompt(session_id, "hold"))
            return found

    runtime = RuntimeDuringWhichPromptsCome(host)
    gateway: FakeGateway = await open_gateway(memory=Memory(500 * MIB), wrap_runtime=lambda _: runtime)
    (session_id,) = await rest(gateway, 1)
    takes(runner_of(host, session_id), 900)
    runtime.prompts = True
    await gateway.guard.look()
    runtime.prompts = False
    await gateway.until(session_id, SessionStatus.RUNNING)
    await gateway.service.interrupt(gateway.principal, session_id)
    assert (await gateway.ended(turns[0])).status is TurnStatus.INTERRUPTED
    assert len(host.runners) == 1


async def test_new_work_waits_and_is_refused_while_what_runs_goes_on(short: FakeGateway, host: FakeHost) -> None:
    (busy,) = await rest(short, 1)
    turn = await short.prompt(busy, "hold")
    await short.until(busy, SessionStatus.RUNNING)
    takes(runner_of(host, busy), 600)
    await short.guard.look()
    other = await short.create()
    with pytest.raises(OutOfMemory):
        await short.prompt(other.id, "x")
    assert (await short.session(other.id)).turn_count == 0
    behind = await short.prompt(busy, "behind")
    waiting = asyncio.create_task(_patient(short, other.id))
    takes(runner_of(host, busy), 100)
    await short.guard.look()
    assert (await short.ended(await waiting)).status is TurnStatus.SUCCEEDED
    await short.service.interrupt(short.principal, busy)
    await short.ended(turn)
    assert (await short.ended(behind)).status is TurnStatus.SUCCEEDED


async def test_who_waits_for_a_place_gives_memory_to_whom_it_belongs(open_gateway: Any, host: FakeHost) -> None:
    """Without this, one user's place waits for the memory of others', whose turns wait for that place: for ever."""
    gateway: FakeGateway = await open_gateway(memory=Memory(500 * MIB, wait_seconds=20), max_concurrent_turns=1)
    first, second = await rest(gateway, 2)
    held = await gateway.prompt(first, "hold")
    await gateway.until(first, SessionStatus.RUNNING)
    waiting = [await gateway.prompt(session, "later") for session in (first, second)]
    bob = Principal.of_user("bob")
    session = await gateway.service.create(bob, CreateSession())
    turn, _ = await gateway.service.create_turn(bob, session.id, CreateTurn(prompt="mine comes next"))
    for resting in (first, second):
        takes(runner_of(host, resting), 300)
    await gateway.guard.look()
    assert len(host.alive) == 2, "one of them is at work, and the place of the other's turn is not taken yet"
    await gateway.service.interrupt(gateway.principal, first)
    await gateway.ended(held)
    over = asyncio.create_task(gateway.service.wait_for_turn(bob, session.id, turn.id, after=0))
    async with asyncio.timeout(20):
        while not over.done():
            await gateway.guard.look()
            await asyncio.sleep(0.02)
    assert over.result().status is TurnStatus.SUCCEEDED
    for item in waiting:
        async with asyncio.timeout(20):
            ended = asyncio.create_task(gateway.ended(item))
            while not ended.done():
                await gateway.guard.look()
                await asyncio.sleep(0.02)
        assert ended.result().status is TurnStatus.SUCCEEDED


async def _patient(gateway: FakeGateway, session_id: str) -> Any:
    while True:
        try:
            return await gateway.prompt(session_id, "x")
        except OutOfMemory:
            await asyncio.sleep(0)


async def test_a_turn_that_is_queued_waits_for_its_sandbox(short: FakeGateway, host: FakeHost) -> None:
    (busy,) = await rest(short, 1)
    other = await short.create()
    turn = await short.prompt(busy, "hold")
    await short.until(busy, SessionStatus.RUNNING)
    takes(runner_of(host, busy), 600)
    await short.guard.look()
    short.owner.memory._expected[other.id] = 0.0  # admitted, and so late that it no longer counts
    queued = await short.store.write(
        lambda tx: short.service.queue(tx, tx.sessions.get(other.id), _prompt(), None, {})  # type: ignore[arg-type]
    )
    short.scheduler.poke(other.id)
    await short.scheduler.settle(other.id)
    assert [runner.spec.session_id for runner in host.alive] == [busy]
    takes(runner_of(host, busy), 100)
    await short.guard.look()
    assert (await short.ended(queued[0])).status is TurnStatus.SUCCEEDED
    await short.service.interrupt(short.principal, busy)
    await short.ended(turn)


def _prompt() -> Any:
    return CreateTurn(prompt="x")


async def test_a_foreign_session_is_not_found_however_full_it_is(short: FakeGateway, host: FakeHost) -> None:
    (own,) = await rest(short, 1)
    short.owner.memory.report(10_000 * MIB, [])
    for session_id in (own, "none"):
        with pytest.raises(SessionNotFound):
            await short.service.create_turn(Principal.of_user("bob"), session_id, CreateTurn(prompt="x"))


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_session_whose_folders_find_no_room_fails_its_turn_and_can_be_used_later(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    session = await gateway.create()

    def full(*_: object) -> None:
        raise OSError(number, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.folders, "make", full)
        result = await gateway.run(session.id, "one")
    assert result.error is not None
    assert result.error.code == "disk_full"
    assert (await gateway.session(session.id)).status is SessionStatus.IDLE
    assert (await gateway.run(session.id, "two")).status is TurnStatus.SUCCEEDED


async def test_a_sandbox_that_finds_no_room_fails_its_turn_and_can_be_used_later(
    open_gateway: Any, host: FakeHost
) -> None:
    class RuntimeWithoutRoom(FakeRuntime):
        full = True

        async def launch(self, spec: abc.LaunchSpec) -> AsyncIterator[dict[str, Any]]:
            async for state in super().launch(spec):
                yield state
                if self.full:
                    raise DiskFull

    runtime = RuntimeWithoutRoom(host)
    gateway: FakeGateway = await open_gateway(wrap_runtime=lambda _: runtime)
    session = await gateway.create()
    result = await gateway.run(session.id, "one")
    assert result.error is not None
    assert result.error.code == "disk_full"
    await gateway.until(session.id, SessionStatus.IDLE)
    runtime.full = False
    assert (await gateway.run(session.id, "two")).status is TurnStatus.SUCCEEDED
    assert len(host.alive) == 1


async def test_frames_that_are_not_stored_wait_and_none_is_lost(open_gateway: Any) -> None:
    class StoreThatIsFull(SqliteStore):
        failing = 0

        async def write(self, work: Any) -> Any:
            if self.failing and "_store_frames" in work.__qualname__:
                self.failing -= 1
                raise StoreFull
            return await super().write(work)

    stores: list[StoreThatIsFull] = []

    def wrap(inner: SqliteStore) -> SqliteStore:
        inner.__class__ = StoreThatIsFull
        stores.append(inner)  # type: ignore[arg-type]
        return inner

    gateway: FakeGateway = await open_gateway(wrap_store=wrap)
    session = await gateway.create()
    await gateway.run(session.id, "one")
    stores[0].failing = 2
    assert (await gateway.run(session.id, "two")).text == "turn 2: two"
    assert stores[0].failing == 0
    numbers = [event.seq for event in await gateway.log(session.id)]
    assert numbers == list(range(1, len(numbers) + 1))
