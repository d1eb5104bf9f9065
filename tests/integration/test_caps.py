"""A session that runs wild is ended alone and told why; its neighbour goes on, and so does it at its next prompt."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.runtimes.local.cgroups import name_of

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap", "root")]

MEANS = [pytest.param("cgroup", marks=pytest.mark.requires("cgroup")), "watchdog"]
CAPS = {"sandbox_memory_mb": 700, "sandbox_processes": 150}
# Bounded too: it takes 1.5 GB, and then keeps 1. What a system call wants (a read, say) is refused and not waited for,
# so it is the shell itself that grows.
EATS_MEMORY = "[[bash: x=0123456789abcdef; for i in $(seq 26); do x=$x$x; done; sleep 60]]"
# Bounded by itself: should every cap fail, it ends at 600 processes and after a minute. Nothing here ends because it
# cannot fork: the shell tries again, and what it started does not want to.
FORKS = "[[bash: for i in $(seq 600); do (exec sleep 60) & done; wait]]"
FORK_BOMB = "[[bash: b() { b | b & b; }; b]]"


@pytest.fixture(autouse=True)
def no_group_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(Path("/sys/fs/cgroup").glob(f"**/{name_of(tmp_path / 'data/sandboxes')}")) == []


async def sandboxes_of(api: Any) -> dict[str, str]:
    """Which sandbox each session has."""
    found = await api.server.services.store.read(lambda tx: list(tx.sandboxes.not_gone()))
    return {sandbox.session_id: sandbox.id for sandbox in found}


async def beside(api: Any, wild: str, code: str) -> None:
    """A session that does something wild, and one that counts meanwhile."""
    wild_one, neighbour = await api.session(), await api.session()
    await api.run(wild_one, "[[bash: echo kept > kept.txt]]")
    await api.run(neighbour, "hello")
    before = await sandboxes_of(api)
    counting = await api.send(neighbour, "[[count: 60 @20]] [[bash: echo unharmed]]")
    turn = await api.run(wild_one, wild)
    assert turn["status"] == "failed", turn["text"]
    assert turn["error"]["code"] == code, turn
    ended = await api.until_event(neighbour, "turn.completed", counting)
    assert ended["data"]["status"] == "succeeded", ended
    again = await api.run(wild_one, "[[bash: cat kept.txt]]")
    assert again["status"] == "succeeded", again
    assert "kept" in again["text"]
    after = await sandboxes_of(api)
    assert after[neighbour] == before[neighbour]
    assert after[wild_one] != before[wild_one]


@pytest.mark.parametrize("means", MEANS)
async def test_a_tool_that_eats_memory(start: Any, means: str) -> None:
    api = await start(limits=CAPS | {"sandbox_caps": means})
    await beside(api, EATS_MEMORY, "sandbox_out_of_memory")


@pytest.mark.parametrize("wild", [FORKS, FORK_BOMB], ids=["many", "bomb"])
@pytest.mark.parametrize("means", MEANS)
async def test_a_fork_bomb(start: Any, means: str, wild: str) -> None:
    api = await start(limits=CAPS | {"sandbox_caps": means})
    await beside(api, wild, "sandbox_out_of_processes")


@pytest.mark.parametrize("means", MEANS)
async def test_files_in_memory_count(start: Any, means: str) -> None:
    """/tmp and /dev/shm are kept in memory: they are bounded, and what is in them is the sandbox's."""
    api = await start(limits=CAPS | {"sandbox_caps": means})
    session = await api.session()
    sizes = "df --output=size,target -BM /tmp /run /dev/shm; touch /dev/x || true"
    seen = (await api.run(session, f"[[bash: {sizes}; head -c 200000000 /dev/zero | tee /tmp/a >/dev/shm/b]]"))["text"]
    assert all(f"700M {place}" in seen for place in ("/tmp", "/run", "/dev/shm")), seen
    assert "Read-only file system" in seen
    (sandbox,) = (await sandboxes_of(api)).values()

    async def counted() -> bool:
        usage = api.server.guard.latest().sandboxes.get(sandbox)
        return usage is not None and usage.memory_bytes > 400_000_000

    await api.until("counted", counted)
    full = await api.run(session, "[[bash: head -c 400000000 /dev/zero >/dev/shm/c]] [[wait: 30]]")
    assert full["error"] is not None, (full["text"], api.server.guard.latest())
    assert full["error"]["code"] == "sandbox_out_of_memory"


@pytest.mark.requires("cgroup")
async def test_cpus_are_capped(start: Any) -> None:
    api = await start(limits=CAPS | {"sandbox_cpus": 0.3})
    session = await api.session()
    await api.run(session, "hello")
    (sandbox,) = (await sandboxes_of(api)).values()
    await api.server.guard.look()
    before, begun = api.server.guard.latest().sandboxes[sandbox].cpu_seconds, time.monotonic()
    spinning = await api.run(session, "[[bash: timeout 3 sh -c 'while :; do :; done']]")
    await api.server.guard.look()
    share = (api.server.guard.latest().sandboxes[sandbox].cpu_seconds - before) / (time.monotonic() - begun)
    assert spinning["status"] == "succeeded"
    assert share < 0.45


async def test_idle_sandboxes_make_room_and_the_rest_waits(start: Any) -> None:
    api = await start(limits={"memory_mb": 400, "memory_wait_seconds": 2.5})
    sessions = [await api.session() for _ in range(4)]
    busy = await api.send(sessions[0], "[[bash: head -c 450000000 /dev/zero >/tmp/a]] [[count: 220 @20]]")
    await api.until_event(sessions[0], "tool.finished")

    async def counted() -> bool:
        return api.server.guard.latest().memory_bytes > 400 * 2**20

    await api.until("counted", counted)
    refused = await api.http.post(f"/sessions/{sessions[1]}/turns", json={"prompt": "hello"})
    assert (refused.status_code, refused.json()["code"]) == (503, "out_of_memory")
    assert int(refused.headers["retry-after"]) > 0
    one_off = await api.http.post("/query", json={"prompt": "hello"})
    assert (one_off.status_code, one_off.json()["code"]) == (503, "out_of_memory")
    assert {each["id"] for each in (await api.ask("GET", "/sessions"))["data"]} == set(sessions)
    ended = await api.until_event(sessions[0], "turn.completed", busy)
    assert ended["data"]["status"] == "succeeded"
    await api.until_status(sessions[0], "idle")
    assert (await api.run(sessions[1], "hello"))["status"] == "succeeded"
