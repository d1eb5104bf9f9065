"""`carrel usage`, and what else the command line tells of spending and of what was said."""

import io
import json
from typing import Any

import pytest

from carrel.cli.app import run

USAGE = "/api/v1/usage"
SUMS = {"requests": 1200, "input_tokens": 3, "output_tokens": 4, "cost_usd": 0.5}


def test_usage_is_a_table_with_a_total(fake: Any, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"user": "alice", "day": "2026-11-21", **SUMS}
    fake.on("GET", USAGE, {"data": [row], "total": SUMS | {"cost_usd": None}, "next_cursor": None})
    assert run(["usage", "--by", "user,day", "--since", "2026-11-01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["USER", "DAY", "REQUESTS", "INPUT", "OUTPUT", "CACHE", "WRITE", "CACHE", "READ", "COST"]
    assert lines[1].split() == ["alice", "2026-11-21", "1,200", "3", "4", "0", "0", "$0.5000"]
    assert lines[2].split() == ["total", "1,200", "3", "4", "0", "0", "unknown"]
    assert fake.asked[0].query == {"group_by": "user,day", "since": "2026-11-01", "limit": "10000"}


def test_budgets(fake: Any, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"kind": "session", "id": "s1", "budget": {"max_usd": 5}, "spent_usd": 0.25, "left_usd": 4.75}
    fake.on("GET", f"{USAGE}/budgets", {"data": [state]})
    assert run(["usage", "--budgets", "--session", "s1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["session", "s1", "$5.00", "$0.2500", "0", "$4.7500"]
    assert run(["usage", "--budgets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["left_usd"] == 4.75
    assert [asked.query for asked in fake.asked] == [{"session_id": "s1"}, {}]


def test_messages_and_search(fake: Any, data: Any, wire: Any, capsys: pytest.CaptureFixture[str]) -> None:
    content = [
        {"type": "text", "text": "Hello\x1b[2J"},
        {"type": "tool_use", "id": "a", "name": "Bash", "input": {"command": "ls"}},
        {"type": "tool_result", "tool_use_id": "a", "content": "file", "is_error": False},
    ]
    message = {"id": "m", "seq": 4, "role": "assistant", "at": "2026-11-21T09:30:00Z", "content": content}
    fake.on("GET", "/api/v1/sessions/s1/messages", {"data": [message], "next_cursor": None})
    assert run(["sessions", "messages", "s1", "--search", "50%"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("── assistant, 2026-11-")
    assert lines[1:] == ["Hello[2J", '[Bash {"command": "ls"}]', "file"]
    assert fake.asked[0].query == {"q": "50%", "thinking": "false"}
    fake.on("GET", "/api/v1/sessions", {"data": [wire.session()], "next_cursor": None})
    assert run(["sessions", "list", "--search", "a b"]) == 0
    assert fake.asked[1].query["q"] == "a b"


def test_chat_with_a_budget(fake: Any, data: Any, wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    fake.on("POST", "/api/v1/sessions", wire.session(), status=201)
    assert run(["chat", "--max-usd", "2.5"]) == 0
    assert fake.asked[0].json == {"budget": {"max_usd": 2.5}}
