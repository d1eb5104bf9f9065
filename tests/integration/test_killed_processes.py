"""A runner, an agent or the preloaded parent dies: the turn ends in a true state, and the session goes on."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed

from carrel.protocol.link import Hello

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def sandbox_of(api) -> Path:
    """The one sandbox's folder."""
    (found,) = [path for path in (api.server.data / "sandboxes").iterdir() if path.is_dir()]
    return found


def runner_of(api) -> int:
    return int((sandbox_of(api) / "lock").read_text())


def agent_of(api) -> int:
    """The Claude Code process inside the sandbox."""
    mark = f"CARREL_SANDBOX={sandbox_of(api).name}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and mark in (entry / "environ").read_bytes()
                and (entry / "cmdline").read_bytes().startswith(b"/opt/carrel/claude\0")
            ):
                return int(entry.name)
    raise AssertionError("no agent runs")


def nothing_marked(sandbox: str) -> bool:
    mark = f"CARREL_SANDBOX={sandbox}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                return False
    return True


@pytest.mark.parametrize("victim", ["runner", "agent"])
async def test_a_killed_process_fails_the_turn_and_not_the_session(api, victim):
    session = await api.session()
    await api.run(session, "hello")
    turn = await api.send(session, "[[bash: echo begun >> begun; sleep 100]]")
    await api.until_event(session, "tool.called", turn)
    sandbox = sandbox_of(api).name
    os.kill(runner_of(api) if victim == "runner" else agent_of(api), signal.SIGKILL)
    ended = await api.until_event(session, "turn.completed", turn)
    assert (ended["data"]["status"], ended["data"]["stop_reason"]) == ("failed", "sandbox_lost")
    assert ended["data"]["error"]["code"] == "sandbox_lost"
    assert nothing_marked(sandbox)
    result = await api.run(session, "do you remember?")
    assert result["status"] == "succeeded"
    # The first turn for certain; the failed one if Claude Code had written its prompt down before it was killed.
    assert "turn 2" in result["text"] or "turn 3" in result["text"]


@pytest.mark.on_both_engines
@pytest.mark.parametrize("victim", ["runner", "agent"])
async def test_a_turn_may_be_taken_up_again(api, victim):
    session = await api.session()
    await api.run(session, "hello")
    prompt = "[[bash: echo ran >> ran; test $(wc -l < ran) -gt 1 || sleep 100]] [[say: finished]]"
    turn = await api.send(session, prompt, on_sandbox_lost="continue")
    await api.until_event(session, "tool.called", turn)

    async def ran():
        return (await api.http.get(f"/sessions/{session}/files/ran")).status_code == 200

    await api.until("the tool has begun", ran)
    os.kill(runner_of(api) if victim == "runner" else agent_of(api), signal.SIGKILL)
    ended = await api.until_event(session, "turn.completed", turn)
    assert ended["data"]["status"] == "succeeded", ended
    result = await api.ask("GET", f"/sessions/{session}/turns/{turn}")
    assert "finished" in result["text"]
    starts = [
        e["data"]["attempt"] for e in await api.events(session) if e["type"] == "turn.started" and e["turn_id"] == turn
    ]
    assert starts == [1, 2]
    assert "turn 3" in (await api.run(session, "do you remember?"))["text"]


async def test_a_runner_killed_between_turns_is_not_noticed_by_the_next(api):
    session = await api.session()
    await api.run(session, "hello")
    runner = runner_of(api)
    os.kill(runner, signal.SIGKILL)
    await api.until("the runner is dead", lambda: asyncio.sleep(0, not Path(f"/proc/{runner}").exists()))
    assert "turn 2" in (await api.run(session, "hello"))["text"]


async def test_the_preloaded_parent_may_die_at_any_time(api):
    session, other = await api.session(), await api.session()
    turn = await api.send(session, "[[count: 40 @20]]")
    await api.until_event(session, "turn.started", turn)
    parent = int(Path(f"/proc/{runner_of(api)}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert (await api.run(other, "hello"))["status"] == "succeeded"
    ended = await api.until_event(session, "turn.completed", turn)
    assert ended["data"]["status"] == "succeeded"


@pytest.mark.on_both_engines
async def test_of_two_runners_for_one_session_the_older_one_ends(api):
    session = await api.session()
    await api.run(session, "hello")
    socket = str(api.server.data / "run" / "link.sock")
    if not os.path.exists(socket):
        (socket,) = [str(path) for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("carrel-*/link.sock")]
    store = api.server.services.store
    sandbox = sandbox_of(api).name
    # The session's sandbox is given up for a newer one, as a gateway does that believes it lost.
    await store.write(lambda tx: tx.sessions.update(session, generation=2))
    for generation, token in [(1, "not the token"), (2, "not the token either")]:
        hello = Hello(
            sandbox_id=sandbox, token=token, generation=generation, last_acked=0, bound=True
        ).model_dump_json()
        async with unix_connect(socket, uri="ws://gateway/link") as impostor:
            await impostor.send(hello)
            with contextlib.suppress(ConnectionClosed):
                assert json.loads(await impostor.recv())["kind"] == "refused"
    runner = runner_of(api)
    await api.server.hub.link(sandbox).connection.close()

    async def gone():
        return not Path(f"/proc/{runner}").exists()

    await api.until("the older runner has ended by itself", gone)
    await asyncio.sleep(0)
    assert nothing_marked(sandbox)
