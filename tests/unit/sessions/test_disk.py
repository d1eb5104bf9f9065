"""What sandboxes write is measured as often as is cheap, against their environment's cap or the settings'."""

from typing import Any

from carrel.errors import WorkspaceMissing
from carrel.model import Sandbox, Session
from carrel.sessions.disk import DiskWatch
from carrel.testing import FakeGateway

MIB = 2**20


class Sizes:
    """Folders that take what they are said to take, and that are looked through in so many seconds."""

    def __init__(self) -> None:
        self.taken_mib: dict[str, int] = {}
        self.seconds = 0.0
        self.looks_seconds = 0.0
        self.looks = 0

    def taken(self, session: Session) -> int:
        self.looks += 1
        self.seconds += self.looks_seconds
        if session.id not in self.taken_mib:
            raise WorkspaceMissing
        return self.taken_mib[session.id] * MIB


async def run(work: Any, *arguments: Any) -> Any:
    return work(*arguments)


def watch(gateway: FakeGateway, sizes: Sizes, default_mb: int | None = 64) -> DiskWatch:
    return DiskWatch(gateway.store, sizes, default_mb=default_mb, run_blocking=run, clock=lambda: sizes.seconds)


async def live(gateway: FakeGateway, count: int = 1) -> list[Sandbox]:
    for _ in range(count):
        await gateway.run((await gateway.create()).id, "one")
    return await gateway.store.read(lambda tx: list(tx.sandboxes.not_gone()))


async def test_who_is_above_is_named_and_nobody_else(gateway: FakeGateway) -> None:
    wild, tame = await live(gateway, 2)
    sizes = Sizes()
    sizes.taken_mib = {wild.session_id: 1, tame.session_id: 64}
    watched = watch(gateway, sizes)
    assert await watched.over([wild, tame]) == {}
    sizes.seconds += 1
    sizes.taken_mib[wild.session_id] = 65
    assert await watched.over([wild, tame]) == {wild.id: 65 * MIB}


async def test_one_that_begins_above_may_make_room_and_not_grow(gateway: FakeGateway) -> None:
    (sandbox,) = await live(gateway)
    sizes = Sizes()
    watched = watch(gateway, sizes)
    for taken, named in ((200, False), (203, False), (150, False), (205, True)):
        sizes.seconds += 1
        sizes.taken_mib[sandbox.session_id] = taken
        assert (sandbox.id in await watched.over([sandbox])) is named, taken


async def test_large_folders_are_looked_through_seldom(gateway: FakeGateway) -> None:
    (sandbox,) = await live(gateway)
    sizes = Sizes()
    sizes.taken_mib[sandbox.session_id] = 1
    sizes.looks_seconds = 2.0
    watched = watch(gateway, sizes)
    for _ in range(3):
        await watched.over([sandbox])
    sizes.seconds += 37.9
    await watched.over([sandbox])
    assert sizes.looks == 1
    sizes.seconds += 0.2
    await watched.over([sandbox])
    assert sizes.looks == 2, "a twentieth of the time"


async def test_folders_that_cannot_be_measured_now_are_measured_later(gateway: FakeGateway) -> None:
    (sandbox,) = await live(gateway)
    sizes = Sizes()
    watched = watch(gateway, sizes)
    assert await watched.over([sandbox]) == {}
    sizes.taken_mib[sandbox.session_id] = 1
    await watched.over([sandbox])
    sizes.seconds += 1
    sizes.taken_mib[sandbox.session_id] = 70
    assert await watched.over([sandbox]) == {sandbox.id: 70 * MIB}


async def test_without_a_cap_nothing_is_measured(gateway: FakeGateway) -> None:
    sandboxes = await live(gateway)
    sizes = Sizes()
    assert await watch(gateway, sizes, default_mb=None).over(sandboxes) == {}
    assert sizes.looks == 0
