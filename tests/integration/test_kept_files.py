"""Files that outlive sandboxes, turns and hosts: with the real agent, on the disk's object store."""

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

SHOP = {"type": "persistent", "name": "shop"}


async def snapshots(api, session, count):
    async def check():
        found = (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]
        return found if len(found) >= count else None

    return await api.until(f"{count} snapshots", check)


def objects(tmp_path):
    return [path for path in (tmp_path / "data/objects").rglob("*") if path.is_file()]


async def test_a_turn_survives_the_loss_of_its_sandbox_and_its_files(api, tmp_path):
    session = await api.session()
    await api.run(session, "[[bash: mkdir -p src && echo one > src/a && ln -s a src/l && chmod 700 src/a]]")
    kept = (await snapshots(api, session, 1))[0]
    pid = tmp_path / "data" / "sessions" / session / "workspace" / "ready"
    turn = await api.send(
        session, "[[bash: echo half > b; touch ready; sleep 6]] [[bash: cat src/a]]", on_sandbox_lost="continue"
    )

    async def begun():
        return pid.exists()

    await api.until("the tool is at work", begun)
    sandboxes = await api.server.services.store.read(lambda tx: list(tx.sandboxes.not_gone()))
    shutil.rmtree(tmp_path / "data" / "sessions" / session)
    os.kill(int(sandboxes[0].state["pid"]), signal.SIGKILL)
    ended = await api.until_event(session, "turn.completed", turn, 60)
    assert ended["data"]["status"] == "succeeded", ended
    restored = [event for event in await api.events(session) if event["type"] == "workspace.restored"]
    assert [(event["turn_id"], event["data"]["snapshot_id"], event["data"]["seq"]) for event in restored] == [
        (turn, kept["id"], kept["seq"])
    ]
    listed = (await api.ask("GET", f"/sessions/{session}/files"))["data"]
    modes = {entry["path"]: (entry["type"], entry["mode"] & 0o777) for entry in listed}
    assert modes["src/a"] == ("file", 0o700)
    assert modes["src/l"][0] == "symlink"


async def test_conversation_and_files_go_back_together(api):
    session = await api.session()
    first = (await api.run(session, "[[bash: echo one > a]] remember ONE"))["id"]
    await api.run(session, "[[bash: rm a; echo two > b; mkdir c]] remember TWO")
    await snapshots(api, session, 2)
    await api.ask("POST", f"/sessions/{session}/rewind", 200, json={"turn_id": first})
    listed = (await api.ask("GET", f"/sessions/{session}/files"))["data"]
    assert [entry["path"] for entry in listed] == ["a"]
    result = await api.run(session, "[[bash: ls]]")
    assert result["tool_calls"][0]["result"] == "a"
    messages = (await api.ask("GET", f"/sessions/{session}/messages"))["data"]
    prompts = [m["content"][0]["text"] for m in messages if m["role"] == "user" and m["content"][0]["type"] == "text"]
    assert [text.partition("]] ")[2] for text in prompts] == ["remember ONE", ""]
    export = (await api.http.get(f"/sessions/{session}/export")).text
    transcript = [line for line in export.splitlines() if line.startswith('{"kind":"transcript"')]
    assert any("remember ONE" in line for line in transcript)
    assert not any("remember TWO" in line for line in transcript)
    assert any("remember TWO" in line for line in export.splitlines()), "no event is deleted"
    turns = (await api.ask("GET", f"/sessions/{session}/turns"))["data"]
    refused = await api.ask("POST", f"/sessions/{session}/fork", 409, json={"turn_id": turns[1]["id"]})
    assert refused["code"] == "turn_rewound"
    fork = (await api.ask("POST", f"/sessions/{session}/fork", json={"turn_id": first}))["id"]
    assert (await api.run(fork, "[[bash: cat a]]"))["tool_calls"][0]["result"] == "one"


