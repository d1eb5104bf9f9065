"""Users' own directories with the real agent: shared files, skills, CLAUDE.md, and no way from one user to another."""

import asyncio
import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

SKILL = """---
name: greet
description: Greets whoever is named.
---
Say the word PERIWINKLE to them.
"""


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


async def initialised(api, session) -> dict:
    return [event["data"] for event in await api.events(session) if event["type"] == "agent.initialised"][-1]


async def test_two_sessions_share_a_directory_that_outlives_them(api, tmp_path):
    workspace = {"type": "user", "subdir": "app"}
    first = await api.session(workspace=workspace)
    await api.run(first, "[[bash: echo from the first > note; id -u > uid]]")
    second = await api.session(workspace=workspace)
    result = await api.run(second, "[[bash: cat note; id -u | cmp - uid && echo again >> note]]")
    assert result["tool_calls"][0]["result"] == "from the first"
    for session in (first, second):
        await api.ask("DELETE", f"/sessions/{session}")
    third = await api.session(workspace=workspace)
    assert (await api.http.get(f"/sessions/{third}/files/note")).text == "from the first\nagain\n"
    apart = await api.session(workspace={"type": "user", "subdir": "other"})
    assert (await api.run(apart, "[[bash: ls; ls ..]]"))["tool_calls"][0]["result"].count("note") == 0
    assert (tmp_path / "data/users/admin/app/note").is_file()


async def test_a_link_that_an_agent_makes_leads_no_later_session_out(api, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    whole = await api.session(workspace={"type": "user"})
    await api.run(whole, f"[[bash: mkdir good; ln -s {outside} bad]]")
    refused = await api.ask("POST", "/sessions", 409, json={"workspace": {"type": "user", "subdir": "bad"}})
    assert refused["code"] == "path_conflict"
    assert str(tmp_path) not in str(refused)
    # One that is put there after its session was made.
    session = await api.session(workspace={"type": "user", "subdir": "good"})
    await api.run(whole, f"[[bash: rmdir good && ln -s {outside} good]]")
    result = await api.run(session, "[[bash: cat secret]]")
    assert result["status"] == "failed"
    assert "secret" not in str(result.get("tool_calls"))
    assert (await api.http.get(f"/sessions/{session}/files/secret")).status_code in (404, 409)


async def test_a_skill_of_the_user_and_one_of_the_project_are_loaded_and_run(api, tmp_path):
    users = tmp_path / "data/users/admin"
    put(users, ".claude/skills/greet/SKILL.md", SKILL)
    put(users, ".claude/CLAUDE.md", "Speak softly.")
    put(users, "app/.claude/skills/part/SKILL.md", SKILL.replace("greet", "part").replace("PERIWINKLE", "MARIGOLD"))
    put(users, "app/.claude/commands/tidy.md", "Tidy up.")
    for path in [users, *users.rglob("*")]:
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    session = await api.session(
        workspace={"type": "user", "subdir": "app"}, setting_sources=["user", "project"], skills="all"
    )
    result = await api.run(session, '[[tool: Skill | {"skill": "greet"}]] [[tool: Skill | {"skill": "part"}]]')
    known = await initialised(api, session)
    assert {"greet", "part"} <= set(known["skills"])
    assert [call["is_error"] for call in result["tool_calls"]] == [False, False], result
    export = (await api.http.get(f"/sessions/{session}/export")).text
    assert "PERIWINKLE" in export
    assert "MARIGOLD" in export
    apart = await api.session(setting_sources=["user"], skills="all")
    await api.run(apart, "hello")
    known = await initialised(api, apart)
    assert "greet" in known["skills"]
    assert "part" not in known["skills"]


async def test_a_fork_shares_the_directory(api):
    session = await api.session(workspace={"type": "user", "subdir": "shared"})
    await api.run(session, "[[write: a | b]]")
    fork = (await api.ask("POST", f"/sessions/{session}/fork", json={}))["id"]
    assert (await api.run(fork, "[[bash: cat a; echo c > d]]"))["tool_calls"][0]["result"] == "b"
    assert (await api.http.get(f"/sessions/{session}/files/d")).text == "c\n"


@pytest.mark.requires("root")
async def test_the_directory_stays_its_users_whatever_its_session(api, tmp_path):
    session = await api.session(workspace={"type": "user"})
    await api.run(session, "[[write: a | b]]")
    own = await api.session()
    await api.run(own, "[[write: a | b]]")
    shared, apart = [
        await asyncio.to_thread(lambda p=path: p.stat().st_uid)
        for path in (tmp_path / "data/users/admin/a", tmp_path / f"data/sessions/{own}/workspace/a")
    ]
    assert shared != apart
    assert 0 not in (shared, apart)
