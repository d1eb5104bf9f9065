"""Which runtimes a server has."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from carrel.cli.data_folder import DataFolder
from carrel.cli.runtimes import choose_runtimes
from carrel.model import SandboxStatus
from carrel.settings import load_settings
from carrel.store import SqliteStore
from carrel.testing.conformance.store import add_session, new_sandbox


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def names(stack: AsyncExitStack, folder: Path, left: str | None = None, **given: Any) -> list[str]:
    settings = load_settings(overrides={"data": folder / "data", **given})
    place = DataFolder(settings, stack)
    store = SqliteStore(folder / "carrel.db", on_commit=lambda _: None)
    await store.start(stack)
    if left is not None:
        session = await add_session(store)
        sandbox = new_sandbox(session, 1, SandboxStatus.LIVE, runtime=left)
        await store.write(lambda tx: tx.sandboxes.add(sandbox))
    return list((await choose_runtimes(settings, place, store, None)).names)


async def test_sandboxes_are_processes_of_this_host_unless_told_otherwise(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    assert await names(stack, tmp_path) == ["local"]


async def test_the_default_comes_first_then_those_beside_it(stack: AsyncExitStack, tmp_path: Path) -> None:
    assert await names(stack, tmp_path, runtime="docker", runtimes=["local", "docker"]) == ["docker", "local"]


async def test_one_that_still_has_sandboxes_is_there_to_end_them(stack: AsyncExitStack, tmp_path: Path) -> None:
    assert await names(stack, tmp_path, left="docker") == ["local", "docker"]


async def test_an_installation_keeps_its_name(stack: AsyncExitStack, tmp_path: Path) -> None:
    place = DataFolder(load_settings(overrides={"data": tmp_path / "data"}), stack)
    name = place.installation()
    assert name == place.installation() == (tmp_path / "data" / "installation").read_text().strip()