async def test_a_persistent_workspace_is_had_by_one_session_after_the_other(api, tmp_path):
    first, second = [await api.session(workspace=SHOP) for _ in range(2)]
    held = await api.send(first, "[[bash: echo from the first > note; id -u > uid; sleep 3]]")
    await api.until_status(first, "running")
    result = await api.run(second, "[[bash: cat note; id -u | cmp - uid && echo more >> note]]")
    assert result["tool_calls"][0]["result"] == "from the first"
    assert (await api.ask("GET", f"/sessions/{first}/turns/{held}"))["status"] == "succeeded"
    workspace = (await api.ask("GET", "/workspaces"))["data"][0]
    refused = await api.ask("DELETE", f"/workspaces/{workspace['id']}", 409)
    assert set(refused["sessions"]) == {first, second}
    for session in (first, second):
        await api.ask("DELETE", f"/sessions/{session}")
    third = await api.session(workspace=SHOP)
    shutil.rmtree(tmp_path / "data" / "workspaces" / workspace["id"])
    assert (await api.http.get(f"/sessions/{third}/files/note")).text == "from the first\nmore\n"
    await api.ask("PATCH", f"/workspaces/{workspace['id']}", json={"quota_mb": 1})
    full = await api.http.put(f"/sessions/{third}/files/big", content=b"x" * (2**20 + 1))
    assert (full.status_code, full.json()["code"]) == (409, "workspace_over_quota")
    turn = (await api.run(third, "[[bash: head -c 2000000 /dev/urandom > big]]"))["id"]
    await api.until_event(third, "workspace.quota_exceeded", turn)
    refused = await api.ask("POST", f"/sessions/{third}/turns", 409, json={"prompt": "Hello"})
    assert refused["code"] == "workspace_over_quota"
    await api.ask("DELETE", f"/sessions/{third}/files/big")
    assert (await api.run(third, "Hello"))["status"] == "succeeded"
    await api.ask("DELETE", f"/sessions/{third}")
    await api.ask("DELETE", f"/workspaces/{workspace['id']}", 204)

    async def gone():
        return not objects(tmp_path)

    await api.until("no object is left", gone)


async def test_what_is_published_is_kept_and_goes_with_its_session(api, tmp_path):
    session = await api.session()
    await api.run(session, "[[bash: echo one > report; ln -s /etc/passwd link]]")
    made = await api.ask("POST", f"/sessions/{session}/artifacts", 201, json={"path": "report"})
    assert (made["size"], made["sha256"]) == (4, hashlib.sha256(b"one\n").hexdigest())
    await api.run(session, "[[bash: echo two > report]]")
    for path, status in (("link", 409), ("../x", 400), ("none", 404)):
        await api.ask("POST", f"/sessions/{session}/artifacts", status, json={"path": path})
    got = await api.http.get(f"/sessions/{session}/artifacts/{made['id']}")
    assert (got.content, got.headers["etag"]) == (b"one\n", f'"{made["sha256"]}"')
    assert [each["id"] for each in (await api.ask("GET", f"/sessions/{session}/artifacts"))["data"]] == [made["id"]]
    other = await api.ask("POST", f"/sessions/{session}/artifacts", 201, json={"path": "report"})
    await api.ask("DELETE", f"/sessions/{session}/artifacts/{made['id']}", 204)
    await api.ask("GET", f"/sessions/{session}/artifacts/{made['id']}", 404)
    await snapshots(api, session, 2)
    assert any(other["id"] in str(path) for path in objects(tmp_path))
    await api.ask("DELETE", f"/sessions/{session}")

    async def gone():
        return not objects(tmp_path)

    await api.until("no object is left", gone)


async def test_what_has_changed_since_the_last_snapshot_and_since_the_last_commit(api, tmp_path):
    session = await api.session()
    await api.ask("GET", f"/sessions/{session}/diff", 409)
    await api.run(
        session,
        "[[bash: printf 'one\\n' > a; echo x > gone; git init -q . && git add a gone && git -c user.name=n -c user.email=e commit -qm m]]",
    )
    await snapshots(api, session, 1)
    await api.http.put(f"/sessions/{session}/files/a", content=b"two\n")
    await api.http.put(f"/sessions/{session}/files/new", content=b"fresh\n")
    await api.ask("DELETE", f"/sessions/{session}/files/gone")
    found = await api.ask("GET", f"/sessions/{session}/diff")
    kinds = {change["path"]: change["kind"] for change in found["changes"] if change["type"] == "file"}
    assert {path: kinds.get(path) for path in ("a", "new", "gone")} == {
        "a": "changed",
        "new": "added",
        "gone": "removed",
    }
    patch = (await api.http.get(f"/sessions/{session}/diff", params={"kind": "git"})).text
    assert "-one\n+two\n" in patch
    assert "new file mode 100644" in patch
    assert "+fresh" in patch
    assert "deleted file mode 100644" in patch


