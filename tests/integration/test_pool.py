"""Warm pools on the real CLI."""

import asyncio

import pytest

from carrel.cli.server import running
from carrel.settings import load_settings

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


async def warm(api, count):
    async def is_warm():
        return (await api.ask("GET", "/environments/default/status"))["warm"] == count

    await api.until(f"{count} are warm", is_warm)


@pytest.mark.on_both_engines
async def test_new_sessions_find_their_agent_connected(start):
    api = await start(warm_pool=2)
    await warm(api, 2)
    assert (await api.ask("GET", "/sessions"))["data"] == []
    first = await api.ask("POST", "/sessions", json={"title": "mine"})
    assert (first["status"], first["title"]) == ("ready", "mine")
    result = await api.run(first["id"], "[[bash: pwd; id -u]]")
    assert result["status"] == "succeeded"
    place, uid = result["tool_calls"][0]["result"].split()
    second = await api.session()
    other = (await api.run(second, "[[bash: id -u; ls -A]]"))["tool_calls"][0]["result"].split()
    assert place == "/workspace"
    assert other != [uid], "each has a user of its own, and nothing in its workspace"
    types = [event["type"] for event in await api.events(first["id"])]
    assert types[:3] == ["session.created", "session.status_changed", "session.status_changed"]
    await warm(api, 2)
    for session in (first["id"], second):
        await api.ask("DELETE", f"/sessions/{session}")
    assert len(api.server.hub) == 2


async def test_its_log_reads_as_that_of_one_that_started_cold(start):
    api = await start(warm_pool=1)
    await warm(api, 1)
    stories = []
    for options in ({}, {"max_turns": 50}):
        session = await api.session(**options)
        await api.run(session, "[[bash: echo one]]")
        stories.append(sorted(event["type"] for event in await api.events(session)))
    assert stories[0] == stories[1]


async def test_live_options_reach_an_agent_that_was_connected_without_them(start):
    api = await start(warm_pool=1)
    await warm(api, 1)
    created = await api.ask("POST", "/sessions", json={"model": "opus", "permission_mode": "plan"})
    assert created["status"] == "ready"
    await api.run(created["id"], "hello")
    (said,) = [event for event in await api.events(created["id"]) if event["type"] == "agent.initialised"]
    assert "opus" in said["data"]["model"]
    assert said["data"]["permission_mode"] == "plan"


async def test_a_taken_session_sleeps_wakes_and_forks_as_any(start):
    api = await start(warm_pool=1, idle_timeout_seconds=0.5)
    await warm(api, 1)
    created = await api.ask("POST", "/sessions", json={})
    assert created["status"] == "ready"
    await api.run(created["id"], "[[write: kept.txt | still here]]")
    await api.until_status(created["id"], "idle")
    woken = await api.run(created["id"], "[[bash: cat kept.txt]]")
    assert woken["tool_calls"][0]["result"] == "still here"
    fork = (await api.ask("POST", f"/sessions/{created['id']}/fork", json={}))["id"]
    assert (await api.run(fork, "[[bash: cat kept.txt]]"))["tool_calls"][0]["result"] == "still here"


async def test_a_server_that_ends_leaves_nothing_of_its_pool(tmp_path, start):
    settings = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "warm_pool": 2}
    async with running(load_settings(overrides=settings)) as server, asyncio.timeout(60):
        while (await server.pool.state("default")).warm < 2:
            await asyncio.sleep(0.02)
    assert not [path for path in (server.data / "sandboxes").iterdir() if path.is_dir()]
    again = await start()

    async def gone():
        return not [path for path in (server.data / "sessions").iterdir() if path.is_dir()]

    await again.until("the folders of the pool that was are gone", gone)
