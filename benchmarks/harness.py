"""What every measurement stands on: the model, a server and the bare SDK, each in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.wire import Address, Connection, Frame
from carrel import __version__
from carrel.cli.runtimes import bundled_cli
from carrel.model import Isolation, NetworkPolicy
from carrel.runtimes.local import isolation

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_STDOUT_LIMIT = 256 * 2**20
_START_SECONDS = 60.0
_END_SECONDS = 45.0


class Bench:
    """Hands out servers and workers; all that it started has ended when it is left."""

    def __init__(self, stack: AsyncExitStack, folder: Path, model: Model, *, quick: bool) -> None:
        self._stack = stack
        self._folder = folder
        self._made = 0
        self.model = model
        self.quick = quick

    @classmethod
    @asynccontextmanager
    async def open(cls, *, quick: bool) -> AsyncIterator[Bench]:
        """Start the model."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with AsyncExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="carrel-bench-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            yield cls(stack, folder, await Model.start(stack), quick=quick)

    def folder(self, name: str) -> Path:
        """A new, empty folder."""
        self._made += 1
        path = self._folder / f"{self._made}-{name}"
        path.mkdir()
        return path

    @asynccontextmanager
    async def server(self, data: Path | None = None, **settings: Any) -> AsyncIterator[Server]:
        """A Carrel server with the settings of every day, behind bubblewrap, on the benchmark's model."""
        data = data or self.folder("data")
        given = {"data": str(data), "port": 0, "model_upstream": self.model.url, "drain_seconds": 0} | settings
        async with AsyncExitStack() as stack:
            yield await Server.start(stack, data, given)

    @asynccontextmanager
    async def bare(self) -> AsyncIterator[Bare]:
        """The bare SDK on the same model."""
        async with AsyncExitStack() as stack:
            yield await Bare.start(stack, self.folder("bare"), self.model.url)

    def times(self, full: int, quick: int) -> int:
        """How often to measure."""
        return quick if self.quick else full


class Model:
    """The scripted model's process."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.url = f"http://{address.host}:{address.port}"

    @classmethod
    async def start(cls, stack: AsyncExitStack) -> Model:
        """Start it."""
        process = await _spawn(stack, "benchmarks.model", stdout=PIPE)
        port = int(await _line(process))
        return cls(Address("127.0.0.1", port))

    async def marks(self) -> list[Json]:
        """When each request since the last call came, and when its answer began."""
        return list(await self._ask("/bench/marks"))

    async def trace(self, on: bool) -> None:
        """Whether to record when each number of a count is sent."""
        await self._ask(f"/bench/trace/{'on' if on else 'off'}")

    async def _ask(self, path: str) -> Any:
        connection = await Connection.open(self._address)
        try:
            return await connection.ask("GET", path)
        finally:
            await connection.close()


class Server:
    """A Carrel server's process, and the calls that measurements make."""

    def __init__(self, process: Process, data: Path, address: Address) -> None:
        self.process = process
        self.data = data
        self.address = address

    @classmethod
    async def start(cls, stack: AsyncExitStack, data: Path, settings: Json) -> Server:
        """Start it and wait until it listens."""
        process = await _spawn(stack, "benchmarks.serve", json.dumps(settings))
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise RuntimeError("the server ended while it was starting")
            with contextlib.suppress(OSError, ValueError):
                url = json.loads((data / "server.json").read_text())["url"]
                port = int(url.rpartition(":")[2])
                return cls(process, data, Address("127.0.0.1", port, (data / "admin.key").read_text().strip()))
            await asyncio.sleep(0.01)
        raise RuntimeError("the server did not come up")

    async def connect(self) -> Connection:
        """A connection of one's own."""
        return await Connection.open(self.address)

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request on a connection of its own."""
        connection = await self.connect()
        try:
            return await connection.ask(method, f"/api/v1{path}", body)
        finally:
            await connection.close()

    async def session(self) -> str:
        """A new session's id."""
        return str((await self.ask("POST", "/sessions", {}))["id"])

    async def run(self, session: str, prompt: str) -> Json:
        """A turn, waited for."""
        result: Json = await self.ask("POST", f"/sessions/{session}/turns", {"prompt": prompt, "wait": True})
        if result["status"] != "succeeded":
            raise RuntimeError(f"the turn ended as {result['status']}: {result}")
        return result

    async def until_status(self, session: str, status: str) -> None:
        """Wait until the session is so."""

        async def check() -> bool:
            return bool((await self.ask("GET", f"/sessions/{session}"))["status"] == status)

        await until(f"the session is {status}", check)

    async def held(self) -> Json:
        """How many tasks, threads and objects it holds now."""
        path = self.data / "held.json"
        path.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)

        async def check() -> bool:
            return path.exists()

        await until("the server says what it holds", check)
        told: Json = json.loads(path.read_text())
        return told

    def sandbox_processes(self) -> list[psutil.Process]:
        """All that run below the preloaded parent."""
        return [process for parent in self.children() for process in parent.children(recursive=True)]

    def children(self) -> list[psutil.Process]:
        """The server's own children: the preloaded parent."""
        return psutil.Process(self.process.pid).children()


