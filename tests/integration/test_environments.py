"""Environments and their secrets in a whole server, with the real agent, and on the command line."""

import asyncio
import base64
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

KEY = base64.b64encode(b"k" * 32).decode()
VALUE = "npm_only-for-the-build-0123456789"
FILE = """
name: build
description: Where things are built.
mcp_json: servers.json
sandbox: {variables: {STAGE: build}}
secrets: [{name: TOKEN, expose: env, variable: NPM_TOKEN}]
---
name: review
options: {permission_mode: plan}
"""


async def carrel(api: Any, *arguments: str, stdin: str = "", expected: int = 0) -> str:
    """The command, as an operator runs it beside the server."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "carrel", "--url", api.server.url, "--key", str(api.server.key), *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate(stdin.encode())
    assert process.returncode == expected, (out, err)
    return (out + err).decode()


async def test_a_file_is_applied_and_says_what_has_changed(start: Any, tmp_path: Path) -> None:
    api = await start(secrets_key=KEY)
    file, servers = tmp_path / "envs.yaml", tmp_path / "servers.json"
    file.write_text(FILE)
    servers.write_text('{"mcpServers": {"docs": {"type": "http", "url": "https://docs.example.com/mcp"}}}')
    assert "there is no secret TOKEN" in await carrel(api, "env", "apply", str(file), expected=1)
    assert "TOKEN  set" in await carrel(api, "secrets", "set", "TOKEN", stdin=f"{VALUE}\n")
    said = await carrel(api, "env", "apply", str(file))
    assert "build  version 1  new" in said
    assert '+ sandbox.variables.STAGE: "build"' in said
    assert "docs.example.com" in said
    assert (await carrel(api, "env", "apply", str(file))).count("unchanged") == 2
    file.write_text(FILE.replace("plan", "dontAsk"))
    said = await carrel(api, "env", "apply", str(file))
    assert '~ options.permission_mode: "plan" -> "dontAsk"' in said
    exported = await carrel(api, "env", "export", "build")
    assert "unchanged" in await carrel(api, "env", "apply", "-", stdin=exported), "what is exported can be applied"
    listed = await carrel(api, "env", "list") + await carrel(api, "secrets", "list")
    assert "build" in listed
    assert "TOKEN" in listed
    assert VALUE not in listed
    assert "Environments use this secret" in await carrel(api, "secrets", "delete", "TOKEN", expected=1)
    assert "deleted" in await carrel(api, "env", "delete", "build", "review")
    assert "deleted" in await carrel(api, "secrets", "delete", "TOKEN")


async def test_a_secret_reaches_the_agent_and_stands_nowhere_else(
    start: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    api = await start(secrets_key=KEY)
    await api.ask("PUT", "/secrets/TOKEN", 204, json={"value": VALUE})
    body = {"secrets": [{"name": "TOKEN", "expose": "env"}], "sandbox": {"variables": {"STAGE": "build"}}}
    await api.ask("PUT", "/environments/build", 201, json=body)
    session = await api.session(environment="build")
    result = await api.run(session, "[[bash: printf %s $TOKEN | sha256sum; echo stage=$STAGE]]")
    told = str(result["tool_calls"])
    assert sha256(VALUE.encode()).hexdigest() in told
    assert "stage=build" in told
    everything = str(await api.events(session)) + str(await api.ask("GET", "/secrets"))
    everything += str(await api.ask("GET", "/audit")) + str(await api.ask("GET", "/environments/build"))
    assert VALUE not in everything
    await api.ask("POST", f"/sessions/{session}/stop")
    data = api.server.data
    found = [path for path in data.rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()]
    assert found == []
    said = capfd.readouterr()
    assert VALUE not in said.out + said.err


async def test_skills_and_plugins_of_an_environment_are_its_sessions_alone(start: Any, tmp_path: Path) -> None:
    api = await start()
    plugin, skill = tmp_path / "review", api.server.data / "environments/review/.claude/skills/greet/SKILL.md"
    for path, text in {
        plugin / ".claude-plugin/plugin.json": '{"name": "review", "version": "1.0.0", "description": "Reviews."}',
        plugin / "skills/look/SKILL.md": "---\nname: look\ndescription: Looks.\n---\nSay MARIGOLD.\n",
        skill: "---\nname: greet\ndescription: Greets people.\n---\nSay PERIWINKLE.\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    await api.ask("PUT", "/environments/review", 201, json={"sandbox": {"plugins": [str(plugin)]}, "warm_pool": 0})
    inside, outside = await api.session(environment="review"), await api.session()
    calls = '[[tool: Skill | {"skill": "greet"}]] [[tool: Skill | {"skill": "review:look"}]]'
    found = await api.run(inside, calls)
    assert [each["is_error"] for each in found["tool_calls"]] == [False, False], found
    known = (await api.until_event(inside, "agent.initialised"))["data"]["skills"]
    assert {"greet", "review:look"} <= set(known)
    await api.run(outside, "[[say: hello]]")
    known = (await api.until_event(outside, "agent.initialised"))["data"]["skills"]
    assert not {"greet", "review:look"} & set(known)
    shown = await api.ask("GET", f"/sessions/{inside}")
    assert str(plugin) not in str(shown) + str(await api.events(inside))


@pytest.mark.requires("docker", "images")
async def test_an_image_that_the_engine_lacks_is_a_problem(start: Any) -> None:
    api = await start(runtime="docker")
    await api.ask("PUT", "/environments/away", 201, json={"sandbox": {"image": "nowhere.invalid/nothing:1"}})
    await api.ask("PUT", "/environments/here", 201, json={"description": "as the settings say"})
    codes = [
        [each["code"] for each in (await api.ask("POST", f"/environments/{name}/start"))["problems"]]
        for name in ("away", "here")
    ]
    assert codes == [["image_missing"], []]


async def test_without_a_key_setting_a_secret_is_refused(start: Any) -> None:
    api = await start()
    refused = await api.ask("PUT", "/secrets/TOKEN", 409, json={"value": VALUE})
    assert refused["code"] == "secrets_locked"
    assert "CARREL_SECRETS_KEY" in refused["detail"]
    wrong = await api.ask("PUT", "/secrets/TOKEN", 422, json={"value": [VALUE]})
    assert VALUE not in str(wrong)