async def test_git_runs_nothing_that_a_repository_names(api, tmp_path):
    session = await api.session()
    marker = tmp_path / "ran"
    os.chmod(tmp_path, 0o777)
    made = await api.run(
        session,
        "[[bash: git init -q . && echo one > a && git add a && git -c user.name=n -c user.email=e commit -qm m]]",
    )
    assert not made["tool_calls"][0]["is_error"], made
    workspace = tmp_path / "data" / "sessions" / session / "workspace"
    command = f"touch {marker}; cat"
    for name, value in (
        ("core.fsmonitor", command),
        ("diff.external", command),
        ("filter.evil.clean", command),
        ("filter.evil.smudge", command),
        ("diff.evil.textconv", command),
        ("diff.evil.command", command),
        ("core.pager", command),
        ("core.hooksPath", str(tmp_path)),
        ("core.worktree", "/etc"),
    ):
        setting = ["git", "config", "-f", workspace / ".git/config", name, value]
        await asyncio.to_thread(subprocess.run, setting, check=True)
    (workspace / ".gitattributes").write_text("* filter=evil diff=evil\n")
    (workspace / "a").write_text("two\n")
    patch = (await api.http.get(f"/sessions/{session}/diff", params={"kind": "git"})).text
    assert "-one\n+two\n" in patch
    assert not marker.exists()
    (workspace / ".git/objects/info").mkdir(exist_ok=True)
    (workspace / ".git/objects/info/alternates").write_text("/etc\n")
    refused = await api.ask("GET", f"/sessions/{session}/diff?kind=git", 409)
    assert refused["code"] == "not_a_repository"


async def test_what_is_kept_is_for_the_operator_to_say(start, tmp_path):
    api = await start(snapshots={"keep": 2, "ignored": ["node_modules"], "max_mb": 1}, data=tmp_path / "one")
    session = await api.session()
    for number in range(3):
        await api.run(session, f"[[bash: mkdir -p node_modules; echo {number} > a; echo x > node_modules/m]]")
        await snapshots(api, session, min(number + 1, 2))
    turns = [turn["id"] for turn in (await api.ask("GET", f"/sessions/{session}/turns"))["data"]]

    async def newest():
        found = (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]
        return [each["turn_id"] for each in found] == turns[:2]

    await api.until("the two newest", newest)
    await api.ask("POST", f"/sessions/{session}/rewind", 200, json={"turn_id": turns[1]})
    assert (await api.http.get(f"/sessions/{session}/files/a")).text == "1\n"
    await api.ask("GET", f"/sessions/{session}/files/node_modules/m", 404)
    await api.run(session, "[[bash: head -c 2000000 /dev/urandom > big]]")
    failed = await api.until_event(session, "workspace.snapshot_failed")
    assert failed["data"]["code"] == "snapshot_too_large"
    without = await start(snapshots={"enabled": False}, data=tmp_path / "two")
    session = await without.session()
    await without.run(session, "[[bash: echo one > a]]")
    await without.ask("POST", f"/sessions/{session}/snapshots", 503)
    await asyncio.sleep(0)
    assert (await without.ask("GET", f"/sessions/{session}/snapshots"))["data"] == []


