"""Environments: versions that never change, sessions that keep theirs, and what a session may have of its own."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from carrel.errors import (
    EnvironmentFixed,
    EnvironmentForbids,
    EnvironmentInUse,
    EnvironmentNotFound,
    SessionLimitReached,
    ValidationFailed,
)
from carrel.model import ADMIN, Budget, PermissionMode, Principal, SessionStatus
from carrel.protocol.environments import Environment, EnvironmentSpec
from carrel.protocol.spec import CreateSession, SessionSpec, UpdateSession
from carrel.sessions.narrowing import NARROWING, agents_options, check_options
from carrel.sessions.service import ServiceOptions
from carrel.testing import FakeGateway, FakeHost

OpenGateway = Any
ALICE, BOB = Principal.of_user("alice"), Principal.of_user("bob")
PAGE = Path(__file__).parents[3] / "docs" / "environments.md"


def spec(**values: Any) -> EnvironmentSpec:
    return EnvironmentSpec.model_validate(values)


async def put(gateway: FakeGateway, name: str = "dev", **values: Any) -> Environment:
    environment, _ = await gateway.environments.put(ADMIN, name, spec(**values))
    return environment


# ------------------------------------------------------------------------------------------------------------ versions


async def test_each_change_makes_a_version_and_the_same_again_makes_none(gateway: FakeGateway) -> None:
    first = await gateway.environments.put(ADMIN, "dev", spec(options={"model": "opus"}))
    again = await gateway.environments.put(ADMIN, "dev", spec(options={"model": "opus"}, warm_pool=0))
    second = await gateway.environments.put(ADMIN, "dev", spec(options={"model": "sonnet"}))
    assert [(each.version, new) for each, new in (first, again, second)] == [(1, True), (1, False), (2, True)]
    assert [each.version for each in await gateway.environments.versions(ALICE, "dev")] == [2, 1]
    assert (await gateway.environments.get(ALICE, "dev", 1)).spec.options.model == "opus", "the old one is as it was"


async def test_default_is_always_there_and_can_be_written(gateway: FakeGateway) -> None:
    assert [e.name for e in (await gateway.environments.page(ALICE, cursor=None, limit=10)).items] == ["default"]
    before = await gateway.create()
    assert (before.environment, before.environment_version) == ("default", 0)
    await put(gateway, "default", options={"model": "opus"})
    after = await gateway.create()
    assert (after.environment, after.environment_version) == ("default", 1)
    assert [e.version for e in (await gateway.environments.page(ALICE, cursor=None, limit=10)).items] == [1]
    with pytest.raises(EnvironmentFixed):
        await gateway.environments.delete("default")


async def test_a_session_keeps_the_version_it_began_with(gateway: FakeGateway, host: FakeHost) -> None:
    await put(gateway, options={"model": "opus"}, sandbox={"variables": {"STAGE": "one"}})
    session = await gateway.create(environment="dev", env_vars={"MINE": "1"})
    await put(gateway, options={"model": "sonnet"}, sandbox={"variables": {"STAGE": "two"}})
    await gateway.run(session.id, "hello")
    (runner,) = host.alive
    assert runner.spec.template.variables == {"STAGE": "one"}
    assert runner.bind is not None
    assert runner.bind.spec.model == "opus"
    assert runner.bind.spec.env_vars == {"STAGE": "one", "MINE": "1"}
    kept = await gateway.session(session.id)
    assert (kept.environment_version, kept.spec) == (1, {"env_vars": {"MINE": "1"}}), "its row has what is its own"
    fork = await gateway.service.fork(ALICE, session.id, None)
    assert (fork.environment, fork.environment_version) == ("dev", 1)


async def test_a_session_can_be_moved(gateway: FakeGateway) -> None:
    await put(gateway, options={"model": "opus"})
    await put(gateway, options={"model": "sonnet", "permission_mode": "plan"})
    await put(gateway, "other")
    session = await gateway.create(environment="dev")

    async def move(**changes: Any) -> tuple[str, int]:
        moved = await gateway.service.update(ALICE, session.id, UpdateSession(**changes))
        return moved.environment, moved.environment_version

    assert await move(environment_version=1) == ("dev", 1)
    assert await move(title="nothing of environments") == ("dev", 1)
    assert await move(environment_version=None) == ("dev", 2), "null is the newest"
    assert await move(environment="other", permission_mode="bypassPermissions") == ("other", 1)
    with pytest.raises(EnvironmentForbids):
        await move(environment="dev")
    assert (await gateway.session(session.id)).environment == "other", "what does not fit stays where it is"
    assert await move(environment=None) == ("default", 0)
    changed = [e.data for e in await gateway.log(session.id) if e.type == "session.updated"]
    assert changed[0]["at_next_launch"] == ["environment_version"]


async def test_a_moved_session_has_the_other_rules_from_its_next_turn(gateway: FakeGateway, host: FakeHost) -> None:
    await put(gateway, options={"permissions": {"allow": ["Bash"]}})
    strict = await put(gateway, options={"permissions": {"deny": ["Bash"]}})
    session = await gateway.create(environment="dev")
    await gateway.service.update(ALICE, session.id, UpdateSession(environment_version=1))
    held = await gateway.prompt(session.id, "hold")
    await gateway.until(session.id, SessionStatus.RUNNING)
    await gateway.service.update(ALICE, session.id, UpdateSession(environment_version=strict.version))
    (before,) = host.alive
    after = await gateway.prompt(session.id, "hello")
    await gateway.service.interrupt(ALICE, session.id)
    assert (await gateway.ended(held)).status == "interrupted"
    assert (await gateway.ended(after)).status == "succeeded"
    (now,) = host.alive
    assert now is not before, "the turn at work ended where it was, and the next one had a new agent"
    assert now.bind is not None
    assert now.bind.spec.permission_rules().deny == ("Bash",)
    assert now.bind.spec.permission_rules().allow == ()
    await gateway.service.update(ALICE, session.id, UpdateSession(environment_version=1))
    await gateway.until(session.id, SessionStatus.IDLE)
    assert (await gateway.run(session.id, "hello")).status == "succeeded"
    (last,) = host.alive
    assert last.bind is not None
    assert last.bind.spec.permission_rules().allow == ("Bash",)


async def test_a_session_that_stays_keeps_its_agent(gateway: FakeGateway, host: FakeHost) -> None:
    await put(gateway)
    session = await gateway.create(environment="dev")
    await gateway.run(session.id, "hello")
    await gateway.service.update(ALICE, session.id, UpdateSession(environment="dev", title="the same"))
    await put(gateway, options={"model": "opus"})
    (one,) = host.alive
    await gateway.run(session.id, "hello")
    assert list(host.alive) == [one]


async def test_plugins_are_folders_with_plugins(gateway: FakeGateway, host: FakeHost, tmp_path: Path) -> None:
    folder = tmp_path / "review"
    for wrong in (str(folder), "/x\0y"):
        with pytest.raises(ValidationFailed, match="plugins"):
            await put(gateway, sandbox={"plugins": [wrong]})
    (folder / ".claude-plugin").mkdir(parents=True)
    (folder / ".claude-plugin/plugin.json").write_text("{}")
    environment = await put(gateway, sandbox={"plugins": [str(folder)]})
    session = await gateway.create(environment="dev")
    await gateway.run(session.id, "hello")
    (one,) = host.alive
    assert one.spec.template.plugins == (str(folder),)
    assert str(tmp_path) not in str(environment.spec.without_inner_facts())


async def test_what_the_settings_say_is_left_behind_with_their_environment(open_gateway: OpenGateway) -> None:
    defaults = SessionSpec(model="haiku", max_turns=3)
    gateway = await open_gateway(service_options=ServiceOptions(defaults=defaults), defaults=defaults)
    await put(gateway, options={"model": "opus"})
    session = await gateway.create(effort="low")
    assert session.spec == {"model": "haiku", "max_turns": 3, "effort": "low"}
    moved = await gateway.service.update(ALICE, session.id, UpdateSession(environment="dev"))
    assert moved.spec == {"effort": "low"}
    back = await gateway.service.update(ALICE, session.id, UpdateSession(environment="default"))
    assert back.spec == session.spec


async def test_an_environment_goes_when_nobody_is_in_it(gateway: FakeGateway) -> None:
    await put(gateway)
    session = await gateway.create(environment="dev")
    with pytest.raises(EnvironmentInUse):
        await gateway.environments.delete("dev")
    await gateway.service.delete(ALICE, session.id)
    await gateway.environments.delete("dev")
    with pytest.raises(EnvironmentNotFound):
        await gateway.environments.delete("dev")
    with pytest.raises(EnvironmentNotFound):
        await gateway.create(environment="dev")


# ----------------------------------------------------------------------------------------------------- who, and how many


async def test_only_whom_it_admits_may_use_it_or_read_it(gateway: FakeGateway) -> None:
    await put(gateway, "open")
    await put(gateway, "alices", allowed_roles=["user"])
    await put(gateway, "alices", allowed_roles=["user:alice"])
    await put(gateway, "admins", allowed_roles=["admin"])

    async def seen(principal: Principal) -> list[str]:
        return [e.name for e in (await gateway.environments.page(principal, cursor=None, limit=10)).items]

    assert await seen(ALICE) == ["default", "alices", "open"]
    assert await seen(BOB) == ["default", "open"]
    assert await seen(ADMIN) == ["default", "admins", "alices", "open"]
    for name, version in (("admins", None), ("alices", None), ("alices", 1), ("nowhere", None)):
        with pytest.raises(EnvironmentNotFound):
            await gateway.environments.get(BOB, name, version)
        with pytest.raises(EnvironmentNotFound):
            await gateway.service.create(BOB, CreateSession(environment=name))
    assert (await gateway.create(environment="alices")).environment_version == 2


async def test_users_are_not_shown_the_hosts_folders_and_values() -> None:
    full = spec(
        sandbox={"mounts": [{"source": "/srv/data", "target": "/data"}], "variables": {"A": "value"}},
        options={
            "mcp_servers": {"docs": {"type": "http", "url": "https://docs.example.com", "headers": {"X-Team": "value"}}}
        },
    )
    shown = full.without_inner_facts().model_dump_json()
    assert "/srv/data" not in shown
    assert "value" not in shown
    assert "docs.example.com" in shown


async def test_limits_are_held(gateway: FakeGateway) -> None:
    await put(gateway, limits={"max_sessions": 3, "max_sessions_per_user": 2, "session_budget": {"max_usd": 2}})
    one = await gateway.create(environment="dev")
    assert one.budget == Budget(max_usd=2)
    assert (await gateway.create(environment="dev", budget={"max_usd": 1, "max_tokens": 5})).budget == Budget(
        max_usd=1, max_tokens=5
    )
    with pytest.raises(SessionLimitReached):
        await gateway.create(environment="dev")
    with pytest.raises(SessionLimitReached):
        await gateway.service.fork(ALICE, one.id, None)
    await gateway.create()
    await gateway.service.create(BOB, CreateSession(environment="dev"))
    with pytest.raises(SessionLimitReached):
        await gateway.service.create(BOB, CreateSession(environment="dev"))
    with pytest.raises(EnvironmentForbids):
        await gateway.service.update(ALICE, one.id, UpdateSession(budget={"max_usd": 3}))
    assert (await gateway.service.update(ALICE, one.id, UpdateSession(budget=None))).budget == Budget(max_usd=2)


NO_SCHEMA = {
    "name": "price",
    "description": "What an article costs.",
    "input_schema": {"type": "object", "properties": 5},
    "url": "https://shop.example/price",
}


async def test_what_this_server_cannot_give_is_refused(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(service_options=ServiceOptions(allow_bypass=False, metered=False))
    for wrong, told in (
        ({"runtime": "kubernetes"}, "runtime"),
        ({"options": {"permission_mode": "bypassPermissions"}}, "permission_mode"),
        ({"limits": {"session_budget": {"max_usd": 1}}}, "session_budget"),
        ({"secrets": [{"name": "TOKEN", "expose": "env"}]}, "no secret TOKEN"),
        ({"custom_tools": [NO_SCHEMA]}, r"price.input_schema: \$.properties: 5 is not of type 'object'"),
    ):
        with pytest.raises(ValidationFailed, match=told):
            await gateway.environments.put(ADMIN, "dev", spec(**wrong))


async def test_its_idle_timeout_holds(open_gateway: OpenGateway, eventually: Any, host: FakeHost) -> None:
    gateway = await open_gateway(idle_timeout_seconds=600.0)
    await put(gateway, idle_timeout_seconds=0.05)
    session = await gateway.create(environment="dev")
    await gateway.run(session.id, "hello")
    await eventually(lambda: not host.alive)


# ----------------------------------------------------------------------------------------------------------- narrowing

FREE = {
    "system_prompt": "x",
    "append_system_prompt": "x",
    "model": "m",
    "fallback_model": "m",
    "disallowed_tools": ["Bash"],
    "effort": "low",
    "thinking": {"type": "adaptive"},
    "output_format": {"type": "json_schema", "schema": {}},
    "ask_expires_seconds": 60,
    "ask_remind_seconds": 60,
    "defer_after_seconds": 60,
}
STRICT = spec(
    sandbox={"variables": {"FIXED": "1"}},
    options={
        "permission_mode": "acceptEdits",
        "tools": ["Read", "Bash"],
        "allowed_tools": ["Read"],
        "permissions": {"allow": ["Bash(ls)"], "deny": ["Read(.env)"]},
        "mcp_servers": {"docs": {"type": "http", "url": "https://docs.example.com"}},
        "skills": ["greet"],
        "setting_sources": ["user"],
        "max_turns": 10,
        "agents": {"theirs": {"description": "d", "prompt": "p"}},
    },
)


@pytest.mark.parametrize(
    ("fits", "wider"),
    [
        ({"permission_mode": "plan"}, {"permission_mode": "bypassPermissions"}),
        ({"tools": ["Read"]}, {"tools": ["Read", "Write"]}),
        ({"allowed_tools": ["Bash(ls)"]}, {"allowed_tools": ["Write"]}),
        ({"permissions": {"allow": ["Read"], "deny": ["Bash"]}}, {"permissions": {"allow": ["Bash"]}}),
        ({"mcp_servers": {}}, {"mcp_servers": {"mine": {"command": "x"}}}),
        ({"skills": []}, {"skills": "all"}),
        ({"setting_sources": []}, {"setting_sources": ["project"]}),
        ({"max_turns": 5}, {"max_turns": 11}),
        ({"session_tools": False}, {"session_tools": True}),
        ({"env_vars": {"MINE": "1"}}, {"env_vars": {"FIXED": "2"}}),
        (
            {"agents": {"a": {"description": "d", "prompt": "p", "tools": ["Read"], "permissionMode": "plan"}}},
            {"agents": {"a": {"description": "d", "prompt": "p", "permissionMode": "bypassPermissions"}}},
        ),
        ({}, {"agents": {"a": {"description": "d", "prompt": "p", "tools": ["Write"]}}}),
        ({}, {"agents": {"a": {"description": "d", "prompt": "p", "mcpServers": ["mine"]}}}),
    ],
)
def test_a_session_can_have_less_and_never_more(fits: dict[str, Any], wider: dict[str, Any]) -> None:
    check_options("strict", STRICT, SessionSpec.model_validate(fits))
    with pytest.raises(EnvironmentForbids, match=next(iter(wider))):
        check_options("strict", STRICT, SessionSpec.model_validate(wider))
    check_options("free", spec(), SessionSpec.model_validate(wider))


async def test_it_may_reach_less_than_its_environment_and_never_more(gateway: FakeGateway, host: FakeHost) -> None:
    await put(gateway, sandbox={"network": {"allow": ["example.org", "example.com"]}})
    with pytest.raises(EnvironmentForbids, match="network"):
        await gateway.create(environment="dev", network="open")
    with pytest.raises(EnvironmentForbids, match="network"):
        await gateway.create(network={"allow": ["example.org"]})
    session = await gateway.create(environment="dev", network={"allow": ["example.org"]})
    await gateway.run(session.id, "hello")
    (runner,) = host.alive
    assert str(runner.spec.template.network) == "allow example.org"
    await put(gateway, "strict", sandbox={"network": "gateway-only"})
    with pytest.raises(EnvironmentForbids, match="network"):
        await gateway.service.update(ALICE, session.id, UpdateSession(environment="strict"))


def test_an_environments_own_server_cannot_be_taken_by_name() -> None:
    environment = spec(options={"mcp_servers": {"docs": {"type": "http", "url": "https://docs.example.com"}}})
    mine = {"command": "x"}
    check_options("e", environment, SessionSpec(mcp_servers={"mine": mine}))
    with pytest.raises(EnvironmentForbids, match="docs"):
        check_options("e", environment, SessionSpec(mcp_servers={"docs": mine}))


def test_what_an_agent_is_started_with() -> None:
    own = SessionSpec.model_validate(
        {
            "append_system_prompt": "mine",
            "disallowed_tools": ["Bash"],
            "permissions": {"deny": ["WebFetch"]},
            "env_vars": {"MINE": "1"},
            "agents": {"mine": {"description": "d", "prompt": "p"}},
        }
    )
    defaults = SessionSpec(system_prompt="all", disallowed_tools=["Write"], effort="low")
    found = agents_options(STRICT, own, defaults)
    assert found.append_system_prompt == "mine"
    assert found.system_prompt is None
    assert found.disallowed_tools == ["Write", "Bash"]
    assert found.permissions is not None
    assert (found.permissions.allow, found.permissions.deny) == (("Bash(ls)",), ("Read(.env)", "WebFetch"))
    assert found.env_vars == {"FIXED": "1", "MINE": "1"}
    assert sorted(found.agents or {}) == ["mine", "theirs"]
    assert found.effort == "low"
    assert found.permission_mode is PermissionMode.ACCEPT_EDITS


def test_the_page_has_every_option_that_there_is() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.read_text(), re.MULTILINE)
    said = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert said >= set(SessionSpec.model_fields)
    assert {*NARROWING, *FREE, "network"} == set(SessionSpec.model_fields), "a new option is free, or it has a rule"


WITH_SECRET = {"type": "http", "url": "https://x.example/mcp", "headers": {"h": "${secret:A}"}}


def test_a_secret_stands_in_a_header() -> None:
    found = spec(secrets=[{"name": "A"}], options={"mcp_servers": {"s": WITH_SECRET, "t": {"command": "c"}}})
    assert found.gateway_servers == {"s": WITH_SECRET}


@pytest.mark.parametrize(
    "wrong",
    [
        {"sandbox": {"variables": {"ANTHROPIC_API_KEY": "x"}}},
        {"secrets": [{"name": "A"}, {"name": "A"}]},
        {"secrets": [{"name": "A", "variable": "B"}]},
        {"secrets": [{"name": "A", "expose": "env", "variable": "CLAUDE_X"}]},
        {"secrets": [{"name": "A", "expose": "env"}], "sandbox": {"variables": {"A": "x"}}},
        {"options": {"mcp_servers": {"s": {"type": "http", "url": "u", "headers": {"h": "${secret:A}"}}}}},
        {"secrets": [{"name": "A"}], "options": {"mcp_servers": {"s": {"command": "c", "env": {"h": "${secret:A}"}}}}},
        {"secrets": [{"name": "A"}], "options": {"mcp_servers": {"s": {"type": "http", "url": "${secret:A}"}}}},
        {"secrets": [{"name": "A"}]},
        {"secrets": [{"name": "A"}], "options": {"mcp_servers": {"s/t": {**WITH_SECRET, "url": "https://x.example/"}}}},
        {"secrets": [{"name": "A"}], "options": {"mcp_servers": {"s": {**WITH_SECRET, "url": "file:///etc/passwd"}}}},
        {"secrets": [{"name": "A"}], "options": {"mcp_servers": {"s": {**WITH_SECRET, "type": "sse"}}}},
        {"secrets": [{"name": "A"}], "options": {"system_prompt": "${secret:A}"}},
        {"allowed_roles": ["somebody"]},
        {"options": {"network": "gateway-only"}},
        {"image": "x"},
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**wrong)
