"""Every runtime keeps its contract, and the suite catches those that do not."""

import asyncio
import http.client
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import websockets.asyncio.server as ws
from websockets.exceptions import ConnectionClosed

from carrel import abc
from carrel.model import new_id
from carrel.protocol.link import RUNNER_FRAME, Hello
from carrel.runtimes.docker import Caps as ContainerCaps
from carrel.runtimes.docker import ContainerOptions, DockerRuntime, DockerRuntimeOptions
from carrel.runtimes.local import Caps, LocalRuntime, LocalRuntimeOptions, processes
from carrel.runtimes.local.caps import Means
from carrel.runtimes.local.cgroups import name_of
from carrel.sessions.hub import LinkConnection
from carrel.settings import load_settings
from carrel.testing import FakeHost, FakeRuntime
from carrel.testing.conformance import failures
from carrel.testing.conformance import runtime as suite
from carrel.testing.conformance.runtime import RuntimeHarness, launch
from carrel.testing.faulty import (
    RuntimeThatDiesAfterStart,
    RuntimeThatFailsToLaunch,
    RuntimeThatHidesItsOrphans,
    RuntimeThatLeavesItsProcesses,
    RuntimeThatMeasuresTheDead,
    RuntimeThatNeverConnects,
    RuntimeThatTakesTheLivingForDead,
    RuntimeThatWritesItsTokensDown,
)

HELLO_SECONDS = 20.0


