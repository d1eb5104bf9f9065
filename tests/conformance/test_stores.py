"""Every store keeps its contract, and the suite catches those that do not."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from carrel import abc
from carrel.protocol.events import StoredEvent
from carrel.store import SqliteStore
from carrel.store.postgres import PostgresStore
from carrel.testing.conformance import NotConforming, failures
from carrel.testing.conformance import store as suite
from carrel.testing.faulty import (
    StoreThatFailsCommits,
    StoreThatIsSlow,
    StoreThatKeepsHalfOfAFailure,
    StoreThatPublishesLate,
)

OnCommit = Callable[[list[StoredEvent]], None]
Make = Callable[[OnCommit], abc.Store]


def opener(make: Make) -> suite.OpenStore:
    @asynccontextmanager
    async def open_store(on_commit: OnCommit) -> AsyncIterator[abc.Store]:
        async with AsyncExitStack() as stack:
            store = make(on_commit)
            await store.start(stack)
            yield store

    return open_store


def in_memory(on_commit: OnCommit) -> abc.Store:
    return SqliteStore(None, on_commit=on_commit)


STORES: dict[str, Callable[[Path], Make]] = {
    "sqlite-file": lambda folder: lambda on_commit: SqliteStore(folder / "carrel.db", on_commit=on_commit),
    "sqlite-power": lambda folder: (
        lambda on_commit: SqliteStore(folder / "carrel.db", durability="power", on_commit=on_commit)
    ),
    "sqlite-memory": lambda folder: in_memory,
    "slow": lambda folder: lambda on_commit: StoreThatIsSlow(in_memory(on_commit)),
}


@pytest.mark.requires("postgres")
@pytest.mark.parametrize("check", [*suite.CHECKS.values(), *suite.DURABLE_CHECKS.values()], ids=lambda c: c.__name__)
async def test_postgres_store(check: Callable[[suite.OpenStore], Awaitable[None]], postgres: Callable[[], str]) -> None:
    url = await asyncio.to_thread(postgres)
    await check(opener(lambda on_commit: PostgresStore(url, on_commit=on_commit)))


@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
async def test_store(
    make: Callable[[Path], Make], check: Callable[[suite.OpenStore], Awaitable[None]], tmp_path: Path
) -> None:
    await check(opener(make(tmp_path)))


@pytest.mark.parametrize("check", suite.DURABLE_CHECKS.values(), ids=suite.DURABLE_CHECKS)
@pytest.mark.parametrize("name", ["sqlite-file", "sqlite-power"])
async def test_durable_store(name: str, check: Callable[[suite.OpenStore], Awaitable[None]], tmp_path: Path) -> None:
    await check(opener(STORES[name](tmp_path)))


async def test_a_store_in_memory_is_not_durable() -> None:
    found = await failures({"rows": suite.rows_outlive_the_store}, opener(in_memory))
    assert isinstance(found["rows"], NotConforming)


@pytest.mark.parametrize(
    ("make", "caught_by"),
    [
        (lambda on_commit: StoreThatFailsCommits(in_memory(on_commit)), "events_are_numbered_without_gaps"),
        (lambda on_commit: StoreThatKeepsHalfOfAFailure(in_memory(on_commit)), "a_failed_transaction_changes_nothing"),
        (lambda on_commit: StoreThatPublishesLate(in_memory, on_commit), "events_are_published_after_the_commit"),
    ],
    ids=["fails-commits", "keeps-half-of-a-failure", "publishes-late"],
)
async def test_a_faulty_store_is_caught(make: Make, caught_by: str) -> None:
    found = await failures({caught_by: suite.CHECKS[caught_by]}, opener(make))
    assert caught_by in found
