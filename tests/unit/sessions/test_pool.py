"""Warm pools: filled before anybody asks, taken once, refilled; nobody sees what waits in them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from carrel import abc
from carrel.errors import MissingCredential, OutOfMemory, SessionLimitReached, SessionNotFound
from carrel.model import ADMIN, PermissionMode, Principal, Session, SessionStatus, TurnStatus, Workspace
from carrel.protocol.environments import DEFAULT_ENVIRONMENT, EnvironmentSpec
from carrel.protocol.events import StoredEvent
from carrel.protocol.spec import CreateSession, CreateTurn, SessionSpec, UpdateSession
from carrel.sessions.environments import AS_SETTINGS_SAY
from carrel.sessions.memory import Memory
from carrel.sessions.pool import PoolState, Recipe, Recipes, why_cold
from carrel.sessions.service import ServiceOptions
from carrel.testing import FakeGateway, FakeHost
from carrel.testing.fakes import FakeRunner

Eventually = Callable[..., Awaitable[None]]
MIB = 2**20


def recipes(size: int, **spec: Any) -> Recipes:
    return Recipes(defaults=SessionSpec(**spec), default_size=size)


def recipe(**spec: Any) -> Recipe:
    return recipes(1, **spec).of(AS_SETTINGS_SAY)


async def want(gateway: FakeGateway, **spec: Any) -> None:
    """Write the next version of `default`."""
    await gateway.environments.put(ADMIN, DEFAULT_ENVIRONMENT, EnvironmentSpec.model_validate(spec))
    gateway.pool.poke()


async def waiting(gateway: FakeGateway) -> list[Session]:
    return await gateway.store.read(lambda tx: list(tx.pools.waiting()))


async def state(gateway: FakeGateway) -> PoolState:
    return await gateway.pool.state(DEFAULT_ENVIRONMENT)


async def warm(gateway: FakeGateway, count: int) -> None:
    """Wait until so many are warm."""
    async with asyncio.timeout(15):
        while (await state(gateway)).warm != count:
            await asyncio.sleep(0.005)


def runner_of(host: FakeHost, session_id: str) -> FakeRunner:
    (found,) = [runner for runner in host.alive if runner.spec.session_id == session_id]
    return found


async def cut(gateway: FakeGateway, session: Session) -> None:
    """Break the link of the session's runner; it dials again."""
    link = gateway.hub.bound_link(session.id)
    assert link is not None
    await link.connection.close()


# ------------------------------------------------------------------------------------------------------------- taking


async def test_a_session_is_taken_with_its_agent_and_the_gap_is_filled(
    open_gateway: Any, host: FakeHost, story: Callable[[list[StoredEvent]], list[str]]
) -> None:
    gateway = await open_gateway(pool=recipes(2))
    await warm(gateway, 2)
    before = {runner.spec.session_id for runner in host.alive}
    session = await gateway.create(title="mine", metadata={"a": 1}, ttl_seconds=1000)
    assert session.id in before
    assert (session.status, session.title, session.metadata) == (SessionStatus.READY, "mine", {"a": 1})
    assert session.expires_at is not None
    assert session.owner == "alice"
    assert (await gateway.run(session.id, "hello")).text == "turn 1: hello"
    told = story(await gateway.log(session.id))
    assert told[:3] == ["session.created", "session.status_changed starting", "session.status_changed ready"]
    await warm(gateway, 2)
    assert len(host.alive) == 3


async def test_what_is_told_of_it_is_what_is_told_of_one_that_started_cold(
    open_gateway: Any, story: Callable[[list[StoredEvent]], list[str]]
) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    stories = []
    for options in ({}, {"effort": "low"}):
        session = await gateway.create(**options)
        await gateway.run(session.id, "hello")
        stories.append(sorted(set(story(await gateway.log(session.id)))))
    assert stories[0] == stories[1]


async def test_two_at_once_never_get_the_same_and_who_finds_none_starts_cold(open_gateway: Any) -> None:
    gateway = await open_gateway(pool=recipes(3))
    await warm(gateway, 3)
    pooled = {session.id for session in await waiting(gateway)}
    made = await asyncio.gather(*(gateway.create() for _ in range(20)))
    assert len({session.id for session in made}) == 20
    assert pooled <= {session.id for session in made}
    assert len({session.number for session in made}) == 20
    results = await asyncio.gather(*(gateway.run(session.id, "hello") for session in made))
    assert {result.status for result in results} == {TurnStatus.SUCCEEDED}


async def test_no_two_sessions_have_files_of_the_same_user(open_gateway: Any) -> None:
    gateway = await open_gateway(pool=recipes(2))
    await warm(gateway, 2)
    taken, cold = await gateway.create(), await gateway.create(effort="low")
    await gateway.run(taken.id, "hello")
    forked = await gateway.service.fork(gateway.principal, taken.id, None)
    sessions = [await gateway.session(each.id) for each in (taken, cold, forked)] + await waiting(gateway)
    users = [session.uid_number or session.number for session in sessions]
    assert len(set(users)) == len(users) >= 3


