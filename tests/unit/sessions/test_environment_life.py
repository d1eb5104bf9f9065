"""Environments are started, stopped and asked how they do."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from carrel.errors import CarrelError, EnvironmentNotFound, EnvironmentStopped, ImageMissing, MissingCredential
from carrel.model import ADMIN, Principal, SandboxTemplate, SessionStatus, TurnStatus
from carrel.protocol.environments import EnvironmentSpec, EnvironmentStatus
from carrel.protocol.spec import CreateSession
from carrel.sessions.owner import OwnerOptions
from carrel.testing import FakeGateway, FakeHost, FakeRuntime

Eventually = Callable[..., Awaitable[None]]


async def write(gateway: FakeGateway, name: str, **spec: Any) -> None:
    await gateway.environments.put(ADMIN, name, EnvironmentSpec.model_validate(spec))


async def until(gateway: FakeGateway, name: str, check: Callable[[EnvironmentStatus], object]) -> EnvironmentStatus:
    async with asyncio.timeout(15):
        while not check(status := await gateway.life.status(ADMIN, name)):
            await asyncio.sleep(0.005)
    return status


async def create(gateway: FakeGateway, name: str, principal: Principal = ADMIN) -> str:
    return (await gateway.service.create(principal, CreateSession(environment=name))).id


async def test_the_status_is_what_is(gateway: FakeGateway) -> None:
    status = await gateway.life.status(gateway.principal, "default")
    assert (status.version, status.running, status.warm_wanted, status.sessions, status.problems) == (0, True, 0, 0, [])
    await write(gateway, "dev", warm_pool=2)
    await gateway.life.start(ADMIN, "dev")
    await until(gateway, "dev", lambda status: (status.warm, status.starting) == (2, 0))
    session = await create(gateway, "dev")
    status = await until(gateway, "dev", lambda status: status.warm == 2)
    assert (status.sessions, status.live_sessions) == (1, 1)
    assert (await gateway.life.status(ADMIN, "default")).sessions == 0
    await gateway.service.delete(ADMIN, session)
    assert (await gateway.life.status(ADMIN, "dev")).live_sessions == 0


async def test_who_may_not_use_it_does_not_find_it(gateway: FakeGateway) -> None:
    await write(gateway, "closed", allowed_roles=["admin"])
    for name in ("closed", "nowhere"):
        for call in (gateway.life.status, gateway.life.start, gateway.life.stop):
            with pytest.raises(EnvironmentNotFound):
                await call(gateway.principal, name)


async def test_one_that_is_stopped_finishes_and_takes_no_more(gateway: FakeGateway, host: FakeHost) -> None:
    await write(gateway, "dev", warm_pool=1)
    gateway.pool.poke()
    await until(gateway, "dev", lambda status: status.warm == 1)
    session, idle = await create(gateway, "dev", gateway.principal), await create(gateway, "dev", gateway.principal)
    await gateway.run(idle, "hello")
    turn = await gateway.prompt(session, "hold")
    await gateway.until(session, SessionStatus.RUNNING)
    later = await gateway.prompt(session, "and this")
    status = await gateway.life.stop(ADMIN, "dev")
    assert (status.running, status.warm_wanted) == (False, 0)
    with pytest.raises(EnvironmentStopped):
        await gateway.prompt(session, "hello")
    with pytest.raises(EnvironmentStopped):
        await create(gateway, "dev")
    assert await create(gateway, "default"), "another one goes on"
    await gateway.service.interrupt(gateway.principal, session, turn.id)
    assert (await gateway.ended(later)).status is TurnStatus.SUCCEEDED, "what it has taken is answered"
    await until(gateway, "dev", lambda status: status.live_sessions == 0)
    assert await gateway.store.read(lambda tx: list(tx.pools.waiting())) == []
    assert (await gateway.life.start(ADMIN, "dev")).running
    assert (await gateway.run(session, "hello")).status is TurnStatus.SUCCEEDED
    await until(gateway, "dev", lambda status: status.warm == 1)


async def test_a_restart_forgets_nothing_of_it(open_gateway: Any) -> None:
    first = await open_gateway()
    await first.life.stop(ADMIN, "default")
    await first.__aexit__(None, None, None)
    second = await open_gateway()
    assert not (await second.life.status(ADMIN, "default")).running
    with pytest.raises(EnvironmentStopped):
        await second.create()


async def test_one_that_is_deleted_and_written_anew_takes_prompts(gateway: FakeGateway) -> None:
    await write(gateway, "dev", warm_pool=1)
    gateway.pool.poke()
    await until(gateway, "dev", lambda status: status.warm == 1)
    await gateway.life.stop(ADMIN, "dev")
    await gateway.environments.delete("dev")
    await write(gateway, "dev")
    assert (await gateway.life.status(ADMIN, "dev")).running


class RuntimeWithPython(FakeRuntime):
    """Has one command alone."""

    def finds(self, command: str) -> bool | None:
        return command == "python3"


async def test_problems_have_codes(open_gateway: Any, host: FakeHost) -> None:
    def refuse() -> None:
        raise MissingCredential

    async def reachable(url: str) -> bool:
        return url == "https://there.example/mcp"

    servers = {
        "here": {"command": "python3"},
        "nowhere": {"command": "no-such-command"},
        "up": {"type": "http", "url": "https://there.example/mcp"},
        "down": {"type": "http", "url": "https://away.example/mcp"},
    }
    gateway = await open_gateway(
        check_model=refuse, reachable=reachable, wrap_runtime=lambda runtime: RuntimeWithPython(host)
    )
    await write(gateway, "dev", options={"mcp_servers": servers})
    status = await gateway.life.start(ADMIN, "dev")
    assert [problem.code for problem in status.problems] == [
        "missing_credential",
        "mcp_server_missing",
        "mcp_server_unreachable",
    ]
    assert "nowhere" in status.problems[1].message
    assert "down" in status.problems[2].message


class RuntimeWithoutImages(FakeRuntime):
    """Has none of the images that are asked for by name."""

    async def lacks(self, template: SandboxTemplate) -> CarrelError | None:
        return ImageMissing() if template.image is not None else None


async def test_an_image_that_is_not_there_is_seen_before_anything_is_launched(
    open_gateway: Any, host: FakeHost
) -> None:
    gateway = await open_gateway(wrap_runtime=lambda runtime: RuntimeWithoutImages(host))
    await write(gateway, "dev", sandbox={"image": "nowhere:1"})
    assert [each.code for each in (await gateway.life.start(ADMIN, "dev")).problems] == ["image_missing"]
    await write(gateway, "dev", sandbox={})
    assert (await gateway.life.status(ADMIN, "dev")).problems == []


async def test_servers_of_the_settings_are_looked_at_too(host: FakeHost, tmp_path: Any) -> None:
    options = OwnerOptions(mcp_servers={"a": {"type": "http", "url": "https://away.example/mcp"}})
    async with FakeGateway(host, tmp_path, owner_options=options) as gateway:
        (problem,) = (await gateway.life.status(ADMIN, "default")).problems
    assert problem.code == "mcp_server_unreachable"
