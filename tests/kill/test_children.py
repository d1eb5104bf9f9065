"""A tree of sessions that computes something through children and files, while the gateway is killed again and again."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

Json = dict[str, Any]

_ADD_UP = (
    "python3 -c \"import os, time; names = ['{name}0', '{name}1']; "
    "exec('while not all(map(os.path.exists, names)): time.sleep(0.1)'); "
    "total = 1 + sum(int(open(n).read()) for n in names); open('{name}.part', 'w').write(str(total)); "
    "os.rename('{name}.part', '{name}')\""
)


def prompt(name: str, depth: int) -> str:
    """What a node is told: begin two below it, and add up what they have written; each notes that it was told."""
    noted = f"[[bash: echo told >> told.{name}]]"
    if depth == 0:
        return f"{noted} [[bash: echo 1 > {name}.part; mv {name}.part {name}]]"
    begun = [
        f"[[tool: mcp__carrel__spawn_child | {json.dumps({'prompt': prompt(name + digit, depth - 1)})}]]"
        for digit in "01"
    ]
    return " ".join([noted, *begun, f"[[bash: {_ADD_UP.format(name=name)}]]"])


async def ask(victim: Any, method: str, path: str, **options: Any) -> Any:
    """Ask the present life, or the next one."""
    while True:
        with contextlib.suppress(httpx.HTTPError, ConnectionError):
            async with await victim.client() as http:
                answer = await http.request(method, path, **options)
                if answer.status_code < 500:
                    assert answer.is_success, answer.text
                    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
        await asyncio.sleep(0.05)


def nodes(branch: Json) -> list[Json]:
    return [branch, *(node for child in branch["children"] for node in nodes(child))]


@pytest.mark.parametrize(
    ("depth", "deaths"), [(2, 2), pytest.param(4, 5, marks=pytest.mark.soak)], ids=["seven", "thirty-one"]
)
@pytest.mark.timeout(900)
async def test_a_tree_computes_through_the_death_of_its_gateway(victim: Any, depth: int, deaths: int) -> None:
    size = 2 ** (depth + 1) - 1
    victim.start()

    async def keep_alive() -> None:
        while True:
            if victim.dead:
                victim.start()
            await asyncio.sleep(0.02)

    async def kill() -> None:
        """Each time another part of the tree is there."""
        for death in range(1, deaths + 1):
            while len(nodes(await ask(victim, "GET", f"/sessions/{root}/tree"))) < size * death // (deaths + 1):
                await asyncio.sleep(0.02)
            victim.kill()

    root = (await ask(victim, "POST", "/sessions", json={"session_tools": True}))["id"]
    turns = f"/sessions/{root}/turns"
    body = {"prompt": prompt("n", depth)}
    turn = (await ask(victim, "POST", turns, json=body, headers={"Idempotency-Key": "begin"}))["id"]
    alive = asyncio.create_task(keep_alive(), name="keep-alive")
    try:
        await asyncio.wait_for(kill(), 400)
        async with asyncio.timeout(400):
            while (await ask(victim, "GET", f"{turns}/{turn}"))["status"] in ("queued", "running"):
                await asyncio.sleep(0.1)
            tree = await ask(victim, "GET", f"/sessions/{root}/tree")
            while any(node["status"] in ("starting", "running") for node in nodes(tree)):
                await asyncio.sleep(0.1)
                tree = await ask(victim, "GET", f"/sessions/{root}/tree")
    finally:
        alive.cancel()
        await asyncio.gather(alive, return_exceptions=True)
    assert victim.lives == deaths + 1
    assert (await ask(victim, "GET", f"{turns}/{turn}"))["status"] == "succeeded"
    assert await ask(victim, "GET", f"/sessions/{root}/files/n") == str(size), "the right result"
    everyone = nodes(tree)
    assert len(everyone) == size
    for node in everyone:
        told = (await ask(victim, "GET", f"/sessions/{node['session_id']}/turns"))["data"]
        assert [each["status"] for each in told] == ["succeeded"], "each was told once, and has done it"
    files = {entry["path"] for entry in (await ask(victim, "GET", f"/sessions/{root}/files"))["data"]}
    notes = {name for name in files if name.startswith("told.")}
    assert len(notes) == size
    for name in notes:
        assert (await ask(victim, "GET", f"/sessions/{root}/files/{name}")) == "told\n"
    spent = (await ask(victim, "GET", "/usage"))["total"]
    assert tree["total_cost_usd"] == pytest.approx(spent["cost_usd"]), "what it cost is what was metered"
    assert sum(node["cost_usd"] for node in everyone) == pytest.approx(spent["cost_usd"])
    await ask(victim, "DELETE", f"/sessions/{root}")
    assert list((victim.data / "sessions").iterdir()) == []
    assert list((victim.data / "sandboxes").glob("0*")) == []