async def test_lists_are_in_the_order_of_creation(open_gateway: Any) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    cold, taken = await gateway.create(effort="low"), await gateway.create()
    listed = await gateway.service.page(gateway.principal, status=None, cursor=None, limit=10)
    assert [session.id for session in listed.items] == [taken.id, cold.id]


async def test_live_options_are_applied_when_it_is_taken(open_gateway: Any, host: FakeHost) -> None:
    gateway = await open_gateway(pool=recipes(1, model="sonnet"))
    await warm(gateway, 1)
    (pooled,) = await waiting(gateway)
    session = await gateway.create(model="opus", permission_mode="plan")
    assert session.id == pooled.id
    result = await gateway.run(session.id, "hello")
    runner = runner_of(host, session.id)
    assert (result.status, runner.model, runner.permission_mode) == (TurnStatus.SUCCEEDED, "opus", "plan")


async def test_live_options_that_did_not_arrive_are_told_when_the_runner_is_back(
    open_gateway: Any, host: FakeHost, eventually: Eventually
) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    session = await gateway.create()
    runner = runner_of(host, session.id)
    connections = runner.connections
    # As if the gateway had died between its commit and its words.
    spec = session.spec | {"model": "opus"}
    await gateway.store.write(lambda tx: tx.sessions.update(session.id, spec=spec))
    await cut(gateway, session)
    await eventually(lambda: runner.connections > connections)
    await gateway.run(session.id, "hello")
    await eventually(lambda: runner.model == "opus")


async def test_options_that_did_arrive_are_not_told_again(open_gateway: Any, host: FakeHost) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    session = await gateway.create(model="opus")
    await gateway.run(session.id, "hello")
    runner = runner_of(host, session.id)
    await gateway.service.update(gateway.principal, session.id, UpdateSession(model="opus"))
    await cut(gateway, session)
    await gateway.run(session.id, "again")
    assert runner.log.count("set_model") == 1


