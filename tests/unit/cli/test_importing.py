"""`carrel import claude-agent-http`: rows of the old service, and transcripts on its disk, made sessions of ours."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from carrel.cli.app import run
from carrel.model import Session, Workspace
from carrel.runner.transcripts import project_key
from carrel.store import SqliteStore

ONE = "0b5c1d5e-1111-4111-8111-111111111111"
TWO = "0b5c1d5e-2222-4222-8222-222222222222"

SCHEMA = """
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, user_id TEXT, subdir TEXT, cwd TEXT, system_prompt TEXT, mcp_servers TEXT,
    plugins TEXT, model TEXT, permission_mode TEXT, allowed_tools TEXT, disallowed_tools TEXT, add_dirs TEXT,
    max_turns INTEGER, max_budget_usd REAL, created_at TEXT, last_active_at TEXT, message_count INTEGER, metadata TEXT)
"""


class Old:
    """The old service's database and disk."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sessions.db"
        self.claude = folder / "claude"
        self.base = folder / "home"
        self.data = folder / "data"
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(SCHEMA)

    def add(self, session_id: str | None = ONE, user_id: str = "alice", **more: Any) -> None:
        subdir = more.get("subdir")
        row = {
            "session_id": session_id,
            "user_id": user_id,
            "cwd": "/".join(filter(None, ["/home", user_id, subdir])),
            "created_at": "2025-03-01T10:00:00.123456",
            "last_active_at": "2025-03-02T11:00:00",
            "message_count": 3,
            "mcp_servers": "{}",
            "plugins": "[]",
            "allowed_tools": "[]",
            "metadata": "{}",
        } | more
        with closing(sqlite3.connect(self.path)) as connection, connection:
            marks = ", ".join("?" for _ in row)
            connection.execute(f"INSERT INTO sessions ({', '.join(row)}) VALUES ({marks})", list(row.values()))

    def transcript(self, cwd: str, name: str, *lines: Any) -> Path:
        path = self.claude / "projects" / project_key(cwd) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    def bring_in(self, *more: str, source: str | None = None) -> int:
        arguments = ["--base-dir", str(self.base), "--claude-dir", str(self.claude), *more]
        where = ["--data", str(self.data)]
        return run([*where, "import", "claude-agent-http", source or str(self.path), *arguments])

    def read(self, work: Callable[[Any], Any]) -> Any:
        async def go() -> Any:
            async with AsyncExitStack() as stack:
                store = SqliteStore(self.data / "carrel.db")
                await store.start(stack)
                return await store.read(work)

        return asyncio.run(go())

    def session(self, session_id: str) -> Session | None:
        found: Session | None = self.read(lambda tx: tx.sessions.get(session_id))
        return found

    def lines(self, session_id: str, subpath: str = "") -> list[Any]:
        page = self.read(lambda tx: tx.transcripts.page(session_id, subpath, after=0, limit=1000))
        return [json.loads(line) for _, line in page]


@pytest.fixture
def old(tmp_path: Path) -> Old:
    return Old(tmp_path)


@pytest.mark.parametrize(("chosen", "seconds"), [(0, None), (77, 77)])
def test_a_time_to_live_of_the_settings_wins(old: Old, chosen: int, seconds: int | None) -> None:
    old.add()
    old.data.mkdir(mode=0o700, exist_ok=True)
    (old.data / "config.yaml").write_text(f"defaults: {{ttl_seconds: {chosen}}}\n")
    assert old.bring_in() == 0
    session = old.session(ONE)
    assert session is not None
    assert (session.ttl_seconds, session.expires_at is None) == (seconds, seconds is None)


