"""A session that writes more than it may is ended alone; its files stay, and its next agent may make room."""

from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

RUNTIMES = ["local", pytest.param("docker", marks=pytest.mark.requires("docker", "images"))]
# Ends by itself at 400 MB.
WRITES = "[[bash: for i in $(seq 100); do head -c 4000000 /dev/zero >part.$i; sleep 0.1; done]]"


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_one_that_writes_too_much_is_ended_and_may_make_room(start: Any, runtime: str) -> None:
    api = await start(runtime=runtime, limits={"sandbox_disk_mb": 64})
    wild, neighbour = await api.session(), await api.session()
    counting = await api.send(neighbour, "[[count: 60 @20]] [[bash: head -c 8000000 /dev/zero >some]]")
    turn = await api.run(wild, WRITES)
    assert (turn["status"], turn["error"]["code"]) == ("failed", "sandbox_out_of_disk"), turn
    assert (await api.until_event(neighbour, "turn.completed", counting))["data"]["status"] == "succeeded"
    files = (await api.ask("GET", f"/sessions/{wild}/files"))["data"]
    assert sum(file["size"] for file in files) > 64 * 2**20, "what it has written is still there"
    mended = await api.run(wild, "[[bash: rm part.*; ls | wc -l]]")
    assert (mended["status"], mended["text"]) == ("succeeded", "Result: 0"), mended


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_an_environment_may_say_how_much(start: Any, runtime: str) -> None:
    api = await start(runtime=runtime)
    await api.ask("PUT", "/environments/small", json={"sandbox": {"resources": {"disk_mb": 32}}})
    session = await api.session(environment="small")
    turn = await api.run(session, "[[bash: head -c 60000000 /dev/zero >big; sleep 30]]")
    assert (turn["status"], turn["error"]["code"]) == ("failed", "sandbox_out_of_disk"), turn