# ------------------------------------------------------------------------------------------------------ what does not


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"workspace": Workspace(type="user")}, "files"),
        ({"spec": SessionSpec(system_prompt="other")}, "system_prompt"),
        ({"spec": SessionSpec(tools=["Bash"])}, "tools"),
        ({"spec": SessionSpec(mcp_servers={"a": {"command": "a"}})}, "mcp_servers"),
        ({"spec": SessionSpec(env_vars={"A": "b"})}, "env_vars"),
        ({"user_config": True}, "skills"),
    ],
)
def test_what_starts_cold(options: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {"spec": SessionSpec(), "workspace": None, "user_config": False} | options
    reason = why_cold(recipe(), given.pop("spec"), given.pop("workspace"), **given)
    assert reason is not None
    assert why in reason


@pytest.mark.parametrize("name", sorted(set(SessionSpec.model_fields) - {"model", "permission_mode"}))
def test_no_option_but_the_live_ones_is_put_upon_an_agent_that_runs(name: str) -> None:
    other = SessionSpec.model_construct(**{name: "other"})
    assert why_cold(recipe(), other, None, user_config=False) is not None


def test_live_options_and_an_ephemeral_workspace_are_served() -> None:
    spec = SessionSpec(model="opus", permission_mode=PermissionMode.PLAN)
    assert why_cold(recipe(), spec, Workspace(), user_config=False) is None


def test_an_agent_that_was_not_launched_to_act_without_asking_is_not_made_to() -> None:
    spec = SessionSpec(permission_mode=PermissionMode.BYPASS)
    assert why_cold(recipe(permission_mode="default"), spec, None, user_config=False) is not None
    assert why_cold(recipe(), spec, None, user_config=False) is None


async def test_a_user_with_a_configuration_of_their_own_starts_cold(open_gateway: Any, tmp_path: Path) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    (pooled,) = await waiting(gateway)
    (tmp_path / "users" / "alice" / ".claude").mkdir(parents=True)
    (tmp_path / "users" / "alice" / ".claude" / "CLAUDE.md").write_text("Be brief.")
    assert (await gateway.create()).id != pooled.id
    other = await gateway.service.create(Principal.of_user("bob"), CreateSession())
    assert other.id == pooled.id


# ------------------------------------------------------------------------------------------------------------ hidden


async def test_nobody_sees_what_waits(open_gateway: Any) -> None:
    gateway = await open_gateway(pool=recipes(2), service_options=ServiceOptions(max_sessions=2))
    await warm(gateway, 2)
    (one, _) = await waiting(gateway)
    for principal in (gateway.principal, ADMIN):
        with pytest.raises(SessionNotFound):
            await gateway.service.get(principal, one.id)
        with pytest.raises(SessionNotFound):
            await gateway.service.create_turn(principal, one.id, CreateTurn(prompt="hello"))
        with pytest.raises(SessionNotFound):
            await gateway.service.delete(principal, one.id)
        listed = await gateway.service.page(principal, status=None, cursor=None, limit=10)
        assert list(listed.items) == []
    assert await gateway.store.read(lambda tx: (tx.counts.sessions(), tx.counts.busy())) == (0, 0)
    assert await gateway.log(one.id) == []
    # The limit is counted without them, and holds.
    await asyncio.gather(gateway.create(), gateway.create())
    with pytest.raises(SessionLimitReached):
        await gateway.create()


async def test_one_that_starts_takes_no_place_of_those_at_work(open_gateway: Any, host: FakeHost) -> None:
    gateway = await open_gateway(pool=recipes(2), max_concurrent_turns=1)
    session = await gateway.create(effort="low")
    assert (await gateway.run(session.id, "hello")).status is TurnStatus.SUCCEEDED
    await warm(gateway, 2)


# ----------------------------------------------------------------------------------------------------------- accidents


async def test_one_that_dies_is_thrown_away_and_another_takes_its_place(
    open_gateway: Any, host: FakeHost, eventually: Eventually
) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    (dead,) = await waiting(gateway)
    runner_of(host, dead.id).kill()
    async with asyncio.timeout(15):
        while {session.id for session in await waiting(gateway)} & {dead.id} or not (await state(gateway)).warm:
            await asyncio.sleep(0.005)
    (another,) = await waiting(gateway)
    assert another.id != dead.id
    assert len(host.alive) == 1
    await eventually(lambda: not gateway.folders.home(dead).exists())


async def test_one_that_died_unnoticed_loses_no_prompt(open_gateway: Any, host: FakeHost) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    session = await gateway.create()
    runner_of(host, session.id).kill()
    assert (await gateway.run(session.id, "hello")).text == "turn 1: hello"


async def test_a_pool_that_cannot_be_filled_says_why_and_tries_less_and_less(open_gateway: Any, host: FakeHost) -> None:
    def refuse() -> None:
        raise MissingCredential

    gateway = await open_gateway(pool=recipes(1), check_model=refuse)
    async with asyncio.timeout(15):
        while (await state(gateway)).failure is None:
            await asyncio.sleep(0.005)
    found = await state(gateway)
    assert found.failure is not None
    assert (found.failure.code, found.warm) == (MissingCredential.code, 0)
    await gateway.pool.look()
    assert (await state(gateway)).starting == 0
    assert not host.alive


async def test_a_restart_begins_with_a_new_pool(open_gateway: Any, host: FakeHost, eventually: Eventually) -> None:
    first = await open_gateway(pool=recipes(2))
    await warm(first, 2)
    old = {session.id for session in await waiting(first)}
    await first.__aexit__(None, None, None)
    second = await open_gateway(pool=recipes(1, model="opus"))
    await warm(second, 1)
    assert not old & {session.id for session in await waiting(second)}
    await eventually(lambda: len(host.alive) == 1)


async def test_other_options_replace_what_waits(open_gateway: Any, host: FakeHost, eventually: Eventually) -> None:
    gateway = await open_gateway(pool=recipes(2))
    await warm(gateway, 2)
    old = {session.id for session in await waiting(gateway)}
    taken = await gateway.create()
    await want(gateway, warm_pool=1, options={"effort": "low"})
    assert (await gateway.create()).id not in old
    await warm(gateway, 1)
    await eventually(lambda: len(host.alive) == 2)
    assert {runner.spec.session_id for runner in host.alive} >= {taken.id}
    await want(gateway)
    await eventually(lambda: [runner.spec.session_id for runner in host.alive] == [taken.id])


async def test_for_want_of_memory_it_shrinks_first_and_is_not_filled(
    open_gateway: Any, host: FakeHost, eventually: Eventually
) -> None:
    memory = Memory(1000 * MIB)
    gateway = await open_gateway(pool=recipes(2), memory=memory)
    await warm(gateway, 2)
    session = await gateway.create()
    await gateway.run(session.id, "hello")
    await warm(gateway, 2)
    for runner in host.alive:
        runner.usage = abc.SandboxUsage(memory_bytes=350 * MIB, processes=10, cpu_seconds=1.0)
    await gateway.guard.look()
    await eventually(lambda: len(host.alive) == 2)
    assert session.id in {runner.spec.session_id for runner in host.alive}
    await gateway.guard.look()
    await gateway.pool.look()
    found = await state(gateway)
    assert len(await waiting(gateway)) == 1, "whoever was freed for want of memory is not at once made anew"
    assert found.failure is not None
    assert found.failure.code == OutOfMemory.code


async def test_while_the_server_drains_nothing_is_taken_or_begun(open_gateway: Any) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    (pooled,) = await waiting(gateway)
    gateway.owner.draining = True
    assert (await gateway.create()).id != pooled.id
    await want(gateway, warm_pool=1, options={"effort": "low"})
    await gateway.pool.look()
    assert [session.id for session in await waiting(gateway)] == []


async def test_no_sandbox_is_left_of_what_is_thrown_away(open_gateway: Any, host: FakeHost) -> None:
    gateway = await open_gateway(pool=recipes(1))
    await warm(gateway, 1)
    await want(gateway)
    async with asyncio.timeout(15):
        while await gateway.store.read(lambda tx: list(tx.sandboxes.not_gone())) or host.alive:
            await asyncio.sleep(0.005)
    assert (await state(gateway)).failure is None
