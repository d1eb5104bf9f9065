"""The gateway dies at each checkpoint of a container's launch, and in mid-turn: its next life finds what was begun, and the turn is had."""

import asyncio
import subprocess
from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images"), pytest.mark.timeout(120)]


def containers(data: Any) -> list[str]:
    label = f"label=carrel.installation={(data / 'installation').read_text().strip()}"
    command = ["docker", "ps", "-a", "--filter", label, "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("point", "begun"),
    [
        ("sandbox.stored", 0),  # nothing but its row
        ("sandbox.checkpoint:1", 0),  # its name is stored
        ("sandbox.checkpoint:2", 1),  # the container is made
        ("sandbox.checkpoint:3", 1),  # it runs, and has its bootstrap
        ("bind.sent", 1),  # its agent is being started
        ("tool.called", 1),  # its agent is at work, and goes on
    ],
)
async def test_killed_at_a_checkpoint_of_a_launch(victim: Any, point: str, begun: int) -> None:
    victim.start(runtime="docker", kill_at=point)
    async with await victim.client() as http:
        session = (await http.post("/sessions", json={})).json()["id"]
        turn = (await http.post(f"/sessions/{session}/turns", json={"prompt": "[[bash: echo x >> once]]"})).json()
    assert victim.process is not None
    await asyncio.to_thread(victim.process.wait, 30)
    assert len(await asyncio.to_thread(containers, victim.data)) == begun
    victim.start(runtime="docker")
    async with await victim.client() as http:
        for _ in range(600):
            found = (await http.get(f"/sessions/{session}/turns/{turn['id']}")).json()
            if found["status"] in ("succeeded", "failed"):
                break
            await asyncio.sleep(0.1)
        assert found["status"] == "succeeded", (found, victim.log()[-3000:])
        assert (victim.data / "sessions" / session / "workspace" / "once").read_text() == "x\n", "and it was done once"
        assert len(await asyncio.to_thread(containers, victim.data)) == 1
    assert await asyncio.to_thread(victim.stop) == 0
    assert await asyncio.to_thread(containers, victim.data) == []
