"""The engine ends in mid-turn, in an orderly way or by a crash, and comes back: a real engine of the test's own."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from carrel import __version__
from carrel.testing.docker import DockerEngine

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images", "root"), pytest.mark.timeout(180)]

Json = dict[str, Any]
ENDS = [DockerEngine.stop, DockerEngine.kill]


@pytest.fixture
def borrowed(docker_engine: DockerEngine) -> Json:
    """The settings of a server on an engine of its own."""
    return {"runtime": "docker", "docker": docker_engine.borrow(f"carrel-sandbox:{__version__}")}


async def begun(api: Any, session: str) -> None:
    place = api.server.data / "sessions" / session / "workspace" / "begun"

    async def there() -> bool:
        return place.exists()

    await api.until("the tool is at work", there)


async def result(api: Any, session: str, turn: str) -> Json:
    await api.until_event(session, "turn.completed", turn, seconds=60)
    found: Json = await api.ask("GET", f"/sessions/{session}/turns/{turn}")
    return found


@pytest.mark.parametrize("end", ENDS, ids=["stopped", "killed"])
async def test_a_turn_is_lost_with_its_engine_and_the_next_is_had_when_it_is_back(
    docker_engine: DockerEngine, borrowed: Json, start: Any, end: Callable[[DockerEngine], None]
) -> None:
    api = await start(**borrowed)
    session = await api.session()
    turn = await api.send(session, "[[bash: touch begun; sleep 100]]")
    queued = await api.send(session, "[[bash: ls]]")
    await begun(api, session)
    await asyncio.to_thread(end, docker_engine)
    if end is DockerEngine.kill:
        await api.server.guard.look()
        still = await api.ask("GET", f"/sessions/{session}/turns/{turn}")
        assert still["status"] == "running", "its container goes on until the engine is back"
    await asyncio.to_thread(docker_engine.start)
    lost = await result(api, session, turn)
    assert (lost["status"], lost["error"]["code"]) == ("failed", "sandbox_lost"), lost
    found = await result(api, session, queued)
    assert found["status"] == "succeeded", found
    assert found["tool_calls"][0]["result"] == "begun"


async def test_a_turn_that_is_to_go_on_does_so_when_its_engine_is_back(
    docker_engine: DockerEngine, borrowed: Json, start: Any
) -> None:
    api = await start(**borrowed)
    session = await api.session()
    turn = await api.send(
        session, "[[bash: test -e begun || { touch begun; sleep 100; }]] [[say: at last]]", on_sandbox_lost="continue"
    )
    await begun(api, session)
    await asyncio.to_thread(docker_engine.stop)
    await asyncio.to_thread(docker_engine.start)
    found = await result(api, session, turn)
    assert (found["status"], found["text"][:7]) == ("succeeded", "at last"), found
