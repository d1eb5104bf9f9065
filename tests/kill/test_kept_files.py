"""The gateway dies while a session's files are put back, or brought in, and both are whole afterwards or as they were."""

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

import httpx
import pytest

from carrel.testing.git import GitHost, make_repository

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.timeout(180)]


async def until(what, check):
    async with asyncio.timeout(40):
        while not (found := await check()):
            await asyncio.sleep(0.05)
    return found


@pytest.mark.on_both_engines
@pytest.mark.parametrize("point", ["restore.marked", "restore.adopted"])
async def test_killed_in_the_middle_of_a_rewind(victim, point):
    victim.start(kill_at=point)
    async with await victim.client() as http:
        session = (await http.post("/sessions", json={})).json()["id"]
        turns = []
        for prompt in ("[[bash: echo one > a]] remember ONE", "[[bash: echo two > a; echo new > b]] remember TWO"):
            answer = await http.post(f"/sessions/{session}/turns", json={"prompt": prompt, "wait": True})
            turns.append(answer.json()["id"])

        async def kept():
            found = (await http.get(f"/sessions/{session}/snapshots")).json()["data"]
            return {each["turn_id"] for each in found} >= set(turns)

        await until("both are kept", kept)
        with contextlib.suppress(httpx.HTTPError):
            await http.post(f"/sessions/{session}/rewind", json={"turn_id": turns[0]})
    assert victim.process.wait(20) != 0
    victim.start()
    async with await victim.client() as http:

        async def rewound():
            events = (await http.get(f"/sessions/{session}/events", params={"limit": 1000})).json()["data"]
            return [event for event in events if event["type"] == "session.rewound"]

        told = await until("it is finished", rewound)
        assert [event["data"]["to_turn_id"] for event in told] == [turns[0]]
        files = (await http.get(f"/sessions/{session}/files")).json()["data"]
        assert [entry["path"] for entry in files] == ["a"]
        result = await http.post(f"/sessions/{session}/turns", json={"prompt": "[[bash: cat a]]", "wait": True})
        assert result.json()["tool_calls"][0]["result"] == "one"
        export = (await http.get(f"/sessions/{session}/export")).text
        transcript = [line for line in export.splitlines() if line.startswith('{"kind":"transcript"')]
        assert not any("remember TWO" in line for line in transcript)
        assert len(await rewound()) == 1
    assert not [path for path in (victim.data / "sessions").rglob("*") if path.name in ("staged", "replaced")]


async def test_killed_before_a_clone_is_in_its_place(victim):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        make_repository(Path(place) / "open.git", [{"a": "one\n"}])
        with GitHost(Path(place)).up() as host:
            git = {"protocols": ["http"], "private_networks": ["127.0.0.0/8"]}
            victim.start(kill_at="clone.staged", git=git)
            async with await victim.client() as http:
                workspace = {"type": "git", "repo": f"{host.url}/open.git"}
                session = (await http.post("/sessions", json={"workspace": workspace})).json()["id"]
                sent = {"prompt": "[[bash: cat a]]"}
                turn = (await http.post(f"/sessions/{session}/turns", json=sent)).json()["id"]
            assert victim.process.wait(30) != 0
            victim.start(git=git)
            async with await victim.client() as http:

                async def ended():
                    found = (await http.get(f"/sessions/{session}/turns/{turn}")).json()
                    return found if found["status"] in ("succeeded", "failed") else None

                found = await until("the turn ends", ended)
                assert (found["status"], found["tool_calls"][0]["result"]) == ("succeeded", "one")
                events = (await http.get(f"/sessions/{session}/events", params={"limit": 1000})).json()["data"]
                assert [event["type"] for event in events].count("workspace.cloned") == 1
    assert not list((victim.data / "sessions").rglob("staged"))