class Bare:
    """The bare SDK's process."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, stack: AsyncExitStack, folder: Path, model_url: str) -> Bare:
        """Start it and wait until the SDK is imported."""
        options = {"cli": str(bundled_cli()), "cwd": str(folder / "workspace"), "env": _agent_env(folder, model_url)}
        process = await _spawn(stack, "benchmarks.bare", json.dumps(options), stdin=PIPE, stdout=PIPE)
        await _line(process)
        return cls(process)

    async def do(self, what: str, **more: Any) -> Json:
        """Have it do something and take its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
        told: Json = json.loads(await _line(self.process, 300))
        return told


def _agent_env(folder: Path, model_url: str) -> dict[str, str]:
    """What an agent of Carrel's has in its environment, but for the road to the model."""
    workspace, home = folder / "workspace", folder / "home"
    workspace.mkdir()
    home.mkdir()
    place = isolation.Place(
        folder=folder, workspace=workspace, home=home, gateway_folder=folder, cli=bundled_cli(), owner=None
    )
    wrapped = isolation.wrap(Isolation.NONE, NetworkPolicy(mode="open"), place, read_only=[], sandbox_id="bench")
    env = {
        name: value for name, value in wrapped.env.items() if name not in ("ANTHROPIC_UNIX_SOCKET", "CARREL_SANDBOX")
    }
    return env | {
        "ANTHROPIC_BASE_URL": model_url,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CONFIG_DIR": wrapped.config_dir,
        "CLAUDE_CODE_MAX_RETRIES": "0",
    }


async def _spawn(
    stack: AsyncExitStack, module: str, *arguments: str, stdin: int = DEVNULL, stdout: int = DEVNULL
) -> Process:
    """A process of ours with a clean environment; ended when the stack is left."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    env |= {"LANG": "C.UTF-8", "CLAUDE_AGENT_SDK_SKIP_VERSION_CHECK": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        cwd=ROOT,
        env=env,
        limit=_STDOUT_LIMIT,
        stdin=stdin,
        stdout=stdout,
    )
    stack.push_async_callback(_end, process)
    return process


async def _end(process: Process) -> None:
    if process.stdin is not None:
        process.stdin.close()  # which ends whoever reads it to its end, in good order
    elif process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _END_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _line(process: Process, seconds: float = _START_SECONDS) -> bytes:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), seconds)
    if not line:
        raise RuntimeError(f"a process of the benchmark's ended with {await process.wait()}")
    return line


@asynccontextmanager
async def spawned(module: str, *arguments: str) -> AsyncIterator[Process]:
    """Another process of the benchmarks, with pipes."""
    async with AsyncExitStack() as stack:
        yield await _spawn(stack, module, *arguments, stdin=PIPE, stdout=PIPE)


async def said(process: Process, seconds: float = 300) -> Json:
    """The next line such a process says."""
    told: Json = json.loads(await _line(process, seconds))
    return told


async def turn_frames(connection: Connection, session: str, prompt: str) -> AsyncIterator[Frame]:
    """A turn's events and deltas as they come."""
    async for frame in connection.frames("POST", f"/api/v1/sessions/{session}/turns", {"prompt": prompt}):
        yield frame


async def until(what: str, check: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not await check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.02)


async def alternately(times: int, *both: Callable[[], Awaitable[None]]) -> None:
    """Do each in turn, so many times: what disturbs one disturbs the other as much."""
    for _ in range(times):
        for one in both:
            await one()


async def gather_bounded(
    times: int, at_once: int, work: Callable[[Connection], Awaitable[None]], server: Server
) -> None:
    """Do the work so many times over `at_once` connections."""
    left = iter(range(times))

    async def lane() -> None:
        connection = await server.connect()
        for _ in left:
            await work(connection)
        await connection.close()

    await asyncio.gather(*(lane() for _ in range(at_once)))


def machine() -> Json:
    """What the numbers depend on, and nothing that says whose machine it is."""
    memory = psutil.virtual_memory().total
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "carrel": __version__,
        "claude_agent_sdk": version("claude-agent-sdk"),
        "load_before": round(os.getloadavg()[0], 2),
    }
