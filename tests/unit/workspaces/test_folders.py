"""The folders of sessions and of users: what is made, what is shared, what is shown, and no way out of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from carrel.errors import CarrelError, PathConflict, WorkspaceMissing
from carrel.model import Session, SessionStatus, Workspace, new_id, utc_now
from carrel.workspaces import Folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "sessions", users=tmp_path / "users", workspaces=tmp_path / "workspaces", first_uid=None)


def session(owner: str = "alice", number: int = 1, **workspace: Any) -> Session:
    return Session(
        id=new_id(),
        number=number,
        owner=owner,
        status=SessionStatus.IDLE,
        spec={},
        workspace=Workspace(**workspace),
        created_at=utc_now(),
        last_active_at=utc_now(),
    )


def test_sessions_of_a_user_share_what_they_name_alike(folders: Folders, tmp_path: Path) -> None:
    first, second = session(type="user", subdir="app/web"), session(type="user", subdir="app/web")
    for item in (first, second):
        folders.make(item)
    assert folders.workspace(first) == folders.workspace(second) == tmp_path / "users/alice/app/web"
    assert folders.home(first) != folders.home(second)
    folders.files(first).write("shared.txt", [b"x"])
    folders.remove(first.id)
    with folders.files(second).open_read("shared.txt") as file:
        assert file.read() == b"x"
    others = session("bob", type="user", subdir="app/web")
    assert folders.files(others).tree("", limit=9) == []


@pytest.mark.parametrize("subdir", ["..", "a/../b", "/etc", "a//b", "", ".", "a/.", "a\nb", "a\x00b", "x" * 201])
def test_a_subdir_cannot_lead_out(subdir: str) -> None:
    with pytest.raises(ValidationError):
        Workspace(type="user", subdir=subdir)


def test_a_subdir_belongs_to_a_workspace_of_a_user() -> None:
    with pytest.raises(ValidationError, match="type user"):
        Workspace(subdir="a")


@pytest.mark.parametrize("depth", ["app", "app/web"])
def test_a_link_that_an_agent_has_put_on_the_way_is_not_followed(folders: Folders, tmp_path: Path, depth: str) -> None:
    outside = tmp_path / "outside"
    (outside / "web").mkdir(parents=True)
    folders.make(session(type="user"))
    (tmp_path / "users/alice/app").symlink_to(outside)
    item = session(type="user", subdir=depth)
    with pytest.raises(PathConflict, match="symbolic link"):
        folders.check(item)
    with pytest.raises(CarrelError):
        folders.files(item)
    assert [path.name for path in outside.rglob("*")] == ["web"]


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    folders = Folders(
        tmp_path / "s", users=tmp_path / "u", workspaces=tmp_path / "w", first_uid=None, make_user_directories=False
    )
    with pytest.raises(WorkspaceMissing):
        folders.check(session(type="user"))
    (tmp_path / "u/alice").mkdir()
    folders.check(session(type="user"))
    assert list((tmp_path / "u/alice").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root: only root can give files away")
def test_a_directory_that_was_there_before_is_handed_to_its_user(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "s", users=tmp_path / "u", workspaces=tmp_path / "w", first_uid=700_000)
    (tmp_path / "u/alice/old").mkdir(parents=True)
    (tmp_path / "u/alice/old/file").write_text("x")
    (tmp_path / "kept").write_text("root's")
    (tmp_path / "u/alice/link").symlink_to(tmp_path / "kept")
    item = session(type="user").model_copy(update={"uid_number": 5})
    folders.make(item)
    assert {path.lstat().st_uid for path in (tmp_path / "u/alice").rglob("*")} == {700_005}
    assert (tmp_path / "u/alice").stat().st_uid == 700_005
    assert (tmp_path / "kept").stat().st_uid == 0


def claude(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "users/alice/.claude"
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_md", ".md").replace("_sh", ".sh")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_what_a_user_has_set_up_reaches_the_home_of_every_session(folders: Folders, tmp_path: Path) -> None:
    source = claude(tmp_path, CLAUDE_md="be kind", skills__greet__SKILL_md="say hi", skills__greet__run_sh="#!/bin/sh")
    (source / "skills/greet/run.sh").chmod(0o755)
    (source / "projects").mkdir()
    (source / "projects/private.jsonl").write_text("a transcript")
    (source / ".credentials.json").write_text("secret")
    item = session()
    folders.make(item)
    home = folders.home(item) / ".claude"
    found = {str(path.relative_to(home)): path for path in home.rglob("*") if path.is_file()}
    assert set(found) == {"CLAUDE.md", "skills/greet/SKILL.md", "skills/greet/run.sh"}
    assert found["skills/greet/run.sh"].stat().st_mode & 0o111
    others = session("bob")
    folders.make(others)
    assert not (folders.home(others) / ".claude").exists()


def test_what_has_changed_is_brought_up_to_date_and_the_agents_own_stays(folders: Folders, tmp_path: Path) -> None:
    source = claude(tmp_path, CLAUDE_md="one", skills__a__SKILL_md="a", skills__b__SKILL_md="b")
    item = session()
    folders.make(item)
    home = folders.home(item) / ".claude"
    (home / "skills/own").mkdir()
    (home / "skills/own/SKILL.md").write_text("mine")
    (source / "CLAUDE.md").write_text("another text")
    (source / "skills/b/SKILL.md").unlink()
    folders.make(item)
    assert (home / "CLAUDE.md").read_text() == "another text"
    assert not (home / "skills/b/SKILL.md").exists()
    assert (home / "skills/own/SKILL.md").read_text() == "mine"
    record = json.loads((tmp_path / "sessions" / item.id / "user-config.json").read_text())
    assert set(record) == {".claude/CLAUDE.md", ".claude/skills/a/SKILL.md"}


def test_what_is_set_up_for_an_environment_reaches_its_sessions_and_stands_before_the_users(tmp_path: Path) -> None:
    folders = Folders(
        tmp_path / "sessions",
        users=tmp_path / "users",
        workspaces=tmp_path / "workspaces",
        environments=tmp_path / "environments",
        first_uid=None,
    )
    claude(tmp_path, CLAUDE_md="the user's", rules__a_md="the user's")
    shared = tmp_path / "environments/review/.claude"
    (shared / "skills/greet").mkdir(parents=True)
    (shared / "skills/greet/SKILL.md").write_text("say hi")
    (shared / "CLAUDE.md").write_text("the environment's")
    inside, outside = session().model_copy(update={"environment": "review"}), session()
    nobodys = session().model_copy(update={"environment": "review", "reserved": "review:1"})
    for item in (inside, outside, nobodys):
        folders.make(item)
    shown = {item.id: folders.home(item) / ".claude" for item in (inside, outside, nobodys)}
    texts = {
        id: {str(path.relative_to(home)): path.read_text() for path in home.rglob("*.md")} for id, home in shown.items()
    }
    theirs = {"CLAUDE.md": "the environment's", "skills/greet/SKILL.md": "say hi"}
    assert texts[inside.id] == theirs | {"rules/a.md": "the user's"}
    assert texts[outside.id] == {"CLAUDE.md": "the user's", "rules/a.md": "the user's"}
    assert texts[nobodys.id] == theirs, "a sandbox of a warm pool is of its environment, and of no user"
    folders.make(inside.model_copy(update={"environment": "default"}))
    moved = {str(path.relative_to(shown[inside.id])) for path in shown[inside.id].rglob("*.md")}
    assert moved == {"CLAUDE.md", "rules/a.md"}
    assert (shown[inside.id] / "CLAUDE.md").read_text() == "the user's"


def test_neither_side_of_the_copy_follows_a_link(folders: Folders, tmp_path: Path) -> None:
    source = claude(tmp_path, CLAUDE_md="x", skills__a__SKILL_md="a")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "skills/stolen").symlink_to(tmp_path)
    (source / "settings.json").symlink_to(secret)
    item = session()
    folder = folders.home(item)
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / ".claude").symlink_to(outside)
    folders.make(item)
    assert list(outside.iterdir()) == []
    (folder / ".claude").unlink()
    (tmp_path / "sessions" / item.id / "user-config.json").unlink()
    folders.make(item)
    copied = {path.name for path in (folder / ".claude").rglob("*")}
    assert copied == {"CLAUDE.md", "skills", "a", "SKILL.md"}


def test_looking_at_files_changes_nothing_in_the_home_of_an_agent_at_work(folders: Folders, tmp_path: Path) -> None:
    one = session()
    folders.make(one)
    skills = tmp_path / "users" / one.owner / ".claude" / "skills" / "greet"
    skills.mkdir(parents=True)
    (skills / "SKILL.md").write_text("Say hello.")
    folders.files(one).tree("", limit=10)
    assert not (folders.home(one) / ".claude").exists()
    folders.make(one)
    assert (folders.home(one) / ".claude" / "skills" / "greet" / "SKILL.md").read_text() == "Say hello."
