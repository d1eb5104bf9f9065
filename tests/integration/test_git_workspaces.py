"""Workspaces that begin with a clone, over a real server, the real agent, and a host of repositories on loopback."""

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from carrel.testing.git import GitHost, make_repository

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

KEY = base64.b64encode(b"k" * 32).decode()
TOKEN = "token-for-the-shop-alone-0123456789"
LOOPBACK = {"protocols": ["https", "http"], "private_networks": ["127.0.0.0/8"]}


@pytest.fixture
def host():
    # Below a folder that the sessions' users can walk through, as an operator's would be.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        yield from repositories(Path(place) / "repositories")


def repositories(folder):
    commits = make_repository(folder / "open.git", [{"a": "one\n"}, {"a": "two\n", "run.sh": "#!/bin/sh\n"}])
    make_repository(folder / "shop.git", [{"secret": "of the shop\n"}])
    make_repository(folder / "hooked.git", [{".gitattributes": "* filter=evil\n", "a": "x\n"}])
    make_repository(folder / "large.git", [{"large": os.urandom(2**20).hex()}])
    with GitHost(folder, {"shop.git": f"x-access-token:{TOKEN}"}, {"moved.git": "http://127.0.0.1:1"}).up() as up:
        up.commits = commits
        yield up


def git(repo, **more):
    return {"type": "git", "repo": repo, **more}


async def test_a_session_begins_with_a_clone_and_goes_on_as_any_other(start, host, tmp_path):
    api = await start(git=LOOPBACK)
    session = await api.session(workspace=git(f"{host.url}/open.git"))
    result = await api.run(
        session,
        "[[bash: cat a && git log --oneline | wc -l && git status --porcelain && id -u | cmp -s - <(stat -c %u a) && echo mine]]",
    )
    assert result["tool_calls"][0]["result"] == "two\n2\nmine", result
    cloned = await api.until_event(session, "workspace.cloned")
    assert cloned["data"] == {"repo": f"{host.url}/open.git", "ref": None, "commit": host.commits[1]}
    patch = (await api.http.get(f"/sessions/{session}/diff", params={"kind": "git"})).text
    assert patch == ""
    older = await api.session(workspace=git(f"{host.url}/open.git", ref=host.commits[0], depth=1))
    assert (await api.http.get(f"/sessions/{older}/files/a")).text == "one\n", "before any turn too"
    shallow = await api.session(workspace=git(f"{host.url}/open.git", ref="main", depth=1))
    assert (await api.run(shallow, "[[bash: git log --oneline | wc -l]]"))["tool_calls"][0]["result"] == "1"
    await api.run(session, "[[bash: echo three > a]]")
    await api.until_event(session, "turn.completed")
    await api.until("kept", lambda: newest(api, session))
    await api.ask("POST", f"/sessions/{session}/stop")
    await api.ask("POST", f"/sessions/{session}/resume")
    await api.until("kept", lambda: newest(api, session))
    shutil.rmtree(tmp_path / "data/sessions" / session)
    assert (await api.http.get(f"/sessions/{session}/files/a")).text == "three\n", "a snapshot wins over another clone"
    fork = (await api.ask("POST", f"/sessions/{session}/fork", json={}))["id"]
    assert (await api.run(fork, "[[bash: cat a]]"))["tool_calls"][0]["result"] == "three"


async def newest(api, session):
    turns = (await api.ask("GET", f"/sessions/{session}/turns"))["data"]
    return [
        each
        for each in (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]
        if each["turn_id"] == turns[0]["id"]
    ]


