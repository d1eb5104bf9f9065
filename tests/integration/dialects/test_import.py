"""A conversation begun with the bare CLI goes on here, on the same files."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import uvicorn
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage

from carrel.cli.app import run
from carrel.model_gateway.scripted import create_app

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

SCHEMA = """
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, subdir TEXT, cwd TEXT NOT NULL, system_prompt TEXT,
    mcp_servers TEXT, plugins TEXT, model TEXT, permission_mode TEXT, allowed_tools TEXT, disallowed_tools TEXT,
    add_dirs TEXT, max_turns INTEGER, max_budget_usd REAL, created_at TEXT NOT NULL, last_active_at TEXT NOT NULL,
    message_count INTEGER DEFAULT 0, metadata TEXT)
"""


async def converse(cwd: Path, claude: Path, prompts: list[str]) -> str:
    """Talk with the bare CLI, as the old service did. Answers the id it kept the conversation under."""
    config = uvicorn.Config(create_app(), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    model = uvicorn.Server(config)
    serving = asyncio.create_task(model.serve(), name="scripted model")
    while not model.started:
        await asyncio.sleep(0.005)
    env = {
        "HOME": str(claude.parent),
        "CLAUDE_CONFIG_DIR": str(claude),
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{model.servers[0].sockets[0].getsockname()[1]}",
        "ANTHROPIC_API_KEY": "sk-nothing",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
    }
    options = ClaudeAgentOptions(env=env, cwd=cwd, permission_mode="bypassPermissions", setting_sources=[])
    session = ""
    async with ClaudeSDKClient(options) as agent:
        for prompt in prompts:
            await agent.query(prompt)
            async for message in agent.receive_response():
                if isinstance(message, ResultMessage):
                    session = message.session_id
    model.should_exit = True
    await serving
    return session


async def test_an_imported_conversation_goes_on_where_it_was(serve, tmp_path, capsys):
    base, claude, source = tmp_path / "people", tmp_path / "old" / ".claude", tmp_path / "old" / "sessions.db"
    cwd = base / "alice" / "project"
    for folder in (cwd, claude):
        folder.mkdir(parents=True)
    session = await converse(cwd, claude, ["[[bash: echo kept > file.txt]] [[say: one]]", "the second"])
    with closing(sqlite3.connect(source)) as connection, connection:
        connection.execute(SCHEMA)
        row = (session, "alice", "project", str(cwd), "bypassPermissions", "2025-03-01T10:00:00", "2025-03-02T10:00:00")
        connection.execute(
            "INSERT INTO sessions (session_id, user_id, subdir, cwd, permission_mode, created_at, last_active_at, "
            "message_count) VALUES (?, ?, ?, ?, ?, ?, ?, 2)",
            row,
        )
    arguments = ["--base-dir", str(base), "--claude-dir", str(claude)]
    for _ in range(2):
        imported = ["--data", str(tmp_path / "data"), "import", "claude-agent-http", str(source), *arguments]
        assert await asyncio.to_thread(run, imported) == 0
    told = capsys.readouterr().out
    assert "1 brought in (1 with their conversation)" in told
    assert "1 already here" in told

    server = await serve(dialects={"claude-agent-http": {"port": 0, "auth": "none"}}, users={"base_dir": base})
    async with httpx.AsyncClient(base_url=server.listeners["claude-agent-http"], timeout=60) as http:
        assert (await http.get("/api/v1/sessions?user_id=alice")).json() == [session]
        shown = (await http.get(f"/api/v1/sessions/{session}")).json()
        assert (shown["cwd"], shown["message_count"], shown["user_id"]) == (str(cwd), 2, "alice")
        assert (await http.post(f"/api/v1/sessions/{session}/resume")).status_code == 200
        answer = await http.post("/api/v1/chat", json={"session_id": session, "message": "and now?"})
        assert answer.json()["text"] == 'This is turn 3 of our conversation. You said: "and now?"'
        files = {"session_id": session, "message": "[[bash: cat file.txt; pwd]]"}
        assert "kept\n/workspace" in (await http.post("/api/v1/chat", json=files)).json()["text"]
        assert (await http.get(f"/api/v1/sessions/{session}")).json()["message_count"] == 4


async def test_a_running_server_s_folder_is_not_touched(serve, tmp_path, capsys):
    await serve()
    source = tmp_path / "sessions.db"
    with closing(sqlite3.connect(source)) as connection, connection:
        connection.execute(SCHEMA)
    imported = ["--data", str(tmp_path / "data"), "import", "claude-agent-http", str(source)]
    assert await asyncio.to_thread(run, imported) == 2
    assert "Another server uses this data folder" in capsys.readouterr().err