def test_a_row_becomes_a_session_with_all_that_it_says(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    old.add(
        subdir="work/x",
        system_prompt="Be brief.",
        model="opus",
        permission_mode="plan",
        max_turns=7,
        max_budget_usd=1.5,
        mcp_servers='{"a": {"type": "http", "url": "http://127.0.0.1:1/mcp"}}',
        allowed_tools='["Read"]',
        disallowed_tools='["Bash"]',
        plugins='[{"type": "local", "path": "/p"}]',
        add_dirs='["lib"]',
        metadata='{"ticket": 42}',
    )
    assert old.bring_in() == 0
    session = old.session(ONE)
    assert session is not None
    assert (session.owner, session.workspace) == ("alice", Workspace(type="user", subdir="work/x"))
    assert session.spec == {
        "system_prompt": "Be brief.",
        "model": "opus",
        "permission_mode": "plan",
        "max_turns": 7,
        "mcp_servers": {"a": {"type": "http", "url": "http://127.0.0.1:1/mcp"}},
        "allowed_tools": ["Read"],
        "disallowed_tools": ["Bash"],
        "setting_sources": ["user", "project"],
    }
    assert session.budget is not None
    assert session.budget.max_usd == 1.5
    assert (session.metadata, session.turn_count, session.status) == ({"ticket": 42}, 3, "idle")
    # The old service wrote its host's own time.
    assert session.created_at == datetime(2025, 3, 1, 10, 0, 0, 123456).astimezone()
    assert session.last_active_at == datetime(2025, 3, 2, 11, 0).astimezone()
    # What was unused for long over there is not gone at once over here.
    assert session.expires_at is not None
    assert session.expires_at > datetime.now(UTC)
    assert session.ttl_seconds == 3600
    assert session.agent_session_id is None
    user = old.read(lambda tx: tx.users.get("alice"))
    assert user.number == session.uid_number
    told = capsys.readouterr().out
    assert f"{ONE}: alice/work/x, 3 messages, no conversation found; plugins is not taken over; add_dirs is not" in told
    assert "1 brought in (0 with their conversation), 0 already here, 0 skipped" in told
    assert f"1 of their directories are not there, such as {old.base}/alice/work/x." in told
    assert f"Set users.base_dir to {old.base}" in told


def test_its_conversation_comes_along_as_an_agent_of_ours_would_have_written_it(old: Old) -> None:
    old.add(subdir="x")
    lines = [
        {
            "type": "user",
            "uuid": "u1",
            "sessionId": ONE,
            "cwd": "/home/alice/x",
            "message": {"content": "/home/alice/x"},
        },
        {"type": "assistant", "uuid": "u2", "sessionId": ONE, "cwd": "/home/alice/x/deep/er"},
        {"type": "assistant", "uuid": "u2", "sessionId": ONE, "cwd": "/home/alice/x"},
        {"type": "summary", "summary": "no uuid", "cwd": "/somewhere/else"},
        {"type": "user", "uuid": "u3", "cwd": "/home/alice/xylophone", "text": "\ud800 é"},
    ]
    main = old.transcript("/home/alice/x", ONE, *lines, "{half a li", "[1]", "")
    sub = main.with_suffix("") / "subagents" / "agent-1.jsonl"
    sub.parent.mkdir(parents=True)
    sub.write_text(json.dumps({"uuid": "s1", "cwd": "/home/alice/x"}) + "\n")
    assert old.bring_in() == 0
    session = old.session(ONE)
    assert session is not None
    assert session.agent_session_id == ONE
    found = old.lines(ONE)
    assert [line.get("uuid") for line in found] == ["u1", "u2", None, "u3"]
    assert [line["cwd"] for line in found] == ["/workspace", "/workspace/deep/er", "/workspace", "/workspace"]
    assert found[0]["message"] == {"content": "/home/alice/x"}
    assert found[3]["text"] == "\ud800 é"
    assert old.lines(ONE, "subagents/agent-1") == [{"uuid": "s1", "cwd": "/workspace"}]


def test_broken_lines_are_counted(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    old.add()
    old.transcript("/home/alice", ONE, {"uuid": "u1"}, "{half", "[1]")
    old.bring_in()
    told = capsys.readouterr().out
    assert "a conversation of 1 lines; 2 lines of its transcript are broken" in told


def test_a_transcript_under_another_name_of_its_folder_is_found(old: Old) -> None:
    old.add(cwd="/link/alice")
    old.transcript("/mnt/real/alice", ONE, {"uuid": "u1", "cwd": "/mnt/real/alice"})
    old.bring_in()
    assert old.lines(ONE) == [{"uuid": "u1", "cwd": "/workspace"}]


def test_what_an_agent_has_put_in_a_transcript_s_place_is_not_read(old: Old, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"uuid": "secret"}\n')
    old.add(ONE)
    old.add(TWO, user_id="bob")
    path = old.transcript("/home/alice", ONE, {"uuid": "u1"})
    path.unlink()
    path.symlink_to(secret)
    main = old.transcript("/home/bob", TWO, {"uuid": "u1"})
    (main.with_suffix("")).mkdir()
    (main.with_suffix("") / "agent.jsonl").symlink_to(secret)
    old.bring_in()
    session = old.session(ONE)
    assert session is not None
    assert session.agent_session_id is None
    assert old.read(lambda tx: list(tx.transcripts.subpaths(ONE))) == []
    assert old.read(lambda tx: list(tx.transcripts.subpaths(TWO))) == [""]


def test_it_may_be_run_again(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    old.add(ONE)
    old.transcript("/home/alice", ONE, {"uuid": "u1"}, {"type": "summary"})
    old.bring_in()
    first = old.session(ONE)
    old.add(TWO)
    capsys.readouterr()
    assert old.bring_in() == 0
    told = capsys.readouterr().out
    assert f"{ONE}: already here" in told
    assert "1 brought in (0 with their conversation), 1 already here, 0 skipped" in told
    assert old.session(ONE) == first
    assert len(old.lines(ONE)) == 2


def test_a_dry_run_says_the_same_and_does_nothing(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    old.add(ONE)
    assert old.bring_in("--dry-run") == 0
    assert "1 would be brought in" in capsys.readouterr().out
    assert not old.data.exists()
    old.bring_in()
    old.add(TWO)
    capsys.readouterr()
    assert old.bring_in("--dry-run") == 0
    assert "1 would be brought in (0 with their conversation), 1 already here" in capsys.readouterr().out
    assert old.session(TWO) is None


def test_an_id_that_is_no_uuid_gets_one_and_always_the_same(old: Old) -> None:
    old.add("session_1")
    old.transcript("/home/alice", "session_1", {"uuid": "u1", "sessionId": "session_1"})
    old.bring_in()
    page = old.read(lambda tx: tx.sessions.page(_everybody(), cursor=None, limit=10))
    [session] = page.items
    assert session.metadata == {"claude_agent_http_id": "session_1"}
    assert session.agent_session_id == session.id
    assert old.lines(session.id) == [{"uuid": "u1", "sessionId": session.id}]
    old.bring_in()
    assert len(old.read(lambda tx: tx.sessions.page(_everybody(), cursor=None, limit=10)).items) == 1


def _everybody() -> Any:
    from carrel import abc

    return abc.SessionFilter()


@pytest.mark.parametrize(
    ("rubbish", "why"),
    [
        ({"session_id": None}, "it has no session_id"),
        ({"user_id": "../root"}, "id: String should match"),
        ({"subdir": "../.."}, "subdir must be a relative path"),
        ({"permission_mode": "whatever"}, "permission_mode"),
        ({"max_turns": 0}, "max_turns"),
        ({"max_budget_usd": -1}, "max_usd"),
        ({"metadata": "{"}, "metadata is not JSON"),
        ({"metadata": "[1]"}, "cannot convert"),
        ({"allowed_tools": '{"a": 1}'}, "allowed_tools"),
        ({"created_at": "yesterday"}, "datetime"),
        ({"last_active_at": None}, "datetime"),
        ({"message_count": "many"}, "int"),
    ],
)
def test_rubbish_is_reported_and_skipped(
    old: Old, capsys: pytest.CaptureFixture[str], rubbish: dict[str, Any], why: str
) -> None:
    old.add(**({"session_id": TWO} | rubbish))
    old.add(ONE)
    assert old.bring_in() == 0
    told = capsys.readouterr().out
    assert f"{rubbish.get('session_id', TWO)}: skipped: " in told
    assert why in told
    assert "1 brought in (0 with their conversation), 0 already here, 1 skipped" in told
    assert old.session(ONE) is not None
    assert old.session(TWO) is None


def test_a_source_that_is_none_is_refused(old: Old, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text = tmp_path / "empty.db", tmp_path / "text.db"
    sqlite3.connect(empty).close()
    empty.touch()
    text.write_text("not a database at all" * 100)
    for source, why in [
        (str(tmp_path / "none.db"), "There is no file"),
        (str(empty), "not a database of claude-agent-http"),
        (str(text), "not a database of claude-agent-http"),
        ("postgresql://alice:hidden-password@127.0.0.1:1/none", "The database cannot be reached"),
    ]:
        assert old.bring_in(source=source) == 2
        told = capsys.readouterr().err
        assert why in told
        assert "hidden-password" not in told
    assert not old.data.exists()