async def test_a_credential_goes_to_its_host_alone_and_stands_nowhere(start, host, tmp_path):
    api = await start(git=LOOPBACK, secrets_key=KEY)
    await api.ask("PUT", "/secrets/SHOP", json={"value": TOKEN})
    place = host.url.removeprefix("http://")
    for spec in (
        {"secrets": [{"name": "SHOP", "git_hosts": [place]}]},
        {"secrets": [{"name": "SHOP", "git_hosts": ["git.example.com"]}]},
    ):
        await api.ask("PUT", f"/environments/{'shop' if place in str(spec) else 'other'}", json=spec)
    wanted = git(f"{host.url}/shop.git", credential="SHOP")
    for environment in ("other", "default"):
        body = {"workspace": wanted, "environment": environment}
        assert (await api.ask("POST", "/sessions", 403, json=body))["code"] == "environment_forbids"
    session = await api.session(workspace=wanted, environment="shop")
    result = await api.run(
        session, "[[bash: cat secret; grep -r token .git; env; cat /proc/*/environ | tr '\\0' '\\n']]"
    )
    assert result["tool_calls"][0]["result"].startswith("of the shop\n"), result
    basic = base64.b64encode(f"x-access-token:{TOKEN}".encode()).decode()
    assert {given for path, given in host.asked if "shop" in path} == {f"Basic {basic}"}
    export = (await api.http.get(f"/sessions/{session}/export")).text
    found = await run("grep", "-rlE", f"{TOKEN}|{basic}", str(tmp_path / "data"))
    assert (found, TOKEN in export, basic in export) == ("", False, False)
    without = await api.session(workspace=git(f"{host.url}/shop.git"))
    failed = await api.run(without, "Hello")
    assert (failed["status"], failed["error"]["code"]) == ("failed", "clone_failed")
    assert "credential" in failed["error"]["message"]
    await api.ask("PUT", "/secrets/SHOP", json={"value": "another"})
    late = await api.session(workspace=wanted, environment="shop")
    assert (await api.run(late, "Hello"))["error"]["code"] == "clone_failed"
    await api.ask("PUT", "/secrets/SHOP", json={"value": TOKEN})
    assert (await api.run(late, "[[bash: cat secret]]"))["status"] == "succeeded", "the next prompt tries again"


async def run(*command):
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    return done.stdout


async def test_what_may_not_be_cloned_is_refused_in_plain_words(start, host, tmp_path):
    api = await start(git=LOOPBACK | {"max_mb": 1, "folders": [str(host.folder)]})
    for repo, reason in (
        (f"{host.url}/none.git", "not_found"),
        (f"{host.url}/moved.git", "redirected"),
        (f"{host.url}/large.git", "too_large"),
        ("http://localhost:1/x.git", "unreachable"),
        ("https://nowhere.invalid/x.git", "unresolved"),
    ):
        session = await api.session(workspace=git(repo))
        refused = await api.ask("GET", f"/sessions/{session}/files", 409)
        assert (refused["code"], refused["reason"]) == ("clone_failed", reason), refused
    session = await api.session(workspace=git(f"{host.url}/open.git", ref="nobodys"))
    assert (await api.ask("GET", f"/sessions/{session}/files", 409))["reason"] == "ref_not_found"
    for repo in (
        f"file://{tmp_path}/data",
        f"file://{host.folder}/../x",
        "file:///etc",
        "https://127.0.0.1/x",
        "https://0x7f.1/x",
        "https://1.2.3.4/x",
    ):
        refused = await api.ask("POST", "/sessions", 409, json={"workspace": git(repo)})
        assert refused["reason"] == "forbidden", refused
    for workspace in (
        git("ext::sh -c true"),
        git("ssh://git.example.com/x"),
        git("https://user:password@git.example.com/x"),
        git("https://git.example.com/x", ref="--upload-pack=x"),
        git("https://git.example.com/x", depth=0),
        {"type": "ephemeral", "repo": "https://git.example.com/x"},
        {"type": "git"},
    ):
        await api.ask("POST", "/sessions", 422, json={"workspace": workspace})
    local = await api.session(workspace=git(f"file://{host.folder}/open.git"))
    assert (await api.http.get(f"/sessions/{local}/files/a")).text == "two\n"
    hooked = await api.session(workspace=git(f"{host.url}/hooked.git"))
    assert (await api.http.get(f"/sessions/{hooked}/files/a")).text == "x\n"
    assert not list((tmp_path / "data/sessions").rglob("staged"))


async def test_private_addresses_and_plain_http_are_refused_unless_the_operator_says_so(start, host, tmp_path):
    api = await start()
    refused = await api.ask("POST", "/sessions", 409, json={"workspace": git(f"{host.url}/open.git")})
    assert refused["reason"] == "forbidden"
    session = await api.session(workspace=git(f"https://localhost:{host.url.rpartition(':')[2]}/open.git"))
    failed = await api.run(session, "Hello")
    assert "private address" in failed["error"]["message"]
    assert host.asked == []
    slow = await start(git=LOOPBACK | {"timeout_seconds": 0.001}, data=tmp_path / "two")
    session = await slow.session(workspace=git(f"{host.url}/open.git"))
    assert (await slow.ask("GET", f"/sessions/{session}/files", 409))["reason"] == "timeout"
