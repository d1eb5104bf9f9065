"""`carrel import claude-agent-http` from the old service's PostgreSQL."""

import asyncio
from contextlib import AsyncExitStack
from datetime import datetime

import pytest

from carrel.cli.app import run
from carrel.model import Workspace
from carrel.store import SqliteStore

pytestmark = pytest.mark.requires("postgres")

ONE = "0b5c1d5e-1111-4111-8111-111111111111"

SCHEMA = """
CREATE TABLE sessions (
    session_id VARCHAR(255) PRIMARY KEY, user_id VARCHAR(255) NOT NULL, subdir VARCHAR(500), cwd VARCHAR(1000) NOT NULL,
    system_prompt TEXT, mcp_servers JSONB DEFAULT '{}', plugins JSONB DEFAULT '[]', model VARCHAR(255),
    permission_mode VARCHAR(50), allowed_tools JSONB DEFAULT '[]', disallowed_tools JSONB DEFAULT '[]',
    add_dirs JSONB DEFAULT '[]', max_turns INTEGER, max_budget_usd REAL, created_at TIMESTAMP NOT NULL,
    last_active_at TIMESTAMP NOT NULL, message_count INTEGER DEFAULT 0, metadata JSONB DEFAULT '{}');
INSERT INTO sessions (session_id, user_id, subdir, cwd, allowed_tools, max_budget_usd, created_at, last_active_at,
    message_count, metadata)
VALUES
    ('0b5c1d5e-1111-4111-8111-111111111111', 'alice', 'x', '/home/alice/x', '["Read", "Bash"]', 0.5,
     '2025-03-01 10:00:00.5', '2025-03-02 11:00:00', 4, '{"a": [1]}'),
    ('0b5c1d5e-2222-4222-8222-222222222222', '../bob', NULL, '/home/bob', '[]', NULL, now(), now(), 0, '{}')
"""


def test_rows_of_postgresql_become_sessions(postgres_server, tmp_path, capsys):
    url = postgres_server.database()
    postgres_server.sql(SCHEMA, url.partition("@/")[2].partition("?")[0])
    data = ["--data", str(tmp_path / "data")]
    assert run([*data, "import", "claude-agent-http", url, "--claude-dir", str(tmp_path / "none")]) == 0
    assert "1 brought in (0 with their conversation), 0 already here, 1 skipped" in capsys.readouterr().out

    async def look():
        async with AsyncExitStack() as stack:
            store = SqliteStore(tmp_path / "data" / "carrel.db")
            await store.start(stack)
            return await store.read(lambda tx: tx.sessions.get(ONE))

    session = asyncio.run(look())
    assert (session.owner, session.workspace) == ("alice", Workspace(type="user", subdir="x"))
    assert session.spec == {"allowed_tools": ["Read", "Bash"], "setting_sources": ["user", "project"]}
    assert (session.metadata, session.turn_count, session.budget.max_usd) == ({"a": [1]}, 4, 0.5)
    assert session.created_at == datetime(2025, 3, 1, 10, 0, 0, 500_000).astimezone()


def test_a_database_of_something_else_is_refused(postgres_server, tmp_path, capsys):
    data = ["--data", str(tmp_path / "data")]
    assert run([*data, "import", "claude-agent-http", postgres_server.database()]) == 2
    assert "not a database of claude-agent-http" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
