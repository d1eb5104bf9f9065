"""The runner, which may be root, reads and writes transcripts in a home that belongs to its agent."""

import os

import pytest

from carrel.runner.transcripts import Transcripts

LINE = '{"uuid": "u-1", "text": "ours"}'
SECRET = '{"uuid": "u-2", "text": "of another session"}'
NAME = "5a3f9d0e-0000-4000-8000-000000000000"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home/.claude/projects/-workspace").mkdir(parents=True)
    (tmp_path / "others/-workspace" / NAME).mkdir(parents=True)
    (tmp_path / "others/-workspace" / f"{NAME}.jsonl").write_text(SECRET + "\n")
    (tmp_path / "others/-workspace" / NAME / "sub.jsonl").write_text(SECRET + "\n")
    (tmp_path / "precious").write_text("precious")
    return tmp_path / "home"


def transcripts(home):
    return Transcripts(home, "/workspace", None)


def projects(home):
    return home / ".claude/projects"


def test_what_was_written_is_found(home):
    ours = transcripts(home)
    assert not ours.exists(NAME)
    ours.write(NAME, "", [LINE], first=True)
    ours.write(NAME, "", [LINE], first=False)
    ours.write(NAME, "subagents/agent-a", [LINE], first=True)
    assert ours.exists(NAME)
    assert ours.holds(NAME, "u-1")
    assert dict(ours.found(NAME)) == {"": [LINE, LINE], "subagents/agent-a": [LINE]}
    ours.write(NAME, "", [LINE], first=True)
    assert dict(ours.found(NAME))[""] == [LINE]


@pytest.mark.parametrize("linked", ["home", "projects", "folder", "file", "beside", "within"])
def test_no_link_leads_to_what_others_wrote(home, linked):
    others = home.parent / "others"
    folder = projects(home) / "-workspace"
    match linked:
        case "home":
            (home / ".claude").rename(home / "away")
            (home / ".claude").mkdir()
            (home / ".claude/projects").symlink_to(others)
        case "projects":
            folder.rmdir()
            projects(home).rmdir()
            projects(home).symlink_to(others)
        case "folder":
            folder.rmdir()
            folder.symlink_to(others / "-workspace")
        case "file":
            (folder / f"{NAME}.jsonl").symlink_to(others / f"-workspace/{NAME}.jsonl")
        case "beside":
            (folder / NAME).symlink_to(others / "-workspace")
        case "within":
            (folder / NAME).mkdir()
            (folder / NAME / "deep").symlink_to(others / "-workspace")
            (folder / NAME / "sub.jsonl").symlink_to(others / f"-workspace/{NAME}.jsonl")
    ours = transcripts(home)
    assert not ours.exists(NAME)
    assert not ours.holds(NAME, "u-2")
    assert dict(ours.found(NAME)) == {}


@pytest.mark.parametrize("linked", ["file", "dangling", "folder", "projects", "fifo"])
def test_nothing_is_written_through_a_link(home, linked):
    folder, precious = projects(home) / "-workspace", home.parent / "precious"
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    match linked:
        case "file":
            (folder / f"{NAME}.jsonl").symlink_to(precious)
        case "dangling":
            (folder / f"{NAME}.jsonl").symlink_to(elsewhere / "made")
        case "folder":
            folder.rmdir()
            folder.symlink_to(elsewhere)
        case "projects":
            folder.rmdir()
            projects(home).rmdir()
            projects(home).symlink_to(elsewhere)
        case "fifo":
            os.mkfifo(folder / f"{NAME}.jsonl")
    ours = transcripts(home)
    ours.write(NAME, "", [LINE], first=True)
    assert precious.read_text() == "precious"
    assert list(elsewhere.iterdir()) == []
    assert dict(ours.found(NAME)) == {"": [LINE]}


def test_a_link_put_in_place_between_two_batches_is_not_followed(home):
    precious = home.parent / "precious"
    ours = transcripts(home)
    ours.write(NAME, "", [LINE], first=True)
    (projects(home) / f"-workspace/{NAME}.jsonl").unlink()
    (projects(home) / f"-workspace/{NAME}.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        ours.write(NAME, "", [LINE], first=False)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("subpath", ["../x", "a/../x", "/etc/x", "a//b", "a/./b", ".", "a\0b", "a b"])
def test_subpaths_stay_beneath(home, subpath):
    with pytest.raises(ValueError, match="subpath"):
        transcripts(home).write(NAME, subpath, [LINE], first=True)


@pytest.mark.requires("root")
def test_files_belong_to_the_agent(home):
    ours = Transcripts(home, "/elsewhere", (700_123, 700_123))
    ours.write(NAME, "subagents/agent-a", [LINE], first=True)
    made = projects(home) / "-elsewhere"
    for path in (made, made / NAME, made / NAME / "subagents", made / NAME / "subagents/agent-a.jsonl"):
        assert (path.stat().st_uid, path.stat().st_gid) == (700_123, 700_123)
    assert (made / NAME / "subagents/agent-a.jsonl").stat().st_mode & 0o777 == 0o600
