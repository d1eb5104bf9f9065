"""A session's life on the real CLI: sleep and wake, stop and resume, delete, and restarts of the server."""

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import pytest

from carrel.cli.runtimes import bundled_cli
from carrel.cli.server import running
from carrel.settings import load_settings

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def processes_of(data: Path) -> list[int]:
    """Every process whose command line or environment names the data folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if str(data).encode() in told:
            found.append(int(entry.name))
    return found


@pytest.mark.on_both_engines
async def test_an_idle_session_costs_no_process_and_wakes_where_it_was(start):
    api = await start(idle_timeout_seconds=0.5)
    session = await api.session()
    await api.run(session, "[[write: kept.txt | still here]]")
    await api.until_status(session, "idle")
    await api.until("its process has ended", lambda: asyncio.sleep(0, not len(api.server.hub)))
    woken = await api.run(session, "[[bash: cat kept.txt]] [[say: then]]")
    assert woken["tool_calls"][0]["result"] == "still here"
    await api.until_status(session, "idle")
    assert "turn 3" in (await api.run(session, "hello again"))["text"]


async def test_a_session_wakes_although_its_home_was_lost(start):
    api = await start(idle_timeout_seconds=0.5)
    session = await api.session()
    await api.run(session, "hello")
    await api.run(session, "[[bash: echo one]]")
    await api.until_status(session, "idle")
    shutil.rmtree(api.server.data / "sessions" / session / "home")
    assert "turn 3" in (await api.run(session, "do you remember?"))["text"]


async def test_a_long_turn_is_not_taken_for_idle(start):
    api = await start(idle_timeout_seconds=0.3)
    session = await api.session()
    result = await api.run(session, "[[bash: sleep 1; echo slept]]")
    assert result["tool_calls"][0]["result"] == "slept"


@pytest.mark.on_both_engines
async def test_stop_and_resume(api):
    session = await api.session()
    await api.run(session, "hello")
    running = await api.send(session, "[[count: 1000 @20]]")
    queued = await api.send(session, "[[say: never]]")
    await api.until_event(session, "turn.started", running)
    stopped = await api.ask("POST", f"/sessions/{session}/stop")
    assert stopped["status"] == "stopped"
    assert len(api.server.hub) == 0
    assert (await api.ask("GET", f"/sessions/{session}/turns/{running}"))["status"] == "interrupted"
    assert (await api.ask("GET", f"/sessions/{session}/turns/{queued}"))["status"] == "cancelled"
    problem = await api.ask("POST", f"/sessions/{session}/turns", 409, json={"prompt": "hello"})
    assert problem["code"] == "session_stopped"
    assert (await api.ask("POST", f"/sessions/{session}/resume"))["status"] == "idle"
    # The interrupted prompt counts: it is part of the conversation.
    assert "turn 3" in (await api.run(session, "hello"))["text"]


@pytest.mark.on_both_engines
async def test_delete_in_mid_turn_leaves_nothing(api):
    session = await api.session()
    turn = await api.send(session, "[[bash: sleep 100 & sleep 100]]")
    await api.until_event(session, "tool.called", turn)
    await api.ask("DELETE", f"/sessions/{session}", 204)
    assert not (api.server.data / "sessions" / session).exists()
    assert not any(path.is_dir() for path in (api.server.data / "sandboxes").iterdir())
    for method, path in [
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/turns"),
        ("POST", "/resume"),
        ("GET", "/files"),
        ("GET", "/export"),
    ]:
        assert (await api.ask(method, f"/sessions/{session}{path}", 404))["code"] == "session_not_found"
    assert (await api.ask("POST", f"/sessions/{session}/turns", 404, json={"prompt": "x"}))[
        "code"
    ] == "session_not_found"


@pytest.mark.on_both_engines
async def test_viewers_of_a_deleted_session_are_told_and_let_go(api):
    session = await api.session()
    seen = []

    async def watch():
        async with api.stream("GET", f"/sessions/{session}/events") as stream:
            async for frame in stream:
                seen.append(frame["event"])  # noqa: PERF401 - looked at meanwhile

    watching = asyncio.create_task(watch())
    await api.until("the viewer is there", lambda: asyncio.sleep(0, bool(seen)))
    await api.ask("DELETE", f"/sessions/{session}", 204)
    await asyncio.wait_for(watching, 10)
    assert seen == ["session.created", "session.deleted"]


async def test_an_unused_session_is_deleted_when_its_time_is_over(start, monkeypatch):
    monkeypatch.setattr("carrel.sessions.reconciler._SWEEP_SECONDS", 0.2)
    api = await start()
    session = await api.session(ttl_seconds=1)

    async def gone():
        return (await api.http.get(f"/sessions/{session}")).status_code == 404

    await api.until("it is gone", gone)


@pytest.mark.on_both_engines
async def test_a_turn_that_waits_too_long_expires(api):
    session = await api.session()
    first = await api.send(session, "[[count: 1000 @50]]")
    await api.until_event(session, "turn.started", first)
    late = await api.send(session, "[[say: late]]", queue_timeout_seconds=0.3)
    ended = await api.until_event(session, "turn.completed", late)
    assert ended["data"]["status"] == "expired"
    await api.ask("POST", f"/sessions/{session}/interrupt", 202)


@pytest.mark.on_both_engines
async def test_an_orderly_restart_keeps_conversation_files_and_queue(start, tmp_path, engine):
    given = {"data": tmp_path / "again", "port": 0, "model_upstream": "scripted", "drain_seconds": 0, **engine}
    async with running(load_settings(overrides=given)) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", headers=headers, timeout=60) as http:
            session = (await http.post("/sessions", json={})).json()["id"]
            await http.post(f"/sessions/{session}/turns", json={"prompt": "[[write: a | b]]", "wait": True})
            await http.post(f"/sessions/{session}/turns", json={"prompt": "[[count: 100 @10]]"})
            await http.post(f"/sessions/{session}/turns", json={"prompt": "[[bash: cat a]]"})
    assert processes_of(tmp_path / "again") == []
    api = await start(data=tmp_path / "again")
    last = (await api.ask("GET", f"/sessions/{session}/turns"))["data"][0]
    await api.until_event(session, "turn.completed", last["id"])
    result = await api.ask("GET", f"/sessions/{session}/turns/{last['id']}")
    assert (result["status"], result["tool_calls"][0]["result"]) == ("succeeded", "b")


async def test_without_a_credential_a_turn_fails_at_once_and_says_how_to_set_one(start):
    api = await start(model_upstream="anthropic")
    session = await api.session()
    result = await api.run(session, "hello")
    assert (result["status"], result["error"]["code"]) == ("failed", "missing_credential")
    assert "ANTHROPIC_API_KEY" in result["error"]["message"]
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "idle"


async def test_an_agent_that_cannot_start_fails_the_session_until_resume(start, tmp_path):
    broken = tmp_path / "claude"
    broken.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    api = await start(cli_path=broken)
    session = await api.session()
    result = await api.run(session, "hello")
    assert (result["status"], result["error"]["code"]) == ("failed", "agent_start_failed")
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "failed"
    assert (await api.ask("POST", f"/sessions/{session}/turns", 409, json={"prompt": "x"}))["code"] == "session_failed"
    assert (await api.ask("POST", f"/sessions/{session}/resume"))["status"] == "idle"


async def test_two_hundred_kilobytes_of_stderr_hang_nothing(start, tmp_path):
    # A faulty CLI that talks on stderr before and while it works.
    real = bundled_cli().parent
    noisy = tmp_path / "claude"
    noisy.write_text(
        "#!/bin/sh\nhead -c 200000 /dev/zero | tr '\\0' e >&2\n"
        f'(while sleep 0.05; do echo noise >&2; done) & exec {real}/claude "$@"\n'
    )
    noisy.chmod(0o755)
    api = await start(cli_path=noisy, read_only_paths=[str(real)])
    session = await api.session()
    result = await api.run(session, "[[bash: echo fine]]")
    assert result["tool_calls"][0]["result"] == "fine"


async def test_a_real_skill_is_loaded_and_run(api):
    session = await api.session(skills="all", setting_sources=["project"])
    skill = "---\nname: greeter\ndescription: Greets people by name.\n---\nSay the words SKILL-WAS-READ to greet.\n"
    put = await api.http.put(f"/sessions/{session}/files/.claude/skills/greeter/SKILL.md", content=skill)
    assert put.status_code == 200
    result = await api.run(session, '[[tool: Skill | {"skill": "greeter"}]] [[say: used]]')
    assert result["status"] == "succeeded"
    assert not result["tool_calls"][0]["is_error"], result["tool_calls"]
    told = json.dumps(await api.events(session))
    assert "greeter" in json.dumps((await api.until_event(session, "agent.initialised"))["data"]["skills"])
    assert "SKILL-WAS-READ" in told or "Launching skill" in told


MCP_SERVER = """
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if "id" not in m:
        continue
    if m["method"] == "initialize":
        r = {"protocolVersion": m["params"]["protocolVersion"], "capabilities": {"tools": {}},
             "serverInfo": {"name": "sums", "version": "1"}}
    elif m["method"] == "tools/list":
        r = {"tools": [{"name": "add", "description": "Adds.", "inputSchema": {"type": "object",
             "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}}]}
    elif m["method"] == "tools/call":
        a = m["params"]["arguments"]
        r = {"content": [{"type": "text", "text": f"sum is {a['a'] + a['b']}"}]}
    else:
        print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "error": {"code": -32601, "message": "no"}}), flush=True)
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": r}), flush=True)
"""


async def test_a_real_mcp_server_is_loaded_and_used(api):
    server = {"type": "stdio", "command": "/usr/bin/python3", "args": ["/workspace/sums.py"]}
    session = await api.session(mcp_servers={"sums": server})
    await api.http.put(f"/sessions/{session}/files/sums.py", content=MCP_SERVER)
    result = await api.run(session, '[[tool: mcp__sums__add | {"a": 40, "b": 2}]]')
    assert "sum is 42" in json.dumps(result["tool_calls"][0]["result"]), result
    started = await api.until_event(session, "agent.initialised")
    assert {"name": "sums", "status": "connected"} in started["data"]["mcp_servers"]


async def test_a_background_task_that_ends_after_its_turn_begins_one_of_the_agents_own(start):
    api = await start(idle_timeout_seconds=0.3)
    session = await api.session()
    call = json.dumps({"command": "sleep 2; echo late", "run_in_background": True, "description": "x"})
    result = await api.run(session, f"[[tool: Bash | {call}]] [[say: started it]]")
    assert result["status"] == "succeeded"

    async def own_turn():
        turns = (await api.ask("GET", f"/sessions/{session}/turns"))["data"]
        return next((turn for turn in turns if turn["origin"] == "agent" and turn["status"] == "succeeded"), None)

    # The session is not put to sleep while the task runs, although idle_timeout is long over.
    assert await api.until("the agent's own turn", own_turn, 15)
    await api.until_status(session, "idle")
