"""Every store of objects keeps its contract, wherever its objects are, and the suite catches those that do not."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from carrel import abc
from carrel.objects import DiskPlace, Keyring, MemoryPlace, Objects, Place
from carrel.testing.conformance import objects as suite

KEYS = Keyring([bytes(range(32))])

Make = Callable[[], abc.ObjectStore]


def opener(make: Make) -> suite.OpenObjects:
    @asynccontextmanager
    async def open_objects() -> AsyncIterator[abc.ObjectStore]:
        async with AsyncExitStack() as stack:
            store = make()
            await store.start(stack)
            yield store

    return open_objects


@pytest.fixture(params=["memory", "disk", "disk-encrypted"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    place: Place = MemoryPlace() if request.param == "memory" else DiskPlace(tmp_path / "objects")
    return lambda: Objects(place, KEYS if "encrypted" in request.param else None, timeout_seconds=20)


@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
async def test_objects(make: Make, check: Callable[[suite.OpenObjects], Awaitable[None]]) -> None:
    await check(opener(make))
