"""What the settings give every session: defaults of its options, MCP servers, plugins; with the real agent."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


SERVER = """
import json, os, sys
TOOL = {"name": "shout", "description": "Shouts.", "inputSchema": {"type": "object", "properties": {"what": {"type": "string"}}}}
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    if asked["method"] == "initialize":
        answer = {"protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "loud", "version": "1"}}
    elif asked["method"] == "tools/list":
        answer = {"tools": [TOOL]}
    elif asked["method"] == "tools/call":
        said = asked["params"]["arguments"]["what"].upper() + os.environ.get("LOUD", "")
        answer = {"content": [{"type": "text", "text": said + " from " + os.getcwd()}]}
    else:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32601, "message": "no"}}), flush=True)
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answer}), flush=True)
"""


def shouting(mark: str) -> dict:
    return {"type": "stdio", "command": "/usr/bin/python3", "args": ["-c", SERVER], "env": {"LOUD": mark}}


async def initialised(api, session) -> dict:
    return [event["data"] for event in await api.events(session) if event["type"] == "agent.initialised"][-1]


def texts(result) -> list[str]:
    return [str(call["result"]) for call in result["tool_calls"]]


async def test_an_mcp_server_of_the_settings_is_every_sessions(start):
    api = await start(mcp_servers={"loud": shouting("!"), "away": {"type": "http", "url": "http://127.0.0.1:9/mcp"}})
    session = await api.session()
    result = await api.run(session, '[[tool: mcp__loud__shout | {"what": "hello"}]]')
    assert ["HELLO! from /workspace" in text for text in texts(result)] == [True], result
    servers = {server["name"]: server["status"] for server in (await initialised(api, session))["mcp_servers"]}
    assert servers["loud"] == "connected"
    assert servers["away"] != "connected"  # an agent behind the gateway has no network
    assert "LOUD" not in json.dumps(await api.ask("GET", f"/sessions/{session}"))


async def test_a_sessions_own_mcp_server_wins_by_name(start):
    api = await start(mcp_servers={"loud": shouting("!"), "other": shouting("?")})
    session = await api.session(mcp_servers={"loud": shouting("!!!")})
    calls = '[[tool: mcp__loud__shout | {"what": "a"}]] [[tool: mcp__other__shout | {"what": "b"}]]'
    found = texts(await api.run(session, calls))
    assert ["A!!! from" in found[0], "B? from" in found[1]] == [True, True], found


def plugin(folder: Path) -> Path:
    for name, text in {
        ".claude-plugin/plugin.json": json.dumps({"name": "review", "version": "1.0.0", "description": "Reviews."}),
        "skills/greet/SKILL.md": "---\nname: greet\ndescription: Greets people.\n---\nSay PERIWINKLE to them.\n",
        "commands/check.md": "---\ndescription: Checks.\n---\nCheck it.\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("isolation", ["bubblewrap", "container"])
async def test_a_plugin_of_the_settings_is_every_sessions_to_read(start, tmp_path, isolation):
    folder = plugin(tmp_path / "private" / "review")
    (tmp_path / "private").chmod(0o700)  # no agent's user can walk through it
    api = await start(plugins=[{"path": str(folder)}], isolation=isolation)
    session = await api.session()
    result = await api.run(session, '[[tool: Skill | {"skill": "review:greet"}]] [[bash: ls /opt/carrel/plugins/1]]')
    known = await initialised(api, session)
    assert "review:greet" in known["skills"]
    assert result["tool_calls"][0]["is_error"] is False, result
    assert "PERIWINKLE" in (await api.http.get(f"/sessions/{session}/export")).text
    assert "Check it." in (await api.run(session, "/review:check"))["text"]
    if isolation == "bubblewrap":
        assert texts(result)[1].split() == ["commands", "skills"]
        tried = await api.run(session, "[[bash: touch /opt/carrel/plugins/1/x]]")
        assert "Read-only file system" in texts(tried)[0]


async def test_a_plugin_that_cannot_be_loaded_is_told(start, tmp_path):
    folder = plugin(tmp_path / "review")
    (folder / ".claude-plugin/plugin.json").write_text("{")
    api = await start(plugins=[{"path": str(folder)}])
    session = await api.session()
    assert (await api.run(session, "hello"))["status"] == "succeeded"
    (error,) = [event["data"] for event in await api.events(session) if event["type"] == "error"]
    assert error["code"] == "plugin_failed"
