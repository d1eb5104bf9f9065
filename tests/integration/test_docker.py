"""Sandboxes that are containers, on a real engine: whole turns of the real CLI, and what may befall them."""

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images"), pytest.mark.timeout(120)]

Json = dict[str, Any]
SOCKET = "/var/run/docker.sock"


async def docker(*arguments: str) -> str:
    """The engine's own command line."""
    process = await asyncio.create_subprocess_exec(
        "docker", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode().strip()


async def containers(data: Path) -> list[str]:
    """The containers of the server with this data folder, by name."""
    label = f"label=carrel.installation={(data / 'installation').read_text().strip()}"
    return (await docker("ps", "-a", "--filter", label, "--format", "{{.Names}}")).split()


async def the_container(api: Any) -> str:
    (found,) = await containers(api.server.data)
    return found


async def inspected(api: Any) -> Json:
    found: Json = json.loads(await docker("inspect", await the_container(api)))[0]
    return found


async def printed(api: Any, session: str, turn: str) -> str:
    """What the tools of a turn printed."""
    events = [event for event in await api.events(session) if event["turn_id"] == turn]
    return "\n".join(str(event["data"]["result"]) for event in events if event["type"] == "tool.finished")


async def bash(api: Any, session: str, command: str) -> str:
    """What a command prints in the session's sandbox."""
    turn = await api.run(session, f"[[bash: {command}]]")
    assert turn["status"] == "succeeded", turn
    return await printed(api, session, turn["id"])


async def ended(api: Any, session: str, turn: str) -> Json:
    """A turn, once it is over."""
    await api.until_event(session, "turn.completed", turn)
    found: Json = await api.ask("GET", f"/sessions/{session}/turns/{turn}")
    return found


async def until_exists(path: Path, seconds: float = 30.0) -> None:
    """Wait until a tool has made a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        await asyncio.sleep(0.02)


@pytest.fixture
def start_docker(start: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`await start_docker(**settings)`: a server whose sandboxes are containers."""

    async def start_one(**settings: Any) -> Any:
        return await start(runtime="docker", **settings)

    return start_one


@pytest.fixture
async def api(start_docker: Callable[..., Awaitable[Any]]) -> Any:
    return await start_docker()


async def test_a_turn_with_tools_in_a_container_of_its_own(api: Any) -> None:
    session = await api.session()
    turn = await api.run(
        session, "[[write: made.txt | by write]] [[bash: id -u; pwd; echo $HOME; whoami; cat made.txt]] [[say: done]]"
    )
    assert turn["status"] == "succeeded", turn
    assert turn["text"].startswith("done")
    uid, folder, home, name, made = (await printed(api, session, turn["id"])).split("\n")[-5:]
    assert (folder, home, name, made) == ("/workspace", "/home/agent", "agent", "by write")
    found = await inspected(api)
    assert found["Config"]["User"].split(":")[0] == uid != "0"
    workspace = Path(api.server.data, "sessions", session, "workspace")
    assert str((workspace / "made.txt").stat().st_uid) == uid
    await api.ask("DELETE", f"/sessions/{session}", 204)

    async def gone() -> bool:
        return not await containers(api.server.data) and not any((api.server.data / "containers").iterdir())

    await api.until("its container and folder are gone", gone)


async def test_a_server_that_ends_leaves_no_container(start_docker: Any, tmp_path: Path) -> None:
    from carrel.cli.server import running
    from carrel.settings import load_settings

    given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": 0}
    async with running(load_settings(overrides=given | {"runtime": "docker"})) as server:
        assert list(server.services.sessions._owner._runtimes.names) == ["docker"]
    assert await containers(tmp_path / "data") == []


async def test_the_wall_is_as_the_settings_say(start_docker: Any, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir(mode=0o755)
    (shown / "note").write_text("of the host")
    tmp_path.chmod(0o755)
    api = await start_docker(
        docker={
            "platform": "linux/amd64" if os.uname().machine == "x86_64" else "linux/arm64",
            "oci_runtime": "runc",
            "mounts": [{"source": str(shown), "target": "/shown"}],
            "tmp_mb": 32,
            "shm_mb": 16,
            "oom_score_adj": 700,
            "stop_grace_seconds": 3,
        },
        limits={"sandbox_memory_mb": 700, "sandbox_processes": 200, "sandbox_cpus": 1.5},
    )
    session = await api.session()
    seen = await bash(
        api,
        session,
        "cat /shown/note; echo; touch /shown/x 2>&1; df -m --output=size /tmp /dev/shm | tail -2 | tr -d ' '; "
        "cat /proc/self/oom_score_adj; ls /sys/class/net; touch /usr/x 2>&1; touch /run/x 2>&1; echo",
    )
    lines = seen.splitlines()
    assert lines[0] == "of the host"
    assert "Read-only file system" in lines[1]
    assert lines[2:4] == ["32", "16"]
    assert lines[4] == "700"
    assert lines[5] == "lo", "there is no network"
    assert "Read-only file system" in lines[6]
    assert "Permission denied" in lines[7]
    found = await inspected(api)
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"]) == (700 * 2**20, 700 * 2**20)
    assert (host["PidsLimit"], host["NanoCpus"]) == (200, 1_500_000_000)
    assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["NetworkMode"], host["IpcMode"], host["PidMode"]) == ("none", "private", "")
    assert (host["ReadonlyRootfs"], host["Init"], host["Runtime"]) == (True, True, "runc")
    assert found["Config"]["StopTimeout"] == 3
    assert set(found["Config"]["Labels"]) >= {"carrel.installation", "carrel.sandbox", "carrel.session"}


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose sockets fit below it: otherwise they stand elsewhere, where a gateway's host has no name for them."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="docker-") as folder:
        yield Path(folder)


async def test_the_host_may_have_the_data_folder_elsewhere(start_docker: Any, short_path: Path) -> None:
    """As for a gateway in a container: the engine is told the host's names of our folders."""
    ours, theirs = short_path / "data", short_path / "of-the-host"
    theirs.mkdir()
    ours.symlink_to(theirs)
    api = await start_docker(data=ours, docker={"data_on_host": str(theirs)})
    session = await api.session()
    assert await bash(api, session, "echo here") == "here"
    sources = {mount["Source"] for mount in (await inspected(api))["HostConfig"]["Mounts"]}
    assert str(theirs / "sessions" / session / "workspace") in sources
    assert not any(source.startswith(f"{ours}/") for source in sources)


async def test_an_image_that_is_missing_is_named(start_docker: Any) -> None:
    api = await start_docker(docker={"image": "carrel-no-such-image:1"})
    session = await api.session()
    turn = await api.run(session, "hello")
    assert (turn["status"], turn["error"]["code"]) == ("failed", "image_missing")
    assert "carrel-no-such-image:1" in turn["error"]["message"]
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "failed"
    assert await containers(api.server.data) == []


@pytest.mark.parametrize("how", ["container", "runner"])
async def test_what_is_killed_from_outside_is_a_lost_sandbox(api: Any, how: str) -> None:
    session = await api.session()
    await api.run(session, "hello")
    turn = await api.send(session, "[[bash: echo begun > making; mv making begun; sleep 100]]")
    await until_exists(api.server.data / "sessions" / session / "workspace" / "begun")
    name = await the_container(api)
    if how == "container":
        await docker("kill", name)
    else:
        pid = json.loads(await docker("inspect", name))[0]["State"]["Pid"]
        (runner,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(runner), 9)
    found = await ended(api, session, turn)
    assert (found["status"], found["error"]["code"]) == ("failed", "sandbox_lost")
    assert (await api.until_status(session, "idle"))["stop_reason"] == "sandbox_lost"
    assert await bash(api, session, "cat begun") == "begun"
    assert name not in await containers(api.server.data)


async def test_a_turn_that_is_to_go_on_does_so_in_a_new_container(api: Any) -> None:
    session = await api.session()
    turn = await api.send(
        session, "[[bash: test -e begun || { touch begun; sleep 100; }]] [[say: at last]]", on_sandbox_lost="continue"
    )
    await until_exists(api.server.data / "sessions" / session / "workspace" / "begun")
    await docker("kill", await the_container(api))
    found = await ended(api, session, turn)
    assert found["status"] == "succeeded", found
    assert found["text"].startswith("at last")


async def test_work_outlives_its_container_and_its_disk_and_goes_on_elsewhere(start_docker: Any, require: Any) -> None:
    require("bubblewrap")
    api = await start_docker(runtimes=["local"])
    session = await api.session()
    await api.run(session, "[[bash: echo kept > kept]]")
    folder = api.server.data / "sessions" / session

    async def snapshot() -> Any:
        return (await api.ask("GET", f"/sessions/{session}/snapshots"))["data"]

    (kept,) = await api.until("it is kept", snapshot)
    turn = await api.send(
        session,
        "[[bash: echo begun > making; mv making begun; sleep 6]] [[bash: cat kept; ls]]",
        on_sandbox_lost="continue",
    )
    await until_exists(folder / "workspace" / "begun")
    name = await the_container(api)
    shutil.rmtree(folder)
    await docker("kill", name)
    found = await ended(api, session, turn)
    assert found["status"] == "succeeded", found
    assert found["tool_calls"][-1]["result"].startswith("kept\n")
    restored = [event["data"] for event in await api.events(session) if event["type"] == "workspace.restored"]
    assert [(each["snapshot_id"], each["seq"]) for each in restored] == [(kept["id"], kept["seq"])]
    await api.ask("PUT", "/environments/outside", json={"runtime": "local"})
    await api.ask("PATCH", f"/sessions/{session}", json={"environment": "outside"})
    await api.ask("POST", f"/sessions/{session}/stop")
    await api.ask("POST", f"/sessions/{session}/resume")
    shutil.rmtree(folder)
    assert await bash(api, session, "cat kept") == "kept", "in another runtime, on another disk"


async def test_one_that_eats_its_memory_is_told_so(start_docker: Any) -> None:
    api = await start_docker(limits={"sandbox_memory_mb": 600})
    session = await api.session()
    turn = await api.send(session, "[[bash: head -c 2000m /dev/zero | tail > /dev/null; sleep 30]]")
    found = await ended(api, session, turn)
    assert (found["status"], found["error"]["code"]) == ("failed", "sandbox_out_of_memory"), found
    await api.until_status(session, "idle")
    assert await bash(api, session, "echo well again") == "well again"


async def test_processes_are_bounded(start_docker: Any) -> None:
    api = await start_docker(limits={"sandbox_processes": 120})
    session = await api.session()
    turn = await api.send(session, "[[bash: for i in $(seq 500); do sleep 60 & done; sleep 60]]")
    found = await ended(api, session, turn)
    assert (found["status"], found["error"]["code"]) == ("failed", "sandbox_out_of_processes"), found


class Switch:
    """Stands between a server and its engine, and can be cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def on(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def off(self) -> None:
        """As when an engine ends: nothing listens, and every connection is over."""
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for writer in list(self._open):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(SOCKET)
        self._open |= {writer, far_writer}

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
                if target.can_write_eof():
                    target.write_eof()
            except OSError:
                pass

        try:
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        finally:
            self._open -= {writer, far_writer}
            for each in (writer, far_writer):
                each.close()


@pytest.fixture
async def switch(tmp_path: Path) -> AsyncIterator[Switch]:
    switch = Switch(tmp_path / "engine.sock")
    await switch.on()
    yield switch
    await switch.off()


async def test_an_engine_that_is_away_is_waited_for_then_said_to_be(switch: Switch, start_docker: Any) -> None:
    api = await start_docker(docker={"host": f"unix://{switch.path}", "wait_seconds": 0.5})
    session = await api.session()
    await switch.off()
    turn = await api.run(session, "hello")
    assert (turn["status"], turn["error"]["code"]) == ("failed", "runtime_unavailable"), turn
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "idle"
    await switch.on()
    assert (await api.run(session, "hello again"))["status"] == "succeeded"


async def test_an_engine_that_comes_back_finds_its_sandboxes_as_they_were(switch: Switch, start_docker: Any) -> None:
    """The gateway's road to the engine is cut in mid-turn: who has no news of a sandbox does not end it."""
    api = await start_docker(docker={"host": f"unix://{switch.path}"})
    session = await api.session()
    turn = await api.send(session, "[[bash: until test -e go; do sleep 0.1; done]] [[say: through]]")
    await api.until_event(session, "tool.called", turn)
    await switch.off()
    await api.server.guard.look()
    (api.server.data / "sessions" / session / "workspace" / "go").touch()
    found = await ended(api, session, turn)
    assert found["status"] == "succeeded"
    assert found["text"].startswith("through")
    await switch.on()


async def test_an_engine_that_restarts_has_ended_its_containers(switch: Switch, start_docker: Any) -> None:
    """While it is away nobody is taken for dead; when it is back, what it says of the container is the truth."""
    api = await start_docker(docker={"host": f"unix://{switch.path}"})
    session = await api.session()
    turn = await api.send(session, "[[bash: echo begun > making; mv making begun; sleep 100]]")
    await until_exists(api.server.data / "sessions" / session / "workspace" / "begun")
    name = await the_container(api)
    await switch.off()
    await docker("kill", name)
    await api.server.guard.look()
    assert (await api.ask("GET", f"/sessions/{session}"))["status"] == "running"
    await switch.on()
    found = await ended(api, session, turn)
    assert (found["status"], found["error"]["code"]) == ("failed", "sandbox_lost")
    assert await bash(api, session, "cat begun") == "begun"


async def test_a_session_moves_from_local_to_docker_and_back(start: Any, tmp_path: Path, require: Any) -> None:
    require("bubblewrap")
    from carrel.cli.server import running
    from carrel.settings import load_settings

    session = ""
    turns = []
    for number, runtime in enumerate(["local", "docker", "local"]):
        given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": 0}
        async with running(load_settings(overrides=given | {"runtime": runtime})) as server:
            import httpx

            headers = {"Authorization": f"Bearer {server.key or (tmp_path / 'data' / 'admin.key').read_text()}"}
            async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", headers=headers, timeout=60) as http:
                if not session:
                    session = (await http.post("/sessions", json={})).json()["id"]
                prompt = f"[[bash: pwd; echo $HOME; echo {number} >> trail; cat trail]] [[say: in {runtime}]]"
                answer = await http.post(f"/sessions/{session}/turns", json={"prompt": prompt, "wait": True})
                turns.append(answer.json())
                events = (await http.get(f"/sessions/{session}/events", params={"limit": 1000})).json()["data"]
                counted = (
                    await http.post(f"/sessions/{session}/turns", json={"prompt": "how many?", "wait": True})
                ).json()
    assert [turn["status"] for turn in turns] == ["succeeded"] * 3, turns
    outputs = [event["data"]["result"] for event in events if event["type"] == "tool.finished"]
    assert outputs == ["/workspace\n/home/agent\n" + "\n".join("012"[: n + 1]) for n in range(3)]
    assert "turn 6 of our conversation" in counted["text"], "the conversation went with it"