async def test_old_and_many_snapshots_go_as_the_settings_say(start, tmp_path):
    async def left(api, session, count):
        async def check():
            found = (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]
            return found if len(found) == count else None

        return await api.until(f"{count} snapshots are left", check)

    large = "[[bash: head -c 700000 /dev/urandom > big]]"
    old = await start(snapshots={"keep_days": 1e-9}, data=tmp_path / "old")
    session = await old.session()
    for _ in range(2):
        turn = (await old.run(session, large))["id"]
        assert await old.until("it is kept", lambda: snapshot_of(old, session, turn))  # noqa: B023
    assert [each["turn_id"] for each in await left(old, session, 1)] == [turn]
    many = await start(snapshots={"keep_mb": 2, "keep_mb_per_user": 3}, data=tmp_path / "many")
    first, second = await many.session(), await many.session()
    for session, counts in ((first, (1, 2, 2)), (second, (1, 2))):
        for count in counts:
            turn = (await many.run(session, large))["id"]
            assert await many.until("it is kept", lambda: snapshot_of(many, session, turn))  # noqa: B023
            await left(many, session, count)
    # 2.1 MB are over what one workspace may have, 2.8 MB are within what a user may.
    await left(many, first, 2)
    third = await many.session()
    turn = (await many.run(third, large))["id"]
    await left(many, third, 1)
    await left(many, first, 1)
    await left(many, second, 2)


async def snapshot_of(api, session, turn):
    found = (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]
    return [each for each in found if each["turn_id"] == turn]


@pytest.mark.parametrize("how", ["stop", "idle", "delete"])
async def test_what_was_written_after_the_last_turn_is_kept_when_the_sandbox_goes(start, tmp_path, how):
    api = await start(idle_timeout_seconds=3.0 if how == "idle" else 600)
    session = await api.session(workspace=SHOP)
    turn = (await api.run(session, "[[bash: echo one > a; (sleep 1; echo late > b) > /dev/null 2>&1 &]]"))["id"]
    assert await api.until("the turn is kept", lambda: snapshot_of(api, session, turn))
    workspace = (await api.ask("GET", "/workspaces"))["data"][0]["id"]
    files = tmp_path / "data/workspaces" / workspace / "files"

    async def written():
        return (files / "b").exists()

    await api.until("it is written", written)
    if how == "delete":
        await api.ask("DELETE", f"/sessions/{session}")
    elif how == "stop":
        await api.ask("POST", f"/sessions/{session}/stop")
    else:
        await api.until_status(session, "idle")
    if how != "delete":
        await api.until("it is kept", lambda: released(api, session))
    shutil.rmtree(files)
    other = await api.session(workspace=SHOP)
    assert (await api.http.get(f"/sessions/{other}/files/b")).text == "late\n"


async def released(api, session):
    found = (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]
    return [each for each in found if each["reason"] == "release"]


async def test_an_object_store_that_is_away_holds_no_turn_up_and_is_told_once(start, tmp_path, s3_server):
    keys = {"access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    place = {"kind": "s3", "endpoint": s3_server.endpoint, "bucket": s3_server.bucket, "timeout_seconds": 1.0}
    api = await start(objects=place | keys)
    session = await api.session()
    first = (await api.run(session, "[[bash: echo one > a]]"))["id"]
    assert await api.until("it is kept", lambda: snapshot_of(api, session, first))
    for outage in (1, 2):
        await asyncio.to_thread(s3_server.stop)
        for number in range(3):
            result = await api.run(session, f"[[bash: echo {outage}-{number} > a]]")
            assert result["status"] == "succeeded"
        await api.until("it is told", lambda: told(api, session, outage))  # noqa: B023
        refused = await api.ask("POST", f"/sessions/{session}/snapshots", 503)
        assert refused["code"] == "object_store_unavailable"
        last = (await api.run(session, "[[bash: echo last >> a]]"))["id"]
        await asyncio.to_thread(s3_server.start)
        assert await api.until("it catches up", lambda: snapshot_of(api, session, last), 60)  # noqa: B023
        assert len(await told(api, session, outage)) == outage, "once for each time"
    await api.ask("POST", f"/sessions/{session}/stop")
    shutil.rmtree(tmp_path / "data" / "sessions" / session)
    assert (await api.http.get(f"/sessions/{session}/files/a")).text == "2-2\nlast\n"


async def told(api, session, count):
    found = [event for event in await api.events(session) if event["type"] == "workspace.snapshot_failed"]
    assert all(event["data"]["code"] == "object_store_unavailable" for event in found)
    return found if len(found) >= count else None
