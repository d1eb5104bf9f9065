"""Every store of objects keeps its contract, wherever its objects are, and the suite catches those that do not."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from carrel import abc
from carrel.objects import DiskPlace, Keyring, MemoryPlace, Objects, Place, S3Place
from carrel.testing.conformance import failures
from carrel.testing.conformance import objects as suite
from carrel.testing.faulty import (
    ObjectsThatAreAway,
    ObjectsThatCorrupt,
    ObjectsThatShowParts,
    ObjectsThatTruncate,
)
from carrel.testing.s3 import S3Server

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


def bucket(server: S3Server, **more: str) -> S3Place:
    return S3Place(
        bucket=server.bucket,
        endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        **more,
    )


@pytest.fixture(params=["memory", "disk", "disk-encrypted", "s3", "s3-prefix-encrypted"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    place: Place = MemoryPlace() if request.param == "memory" else DiskPlace(tmp_path / "objects")
    if request.param.startswith("s3"):
        more = {"prefix": "some/where"} if "prefix" in request.param else {}
        place = bucket(request.getfixturevalue("s3_server"), **more)
    return lambda: Objects(place, KEYS if "encrypted" in request.param else None, timeout_seconds=20)


@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
async def test_objects(make: Make, check: Callable[[suite.OpenObjects], Awaitable[None]]) -> None:
    await check(opener(make))


@pytest.mark.parametrize(
    ("faulty", "caught_by"),
    [
        (ObjectsThatCorrupt, "what_is_stored_is_given_back"),
        (ObjectsThatTruncate, "parts_can_be_read"),
        (ObjectsThatShowParts, "nobody_sees_a_part"),
        (ObjectsThatShowParts, "a_put_that_fails_changes_nothing"),
    ],
)
async def test_a_faulty_store_is_caught(faulty: Callable[[abc.ObjectStore], abc.ObjectStore], caught_by: str) -> None:
    place = MemoryPlace()
    found = await failures({caught_by: suite.CHECKS[caught_by]}, opener(lambda: faulty(Objects(place))))
    assert list(found) == [caught_by]


async def test_a_store_that_may_be_away_conforms_while_it_is_there() -> None:
    checks = {name: suite.CHECKS[name] for name in ("a_folder_is_listed", "deleted_is_deleted", "parts_can_be_read")}
    assert await failures(checks, opener(lambda: ObjectsThatAreAway(Objects(MemoryPlace())))) == {}
