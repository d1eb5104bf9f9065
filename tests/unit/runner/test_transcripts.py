"""The agent's transcript files, in a home that the agent may have arranged to harm."""

import json
import os
from pathlib import Path

import pytest

from carrel.runner.transcripts import Transcripts, project_key


def line(uuid: str, **more: object) -> str:
    return json.dumps({"uuid": uuid} | more)


def folder(home: Path) -> Path:
    return home / ".claude" / "projects" / "-workspace"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def files(home: Path) -> Transcripts:
    return Transcripts(home, "/workspace", None)


def test_the_folder_is_the_one_claude_code_uses() -> None:
    assert project_key("/workspace") == "-workspace"
    assert project_key("/a b/ü_c.d") == "-a-b---c-d"


def test_what_is_written_is_found(files: Transcripts, home: Path) -> None:
    assert not files.exists("a")
    files.write("a", "", [line("1", text="é𝄞")], first=True)
    files.write("a", "", [line("2")], first=False)
    files.write("a", "subagents/agent-x", [line("3")], first=True)
    assert files.exists("a")
    assert list(files.found("a")) == [("", [line("1", text="é𝄞"), line("2")]), ("subagents/agent-x", [line("3")])]
    assert (folder(home) / "a.jsonl").stat().st_mode & 0o777 == 0o600
    assert (folder(home) / "a" / "subagents" / "agent-x.jsonl").is_file()
    files.write("a", "", [line("9")], first=True)
    assert dict(files.found("a"))[""] == [line("9")], "the first batch begins the file anew"


def test_a_message_is_looked_up_by_its_uuid(files: Transcripts) -> None:
    assert not files.holds("a", "1")
    files.write("a", "", [line("1"), line("2", text="1 and 3")], first=True)
    assert files.holds("a", "2")
    assert not files.holds("a", "3")


def test_half_a_line_is_left_out(files: Transcripts, home: Path) -> None:
    files.write("a", "", [line("1")], first=True)
    with open(folder(home) / "a.jsonl", "ab") as file:
        file.write(b'{"uuid": "2", "te')
    assert list(files.found("a")) == [("", [line("1")])]
    assert files.holds("a", "1")


@pytest.mark.parametrize("subpath", ["../x", "a/../../x", "/etc/passwd", "a//b", ".", "..", "a\x00", "a b", "ü"])
def test_no_subpath_leads_elsewhere(files: Transcripts, subpath: str) -> None:
    with pytest.raises(ValueError, match="not a transcript's subpath"):
        files.write("a", subpath, [line("1")], first=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_link_in_a_files_place_is_not_followed(files: Transcripts, home: Path, tmp_path: Path, first: bool) -> None:
    secret = tmp_path / "secret"
    secret.write_text(line("secret"))
    folder(home).mkdir(parents=True)
    (folder(home) / "a.jsonl").symlink_to(secret)
    assert not files.exists("a")
    assert list(files.found("a")) == []
    assert not files.holds("a", "secret")
    if first:
        files.write("a", "", [line("1")], first=True)
        assert list(files.found("a")) == [("", [line("1")])]
    else:
        with pytest.raises(OSError):  # noqa: PT011  (which one depends on what stands there)
            files.write("a", "", [line("1")], first=False)
    assert secret.read_text() == line("secret")


@pytest.mark.parametrize("place", [".claude", ".claude/projects", ".claude/projects/-workspace"])
def test_a_link_in_a_folders_place_is_not_followed(files: Transcripts, home: Path, tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    inside = elsewhere / Path(".claude/projects/-workspace").relative_to(place)
    inside.mkdir(parents=True)
    (inside / "a.jsonl").write_text(line("secret"))
    (home / place).parent.mkdir(parents=True, exist_ok=True)
    (home / place).symlink_to(elsewhere)
    assert list(files.found("a")) == []
    files.write("a", "", [line("1")], first=True)
    assert (inside / "a.jsonl").read_text() == line("secret")
    assert list(files.found("a")) == [("", [line("1")])]


def test_a_link_among_the_sub_agents_files_is_not_followed(files: Transcripts, home: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(line("secret"))
    files.write("a", "x", [line("1")], first=True)
    (folder(home) / "a" / "y.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder(home) / "a" / "deep").symlink_to(tmp_path)
    assert list(files.found("a")) == [("x", [line("1")])]


def test_a_fifo_holds_nobody_up(files: Transcripts, home: Path) -> None:
    folder(home).mkdir(parents=True)
    os.mkfifo(folder(home) / "a.jsonl")
    assert not files.exists("a")
    assert list(files.found("a")) == []
    files.write("a", "", [line("1")], first=True)
    assert files.exists("a")


@pytest.mark.requires("root")
def test_what_is_made_belongs_to_the_agent(home: Path) -> None:
    Transcripts(home, "/workspace", (61_234, 61_235)).write("a", "sub/x", [line("1")], first=True)
    made = [home / ".claude", *(home / ".claude").rglob("*")]
    assert len(made) == 6
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(61_234, 61_235)}


def _line(kind: str, uuid: str, content: object, message: str = "m1") -> str:
    role = {"id": message, "role": kind, "content": content, "stop_reason": "tool_use"}
    return json.dumps({"type": kind, "uuid": uuid, "sessionId": "s", "cwd": "/workspace", "message": role})


CALL = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}
ASKED_FOR = _line("user", "u1", [{"type": "text", "text": "do it"}], "m0")


def test_a_call_that_was_held_is_put_off_once_and_taken_back(tmp_path: Path) -> None:
    files = Transcripts(tmp_path, "/workspace", None)
    assert files.held_call("s") is None
    files.write("s", "", [ASKED_FOR, _line("assistant", "a1", [CALL])], first=True)
    assert files.held_call("s") == ("toolu_1", "Bash")
    line = files.put_off("s", "toolu_1")
    assert line is not None
    mark = json.loads(line)
    assert (mark["parentUuid"], mark["sessionId"], mark["attachment"]["type"]) == ("a1", "s", "hook_deferred_tool")
    assert mark["attachment"]["toolInput"] == {"command": "ls"}
    assert files.put_off("s", "toolu_1") is None, "it is written once"
    assert files.held_call("s") == ("toolu_1", "Bash")
    files.take_back("s")
    ((_, lines),) = files.found("s")
    again = json.loads(lines[-1])
    assert (again["uuid"], again["attachment"]["type"]) == (mark["uuid"], "hook_cancelled"), "the chain stays whole"


def test_what_is_no_call_that_is_held(tmp_path: Path) -> None:
    files = Transcripts(tmp_path, "/workspace", None)
    call = _line("assistant", "a1", [CALL])
    second = _line("assistant", "a2", [{**CALL, "id": "toolu_2"}])
    result = _line("user", "u2", [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}], "m2")
    said = _line("assistant", "a3", [{"type": "text", "text": "done"}], "m3")
    for lines in ([ASKED_FOR], [ASKED_FOR, call, second], [ASKED_FOR, call, result], [ASKED_FOR, call, result, said]):
        files.write("s", "", lines, first=True)
        assert files.held_call("s") is None
    assert not files.over("s")
    files.write("s", "", [said.replace('"tool_use"', '"end_turn"')], first=True)
    assert files.over("s")