class Hellos:
    """What runners have said first."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[Hello]] = {}

    def _of(self, sandbox_id: str) -> asyncio.Future[Hello]:
        return self._waiting.setdefault(sandbox_id, asyncio.get_running_loop().create_future())

    def take(self, message: bytes) -> None:
        hello = RUNNER_FRAME.validate_json(message.split(b"\n")[0])
        assert isinstance(hello, Hello)
        if not (future := self._of(hello.sandbox_id)).done():
            future.set_result(hello)

    async def of(self, sandbox_id: str, seconds: float = HELLO_SECONDS) -> Hello:
        return await asyncio.wait_for(asyncio.shield(self._of(sandbox_id)), seconds)


def make_spec(folder: Path, number: int, owner: tuple[int, int] | None = None) -> abc.LaunchSpec:
    places = [folder / f"s{number}" / name for name in ("workspace", "home")]
    for place in places:
        place.mkdir(parents=True)
        if owner is not None:
            os.chown(place, *owner)
    return abc.LaunchSpec(
        sandbox_id=new_id(),
        session_id=new_id(),
        session_number=number,
        generation=number,
        link_token=f"secret-link-{number}",
        agent_token=f"secret-agent-{number}",
        workspace=str(places[0]),
        home=str(places[1]),
        owner=owner,
    )


# -------------------------------------------------------------------------------------------------------------- fake


class FakeHarness(RuntimeHarness):
    def __init__(
        self, host: FakeHost, folder: Path, wrap: Callable[[abc.Runtime], abc.Runtime], patience: float
    ) -> None:
        self._host = host
        self._folder = folder
        self._wrap = wrap
        self._patience = patience
        self._hellos = Hellos()
        self._number = 0
        host.connect(self._serve)

    async def _serve(self, connection: LinkConnection) -> None:
        while (message := await connection.receive()) is not None:
            self._hellos.take(message)

    def runtime(self) -> abc.Runtime:
        return self._wrap(FakeRuntime(self._host))

    def spec(self) -> abc.LaunchSpec:
        self._number += 1
        return make_spec(self._folder, self._number)

    async def hello(self, sandbox_id: str) -> Hello:
        return await self._hellos.of(sandbox_id, self._patience)

    async def kill(self, sandbox_id: str) -> None:
        self._host.runners[sandbox_id].kill()

    def left(self, sandbox_id: str) -> list[str]:
        runner = self._host.runners.get(sandbox_id)
        alive = ["a runner"] if runner is not None and runner.alive else []
        return alive + (["a folder"] if sandbox_id in self._host.remains else [])


@pytest.fixture
async def fake_harness(tmp_path: Path) -> AsyncIterator[Callable[..., FakeHarness]]:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(FakeHost())
        made = 0

        def make(
            wrap: Callable[[abc.Runtime], abc.Runtime] = lambda runtime: runtime, patience: float = HELLO_SECONDS
        ) -> FakeHarness:
            nonlocal made
            made += 1
            return FakeHarness(host, tmp_path / str(made), wrap, patience)

        yield make


@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
async def test_fake_runtime(
    check: Callable[[RuntimeHarness], Awaitable[None]], fake_harness: Callable[..., FakeHarness]
) -> None:
    await check(fake_harness())


@pytest.mark.parametrize(
    ("wrap", "caught_by"),
    [
        (RuntimeThatDiesAfterStart, "a_launched_runner_says_hello"),
        (RuntimeThatNeverConnects, "a_launched_runner_says_hello"),
        (RuntimeThatFailsToLaunch, "a_launched_runner_says_hello"),
        (RuntimeThatHidesItsOrphans, "a_new_runtime_finds_what_an_old_one_made"),
        (RuntimeThatHidesItsOrphans, "a_dead_runner_is_noticed"),
        (RuntimeThatLeavesItsProcesses, "terminate_may_be_called_again"),
        (RuntimeThatMeasuresTheDead, "what_runs_is_measured_and_what_ended_is_not"),
        (RuntimeThatTakesTheLivingForDead, "sandboxes_do_not_touch_each_other"),
        (RuntimeThatWritesItsTokensDown, "checkpoints_are_plain_and_hold_no_secret"),
    ],
)
async def test_a_faulty_runtime_is_caught(
    wrap: Callable[[abc.Runtime], abc.Runtime], caught_by: str, fake_harness: Callable[..., FakeHarness]
) -> None:
    assert caught_by in await failures({caught_by: suite.CHECKS[caught_by]}, fake_harness(wrap, patience=0.2))


# ------------------------------------------------------------------------------------------------------------- local


class LocalHarness(RuntimeHarness):
    def __init__(self, folder: Path, owner: tuple[int, int] | None, caps_by: Means) -> None:
        self.folder = folder
        self._caps_by = caps_by
        self._owner = owner
        self._hellos = Hellos()
        self._number = 0
        (folder / "gateway").mkdir()

    async def start(self, stack: AsyncExitStack) -> None:
        async def serve(connection: ws.ServerConnection) -> None:
            with suppress(ConnectionClosed):
                while True:
                    self._hellos.take(await connection.recv(decode=False))

        server = await ws.unix_serve(serve, str(self.folder / "link.sock"))
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)

    def runtime(self) -> LocalRuntime:
        options = LocalRuntimeOptions(
            folder=self.folder / "sandboxes",
            link_socket=self.folder / "link.sock",
            gateway_folder=self.folder / "gateway",
            cli_path=Path("/bin/true"),
            reconnect_window_seconds=30,
            caps=Caps(memory_bytes=512 * 2**20, processes=64, cpus=1.5),
            caps_by=self._caps_by,
        )
        return LocalRuntime(options)

    def spec(self) -> abc.LaunchSpec:
        self._number += 1
        return make_spec(self.folder, self._number, self._owner)

    async def hello(self, sandbox_id: str) -> Hello:
        return await self._hellos.of(sandbox_id)

    async def kill(self, sandbox_id: str) -> None:
        os.kill(int((self.folder / "sandboxes" / sandbox_id / "lock").read_text()), signal.SIGKILL)

    def left(self, sandbox_id: str) -> list[str]:
        folder = self.folder / "sandboxes" / sandbox_id
        running = [f"process {pid}" for pid, _ in processes.marked(sandbox_id)]
        groups = [str(group) for group in self.groups() if group.name == sandbox_id]
        return running + groups + ([str(folder)] if folder.exists() else [])

    def groups(self) -> list[Path]:
        """The control groups of this place, those of its sandboxes and the ones that hold them."""
        bases = Path("/sys/fs/cgroup").glob(f"**/{name_of(self.folder / 'sandboxes')}")
        return [group for base in bases for group in (base, *(path for path in base.iterdir() if path.is_dir()))]


@pytest.fixture(params=["cgroup", "watchdog"])
async def local_harness(
    request: pytest.FixtureRequest, tmp_path: Path, require: Callable[[str], None]
) -> AsyncIterator[LocalHarness]:
    if request.param == "cgroup":
        require("cgroup")
    async with AsyncExitStack() as stack:
        harness = LocalHarness(tmp_path, (61_234, 61_234) if os.geteuid() == 0 else None, request.param)
        await harness.start(stack)
        yield harness
    assert harness.groups() == []


@pytest.mark.requires("bubblewrap")
@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
async def test_local_runtime(check: Callable[[RuntimeHarness], Awaitable[None]], local_harness: LocalHarness) -> None:
    await check(local_harness)


@pytest.mark.requires("bubblewrap")
async def test_the_death_of_the_preloaded_parent_costs_nobody_anything(local_harness: LocalHarness) -> None:
    async with AsyncExitStack() as stack:
        runtime = local_harness.runtime()
        await runtime.start(stack)
        before, after = local_harness.spec(), local_harness.spec()
        state = (await launch(runtime, before))[-1]
        await local_harness.hello(before.sandbox_id)
        parent = runtime.nursery_pid
        assert parent is not None
        os.kill(parent, signal.SIGKILL)
        later = (await launch(runtime, after))[-1]
        await local_harness.hello(after.sandbox_id)
        assert runtime.nursery_pid != parent
        alive = await runtime.probe({before.sandbox_id: state, after.sandbox_id: later})
        assert dict(alive) == {before.sandbox_id: True, after.sandbox_id: True}
        for spec in (before, after):
            await runtime.terminate((await runtime.owned())[spec.sandbox_id])
            assert local_harness.left(spec.sandbox_id) == []


# ------------------------------------------------------------------------------------------------------------ docker


class EngineConnection(http.client.HTTPConnection):
    """To the engine past all of our code."""

    def __init__(self) -> None:
        super().__init__("engine")

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/var/run/docker.sock")


def engine(method: str, path: str) -> Any:
    connection = EngineConnection()
    try:
        connection.request(method, path)
        body = connection.getresponse().read()
        return json.loads(body) if body else None
    finally:
        connection.close()


class DockerHarness(RuntimeHarness):
    def __init__(self, folder: Path, owner: tuple[int, int] | None) -> None:
        self.folder = folder
        self._owner = owner
        self._hellos = Hellos()
        self._number = 0
        self.installation = new_id()
        for name in ("gateway", "link"):
            (folder / name).mkdir()

    async def start(self, stack: AsyncExitStack) -> None:
        async def serve(connection: ws.ServerConnection) -> None:
            with suppress(ConnectionClosed):
                while True:
                    self._hellos.take(await connection.recv(decode=False))

        server = await ws.unix_serve(serve, str(self.folder / "link" / "link.sock"))
        (self.folder / "link" / "link.sock").chmod(0o666)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)

    def runtime(self) -> DockerRuntime:
        return DockerRuntime(
            DockerRuntimeOptions(
                installation=self.installation,
                folder=self.folder / "containers",
                link_folder=self.folder / "link",
                gateway_folder=self.folder / "gateway",
                containers=ContainerOptions(
                    image=load_settings().docker.image,
                    caps=ContainerCaps(memory_bytes=512 * 2**20, processes=64, cpus=1.5),
                ),
                reconnect_window_seconds=30,
            )
        )

    def spec(self) -> abc.LaunchSpec:
        self._number += 1
        return make_spec(self.folder, self._number, self._owner)

    async def hello(self, sandbox_id: str) -> Hello:
        return await self._hellos.of(sandbox_id)

    async def kill(self, sandbox_id: str) -> None:
        await asyncio.to_thread(engine, "POST", f"/containers/carrel-{sandbox_id}/kill")

    def left(self, sandbox_id: str) -> list[str]:
        filters = quote(json.dumps({"label": [f"carrel.sandbox={sandbox_id}"]}))
        found = [each["Names"][0] for each in engine("GET", f"/containers/json?all=1&filters={filters}")]
        folder = self.folder / "containers" / sandbox_id
        return found + ([str(folder)] if folder.exists() else [])


@pytest.fixture
async def docker_harness(tmp_path: Path) -> AsyncIterator[DockerHarness]:
    async with AsyncExitStack() as stack:
        harness = DockerHarness(tmp_path, (61_234, 61_234) if os.geteuid() == 0 else None)
        await harness.start(stack)
        yield harness


@pytest.mark.requires("docker", "images")
@pytest.mark.parametrize("check", suite.CHECKS.values(), ids=suite.CHECKS)
async def test_docker_runtime(
    check: Callable[[RuntimeHarness], Awaitable[None]], docker_harness: DockerHarness
) -> None:
    await check(docker_harness)
