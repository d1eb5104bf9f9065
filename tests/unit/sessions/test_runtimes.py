"""Several runtimes side by side: each sandbox is asked of who has it."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from carrel import abc
from carrel.errors import RuntimeUnavailable, SandboxLaunchFailed
from carrel.model import Sandbox, SandboxStatus, new_id, utc_now
from carrel.sessions.runtimes import Runtimes
from carrel.testing import FakeHost, FakeRuntime
from carrel.testing.conformance.runtime import launch


class Other(FakeRuntime):
    name = "other"


class WalledOffByNothing(FakeRuntime):
    name = "open"
    isolated = False


class Away(FakeRuntime):
    name = "away"

    async def measure(self, states: Mapping[str, Mapping[str, Any]]) -> Mapping[str, abc.SandboxUsage]:
        raise RuntimeUnavailable(operator_detail="no answer")


def spec(folder: Path) -> abc.LaunchSpec:
    return abc.LaunchSpec(
        sandbox_id=new_id(),
        session_id=new_id(),
        session_number=1,
        generation=1,
        link_token="link",
        agent_token="agent",
        workspace=str(folder),
        home=str(folder),
        owner=None,
    )


def row(wanted: abc.LaunchSpec, runtime: str, state: dict[str, Any]) -> Sandbox:
    return Sandbox(
        id=wanted.sandbox_id,
        session_id=wanted.session_id,
        generation=1,
        status=SandboxStatus.LIVE,
        runtime=runtime,
        state=state,
        link_token_hash="",
        agent_token_hash="",
        created_at=utc_now(),
    )


async def hear_nothing(_: Any) -> None:
    await asyncio.Event().wait()


async def test_each_sandbox_is_asked_of_the_runtime_that_has_it(tmp_path: Path) -> None:
    async with FakeHost() as here, FakeHost() as there, AsyncExitStack() as stack:
        for host in (here, there):
            host.connect(hear_nothing)
        first, second = FakeRuntime(here), Other(there)
        runtimes = Runtimes([first, second])
        await runtimes.start(stack)
        specs = [spec(tmp_path), spec(tmp_path)]
        rows = [
            row(one, runtime.name, (await launch(runtime, one))[-1])
            for one, runtime in zip(specs, (first, second), strict=True)
        ]
        assert [await runtimes.alive(each.runtime, each.id, each.state) for each in rows] == [True, True]
        assert set(await runtimes.measure(rows)) == {each.id for each in rows}
        assert [(runtime.name, found) for runtime, found, _ in await runtimes.owned()] == [
            ("fake", rows[0].id),
            ("other", rows[1].id),
        ]
        await runtimes.terminate(rows[1])
        assert [await runtimes.alive(each.runtime, each.id, each.state) for each in rows] == [True, False]
        await runtimes.terminate(rows[0])


async def test_a_sandbox_of_which_nothing_was_begun_is_gone(tmp_path: Path) -> None:
    async with FakeHost() as host:
        runtimes = Runtimes([FakeRuntime(host)])
        assert not await runtimes.alive("fake", new_id(), {})
        await runtimes.terminate(row(spec(tmp_path), "fake", {}))


async def test_the_first_is_for_those_who_wish_for_none() -> None:
    async with FakeHost() as host:
        runtimes = Runtimes([FakeRuntime(host), Other(host)])
        assert runtimes.named(None) is runtimes.default is runtimes.named("fake")
        assert runtimes.named("other").name == "other"
        assert list(runtimes.names) == ["fake", "other"]
        with pytest.raises(SandboxLaunchFailed, match="no runtime 'clouds' here, but fake, other"):
            runtimes.named("clouds")


async def test_all_are_walled_off_or_none_counts_as_such() -> None:
    async with FakeHost() as host:
        assert Runtimes([FakeRuntime(host), Other(host)]).isolated
        assert not Runtimes([FakeRuntime(host), WalledOffByNothing(host)]).isolated


async def test_one_that_does_not_answer_costs_the_others_nothing(tmp_path: Path) -> None:
    async with FakeHost() as host:
        host.connect(hear_nothing)
        good, away = FakeRuntime(host), Away(host)
        runtimes = Runtimes([good, away])
        specs = [spec(tmp_path), spec(tmp_path)]
        rows = [
            row(one, runtime.name, (await launch(runtime, one))[-1])
            for one, runtime in zip(specs, (good, away), strict=True)
        ]
        assert set(await runtimes.measure(rows)) == {specs[0].sandbox_id}
        for each in rows:
            await runtimes.terminate(each)
