"""Rows and runtimes are brought together at start."""

from pathlib import Path

from carrel import abc
from carrel.model import Principal, SessionStatus
from carrel.sessions.reconciler import Reconciler
from carrel.testing import FakeGateway, FakeHost
from carrel.testing.conformance.runtime import launch
from carrel.testing.faulty import RuntimeThatHidesItsOrphans

ALICE = Principal.of_user("alice")


def stray(folder: Path, number: int) -> abc.LaunchSpec:
    return abc.LaunchSpec(
        sandbox_id=f"stray-{number}", session_id="of nobody's", session_number=number, generation=1, link_token="l",
        agent_token="a", workspace=str(folder), home=str(folder), owner=None,
    )  # fmt: skip


async def test_sandboxes_that_no_row_knows_are_ended(host: FakeHost, tmp_path: Path) -> None:
    async with FakeGateway(host, tmp_path) as first:
        session = await first.create()
        await first.run(session.id, "stays")
        for number in range(3):
            await launch(first.runtime, stray(tmp_path, number))
    (own,) = [runner for runner in host.alive if runner.spec.session_id == session.id]
    async with FakeGateway(host, tmp_path) as second:
        assert host.alive == [own], "before anything else is done"
        assert host.remains == {own.spec.sandbox_id}
        assert (await second.run(session.id, "again")).text == "turn 2: again"


async def test_what_a_row_says_is_gone_is_ended_too(host: FakeHost, tmp_path: Path) -> None:
    async with FakeGateway(host, tmp_path) as gateway:
        session = await gateway.create()
        await gateway.run(session.id, "x")
        (runner,) = host.alive
        await gateway.service.stop(ALICE, session.id)
        host.remains.add(runner.spec.sandbox_id)
        await gateway.reconciler.end_orphans()
        assert host.remains == set()


async def test_a_runtime_that_hides_its_orphans_leaves_them(host: FakeHost, tmp_path: Path) -> None:
    """Which is why `owned` has to be true: nothing else finds them."""
    async with FakeGateway(host, tmp_path, wrap_runtime=RuntimeThatHidesItsOrphans) as gateway:
        await launch(gateway.runtime, stray(tmp_path, 1))
        await gateway.reconciler.end_orphans()
        assert host.remains == {"stray-1"}


async def test_every_unsettled_session_is_looked_at(gateway: FakeGateway, host: FakeHost) -> None:
    poked: list[str] = []

    class Listens:
        def poke(self, name: str) -> None:
            poked.append(name)

    idle, ready, stopped = [await gateway.create() for _ in range(3)]
    await gateway.run(ready.id, "x")
    await gateway.service.stop(ALICE, stopped.id)
    reconciler = Reconciler(gateway.store, gateway.runtimes, Listens())  # type: ignore[arg-type]
    await reconciler.sweep()
    assert poked == [ready.id]
    await gateway.store.write(lambda tx: tx.sessions.mark_deleting(idle.id))
    await reconciler.sweep()
    assert set(poked[1:]) == {ready.id, idle.id}


async def test_a_deletion_that_was_cut_short_is_finished(host: FakeHost, tmp_path: Path) -> None:
    async with FakeGateway(host, tmp_path) as first:
        session = await first.create()
        await first.prompt(session.id, "hold")
        await first.until(session.id, SessionStatus.RUNNING)
        await first.store.write(lambda tx: tx.sessions.mark_deleting(session.id))
    async with FakeGateway(host, tmp_path) as second:
        await second.scheduler.settle(session.id)
        assert (host.alive, host.remains) == ([], set())
        assert not (second.folders._root / session.id).exists()
        assert not await second.store.read(lambda tx: tx.sessions.deleting(session.id))
