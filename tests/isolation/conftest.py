"""A server in a process of its own, as root and as an ordinary user, and one whole investigation of its walls.

The investigation (`found`) runs once for each of the two users: two sessions at once, a prober in one of them
(`probe.py`), a neighbour who leaves traces in the other (`neighbour.py`), and a look from the host at every process,
file and mount meanwhile and after. The tests then look at what was found, a line each.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import carrel
from carrel.model_gateway import scripted
from carrel.runtimes.local.cgroups import name_of

HERE = Path(__file__).parent
ORDINARY_USER = 64_321
DEADLINE_SECONDS = 30.0
LAUNCHER = """
import json, os, sys
from carrel.cli.server import serve
from carrel.runtimes.local import LocalRuntime
from carrel.settings import load_settings

told, notes = json.loads(sys.stdin.readline()), int(sys.argv[1])
launch = LocalRuntime.launch

async def launch_and_note(self, spec):
    os.write(notes, (json.dumps({"session": spec.session_id, "link": spec.link_token, "agent": spec.agent_token}) + "\\n").encode())
    async for state in launch(self, spec):
        yield state

LocalRuntime.launch = launch_and_note
serve(load_settings(overrides=told))
"""


def wait_for(what: Callable[[], Any], *, seconds: float = DEADLINE_SECONDS, name: str = "it") -> Any:
    deadline = time.monotonic() + seconds
    while not (got := what()):
        if time.monotonic() > deadline:
            pytest.fail(f"{name} did not happen within {seconds} s", pytrace=False)
        time.sleep(0.02)  # what we wait for is in another process
    return got


# ------------------------------------------------------------------------------------------------- the host's side


def read_process(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def link_of(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pid: int) -> bool:
    """A zombie has ended: what is left of it is its parent's."""
    status = read_process(pid, "stat").rpartition(b")")[2].split()
    return bool(status) and status[0] not in (b"Z", b"X")


def mark_of(pid: int) -> str | None:
    found = re.search(rb"(?:^|\0)CARREL_SANDBOX=([^\0]*)", read_process(pid, "environ"))
    return found[1].decode() if found else None


def in_memory(pid: int, wanted: dict[str, bytes]) -> tuple[set[str], int]:
    """Which of these bytes are in a process's memory, and how much of it was read."""
    found, size, region = set(), 0, (0, 0, "")
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            head = line.split(maxsplit=2)
            if "-" in head[0] and not head[0].endswith(":"):
                low, _, high = head[0].partition("-")
                region = (int(low, 16), int(high, 16), head[1])
            elif head[0] == "Rss:" and int(head[1]) and "r" in region[2] and region[1] - region[0] < 1 << 30:
                with contextlib.suppress(OSError, ValueError, OverflowError):  # special mappings
                    memory.seek(region[0])
                    data = memory.read(region[1] - region[0]) or b""
                    size += len(data)
                    found |= {name for name, value in wanted.items() if value in data}
    return found, size


def cgroups(data: Path) -> set[str]:
    """The server's control groups; others run here too."""
    return {str(folder) for folder in Path("/sys/fs/cgroup").glob(f"**/{name_of(data / 'sandboxes')}")}


def mounts() -> list[str]:
    """Containers of other tests come and go at the same time."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if not line.split()[4].startswith(("/run/docker/", "/var/lib/docker/"))]


# ---------------------------------------------------------------------------------------------------- the upstream


class Upstream:
    """The scripted model behind a lock: whoever does not bring the key gets 401. Notes every request."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._model = scripted.create_app()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        self.requests.append((scope["method"], scope["raw_path"].decode() + query, headers))
        if headers.get("x-api-key") != self.key:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"wrong key"})
            return
        await self._model(scope, receive, send)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """An application on loopback, in a thread of its own, because tests block."""
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1, ws="none")
    server = _Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="upstream")
    thread.start()
    try:
        wait_for(lambda: server.started, name="the upstream's start")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class Listener:
    """Listens on loopback and under an abstract name, and counts who comes."""

    def __init__(self) -> None:
        self.name = f"carrel-listener-{secrets.token_hex(4)}"
        self.visitors: list[str] = []
        self._tcp, self._abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
        self._abstract.bind("\0" + self.name)
        self._abstract.listen()
        self.port: int = self._tcp.getsockname()[1]
        self._threads = [threading.Thread(target=self._take, args=(each,)) for each in (self._tcp, self._abstract)]
        for thread in self._threads:
            thread.start()

    def _take(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            with connection:
                self.visitors.append(f"{address!r}")
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")

    def close(self) -> None:
        for listener in (self._tcp, self._abstract):
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join(10)


# ------------------------------------------------------------------------------------------------------ the server


@dataclass
class House:
    """A server in a process of its own."""

    data: Path
    uid: int
    process: "subprocess.Popen[str]"
    client: httpx.Client
    url: str
    key: str | None
    stdout: Path
    stderr: Path
    _notes: Any
    tokens: list[dict[str, str]] = field(default_factory=list)

    def session(self, **options: Any) -> str:
        answer = self.client.post("/sessions", json=options)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def turn(self, session_id: str, prompt: str) -> dict[str, Any]:
        answer = self.client.post(f"/sessions/{session_id}/turns", json={"prompt": prompt, "wait": True})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def bash(self, session_id: str, command: str) -> str:
        """What a Bash tool said."""
        turn = self.turn(session_id, f"[[bash: {command}]]")
        assert turn["tool_calls"], turn
        return str(turn["tool_calls"][0]["result"])

    def put(self, session_id: str, path: str, content: bytes) -> None:
        answer = self.client.put(f"/sessions/{session_id}/files/{path}", content=content)
        assert answer.status_code in (200, 201, 204), answer.text

    def get(self, session_id: str, path: str) -> bytes:
        answer = self.client.get(f"/sessions/{session_id}/files/{path}")
        assert answer.status_code == 200, answer.text
        return answer.content

    def note(self) -> list[dict[str, str]]:
        """The tokens of every sandbox so far."""
        with contextlib.suppress(BlockingIOError):
            while line := self._notes.readline():
                self.tokens.append(json.loads(line))
        return self.tokens

    def sandboxes(self) -> list[str]:
        return sorted(path.name for path in (self.data / "sandboxes").iterdir() if path.is_dir())

    def runner(self, sandbox_id: str) -> int:
        return int((self.data / "sandboxes" / sandbox_id / "lock").read_text())

    def processes(self, sandbox_id: str) -> list[int]:
        """Every process of a sandbox: those with its mark, and those in a namespace of one of them."""
        ours = os.readlink("/proc/self/ns/pid")
        marked = {pid for pid in pids() if mark_of(pid) == sandbox_id}
        spaces = {link_of(pid, "ns/pid") for pid in marked} - {ours, ""}
        return sorted(marked | {pid for pid in pids() if link_of(pid, "ns/pid") in spaces})

    def agent(self, sandbox_id: str) -> int:
        """The agent itself."""
        return next(
            pid
            for pid in self.processes(sandbox_id)
            if b"stream-json" in read_process(pid, "cmdline")
            and link_of(pid, "ns/pid") != os.readlink("/proc/self/ns/pid")
        )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def walkable(path: Path) -> bool:
    """Whether an ordinary user reaches this file."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in path.resolve().parents)


def interpreter_for_everyone(folder: Path) -> Path:
    """A Python with this one's packages that an ordinary user may run.

    This one may lie under /root. The system's, of the same version, can use the same packages; it is given them as a
    virtual environment, because the preloaded parent is started with `-I` and sees no PYTHONPATH.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    choices = [Path(sys.executable), *(Path(f"{place}/{version}") for place in ("/usr/bin", "/usr/local/bin"))]
    base = next((path for path in choices if path.exists() and walkable(path)), None)
    packages = [Path(httpx.__file__).parent.parent, Path(carrel.__file__).parent.parent]
    if base is None or not all(map(walkable, packages)):
        pytest.skip(f"needs a {version} and packages that an ordinary user may read")
    site = folder / "python/lib" / version / "site-packages"
    site.mkdir(parents=True)
    (site / "everyone.pth").write_text("\n".join(map(str, dict.fromkeys(packages))) + "\n")
    (folder / "python/bin").mkdir()
    (folder / "python/pyvenv.cfg").write_text(f"home = {base.resolve().parent}\n")
    python = folder / "python/bin/python"
    python.symlink_to(base.resolve())
    return python


@contextlib.contextmanager
def house(
    folder: Path, *, uid: int | None = None, environment: dict[str, str] | None = None, **settings: Any
) -> Iterator[House]:
    """Run a server on a data folder under `folder`, as another user where `uid` says so."""
    python, user = Path(sys.executable), []
    data = folder / "data"
    (folder / "tmp").mkdir(exist_ok=True)
    if uid is not None:
        python = interpreter_for_everyone(folder)
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        for path in (folder, folder / "tmp"):
            os.chown(path, uid, uid)
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    out, err = folder / "stdout", folder / "stderr"
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(folder / "tmp"), "LANG": "C.UTF-8"}
    env |= environment or {}
    with open(out, "w") as stdout, open(err, "w") as stderr, os.fdopen(read_end, "rb") as notes:
        process = subprocess.Popen(
            [*user, str(python), "-c", LAUNCHER, str(write_end)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=folder,
            pass_fds=[write_end],
            text=True,
        )
        os.close(write_end)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"data": str(data), "port": 0} | settings) + "\n")
        process.stdin.close()
        try:
            wait_for(lambda: (data / "server.json").exists() or process.poll() is not None, name="the server's start")
            assert process.poll() is None, err.read_text()
            url = json.loads((data / "server.json").read_text())["url"]
            key = (data / "admin.key").read_text() if (data / "admin.key").exists() else None
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            with httpx.Client(base_url=url + "/api/v1", headers=headers, timeout=90) as client:
                whose = uid if uid is not None else os.geteuid()
                run = House(data, whose, process, client, url, key, out, err, notes)
                try:
                    yield run
                finally:
                    run.stop()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(scope="session")
def open_house() -> Callable[..., "contextlib.AbstractContextManager[House]"]:
    return house


@pytest.fixture(scope="session")
def serve_app() -> Callable[[Any], "contextlib.AbstractContextManager[str]"]:
    return served


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_for


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


class Host:
    """What a test asks the host about processes."""

    link = staticmethod(link_of)
    read = staticmethod(read_process)

    def marked(self, sandbox: str | None = None) -> list[int]:
        marks = {pid: mark_of(pid) for pid in pids()}
        return [pid for pid, mark in marks.items() if mark is not None and sandbox in (None, mark)]

    def named(self, text: str) -> list[int]:
        """Live processes with this text among their arguments."""
        return [pid for pid in pids() if text.encode() in read_process(pid, "cmdline") and alive(pid)]


@pytest.fixture(scope="session")
def host() -> Host:
    return Host()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder that an ordinary user can walk to, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="carrel-walls-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------- the investigation


@dataclass
class Found:
    """What an investigation found."""

    as_root: bool
    probe: dict[str, Any] = field(default_factory=dict)
    """What the prober got hold of, by attempt."""
    host: dict[str, Any] = field(default_factory=dict)
    """What was seen from outside, by name."""
    upstream: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    model_key: str = ""
    agent_tokens: list[str] = field(default_factory=list)

    def refused(self, name: str) -> None:
        assert name in self.probe, f"{name} was never tried"
        assert self.probe[name] is None, f"{name}: {self.probe[name]}"


@pytest.fixture(scope="session", params=["root", "ordinary user"])
def found(request: pytest.FixtureRequest, require: Callable[[str], None]) -> Iterator[Found]:
    require("bubblewrap")
    as_root = request.param == "root"
    if as_root:
        require("root")
    uid = ORDINARY_USER if not as_root and os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="carrel-walls-", dir="/tmp"))
    folder.chmod(0o755)
    listener = Listener()
    key = "sk-ant-" + secrets.token_urlsafe(40)
    upstream = Upstream(key)
    try:
        with served(upstream) as url:
            yield investigate(Found(as_root, model_key=key, upstream=upstream.requests), folder, uid, url, listener)
    finally:
        listener.close()
        shutil.rmtree(folder)


def investigate(found: Found, folder: Path, uid: int | None, upstream: str, listener: Listener) -> Found:
    before = {"mounts": mounts(), "pids": set(pids())}
    found.host["core_pattern"] = Path("/proc/sys/kernel/core_pattern").read_bytes()
    with house(folder, uid=uid, model_upstream=upstream, anthropic_api_key=found.model_key) as home:
        ours, neighbour = home.session(), home.session()
        plan = make_plan(found, home, listener, ours, neighbour)
        home.put(neighbour, "plan.json", json.dumps(plan).encode())
        home.put(neighbour, "neighbour.py", (HERE / "neighbour.py").read_bytes())
        assert "the neighbour is there" in home.bash(neighbour, "python3 neighbour.py")
        assert home.bash(ours, "echo here") == "here"
        by_session = {note["session"]: note for note in home.note()}
        sandbox_of = {mark: session for session in by_session for mark in home.sandboxes() if owns(home, mark, session)}
        mine = next(sandbox for sandbox, session in sandbox_of.items() if session == ours)
        other = next(sandbox for sandbox in home.sandboxes() if sandbox != mine)
        everything = {sandbox: home.processes(sandbox) for sandbox in (mine, other)}
        runners = {sandbox: home.runner(sandbox) for sandbox in (mine, other)}
        nursery = int(read_process(runners[mine], "stat").rpartition(b")")[2].split()[1])
        plan["host_pids"] = [home.process.pid, nursery, *runners.values(), *everything[other], os.getpid()]
        hidden = {
            "model key": found.model_key,
            "admin key": home.key or "",
            "own link token": by_session[ours]["link"],
            "neighbour's link token": by_session[neighbour]["link"],
            "neighbour's agent token": by_session[neighbour]["agent"],
        }
        plan["reversed_secrets"] = {name: value.encode()[::-1].hex() for name, value in hidden.items()}
        found.agent_tokens = [note["agent"] for note in by_session.values()]
        home.put(ours, "plan.json", json.dumps(plan).encode())
        home.put(ours, "probe.py", (HERE / "probe.py").read_bytes())
        said = home.bash(ours, "python3 probe.py 2>&1")
        assert "probed" in said, said
        found.probe = json.loads(home.get(ours, "found.json"))
        found.host["visitors"] = list(listener.visitors)
        found.host["signalled"] = (data_of(home, neighbour) / "workspace/signalled").exists()
        look_at_processes(found, home, hidden, mine, other, nursery, by_session[ours]["agent"])
        look_at_modes(found, home, ours)
        stop_with_leftovers(found, home, ours, mine)
        look_at_records(found, home, hidden, [ours, neighbour])
        spaces = {link_of(pid, "ns/pid") for pid in everything[other]} - {os.readlink("/proc/self/ns/pid")}
        look_at_files(found, home, hidden)
        assert home.client.delete(f"/sessions/{ours}").status_code == 204
        home.stop()
        found.host["exit"] = home.process.returncode
        wait_for(lambda: not Path(f"/proc/{nursery}").exists(), name="the preloaded parent's end")
        left = [pid for pid in set(pids()) - before["pids"] if alive(pid)]
        found.host["left processes"] = [
            read_process(pid, "cmdline")
            for pid in left
            if mark_of(pid) in (mine, other)
            or link_of(pid, "ns/pid") in spaces
            or str(folder).encode() in read_process(pid, "cmdline")
        ]
        found.host["left sandboxes"] = home.sandboxes()
        found.host["left sockets"] = [
            str(path) for path in folder.rglob("*") if not path.is_symlink() and stat.S_ISSOCK(path.stat().st_mode)
        ]
        found.host["left mounts"] = sorted(set(mounts()) - set(before["mounts"]))
        found.host["left cgroups"] = sorted(cgroups(home.data))
        found.host["left folders"] = sorted(path.name for path in (folder / "tmp").iterdir())
        look_at_files(found, home, hidden)
    return found


def data_of(home: House, session_id: str) -> Path:
    return home.data / "sessions" / session_id


def owns(home: House, sandbox: str, session: str) -> bool:
    """Whether the sandbox works in the session's workspace: by its runner's working folder."""
    return link_of(home.runner(sandbox), "cwd") == str(data_of(home, session) / "workspace")


def make_plan(found: Found, home: House, listener: Listener, ours: str, neighbour: str) -> dict[str, Any]:
    data = home.data
    host_name = socket.gethostname()
    try:
        own_addresses = [info[4][0] for info in socket.getaddrinfo(host_name, None)]
    except OSError:
        own_addresses = []
    marker = f"carrel-neighbour-{secrets.token_hex(4)}"
    return {
        "marker": marker,
        "shm_key": secrets.randbelow(1 << 30),
        "neighbour_port": 18_765,
        "private_paths": [
            str(data),
            str(data / "admin.key"),
            str(data / "carrel.db"),
            str(data / "sandboxes"),
            str(data_of(home, neighbour) / "workspace" / (marker + "-file")),
            str(data_of(home, neighbour) / "workspace"),
            str(data_of(home, neighbour) / "home"),
            str(data_of(home, ours)),
            "/etc/shadow",
            "/root/.bashrc",
            str(HERE),
        ],
        "socket_paths": [str(data / "run/link.sock"), str(data / "run/scripted.sock"), "/var/run/docker.sock"],
        "abstract_sockets": [listener.name, marker],
        "foreign_words": [marker, "neighbour.py", "carrel.runner", str(data), "pytest"],
        "ports": [listener.port, int(home.url.rpartition(":")[2]), 18_765, 53],
        "host_addresses": sorted(set(own_addresses) - {"127.0.0.1", "::1"}),
        "good_requests": [request_text("GET", "/v1/models").hex(), message_text().hex()],
        "requests": {name: text.hex() for name, text in requests_of(listener.port).items()},
    }


def request_text(method: str, target: str, *headers: str, token: str = "x-api-key: TOKEN", body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", token, "connection: close", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("host: gateway")
    if body or method == "POST":
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([line for line in lines if line]).encode("latin-1") + b"\r\n\r\n" + body


def message_text(target: str = "/v1/messages", *headers: str) -> bytes:
    body = {"model": "claude-opus-4-5", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}
    return request_text("POST", target, "content-type: application/json", *headers, body=json.dumps(body).encode())


def requests_of(port: int) -> dict[str, bytes]:
    """Every way we know to get somewhere else through the gateway."""
    elsewhere = [
        *(
            "/",
            "/api/v1/sessions",
            "/link",
            "/metrics",
            "/health",
            "/docs",
            "/openapi.json",
            "/v1",
            "/v1/",
            "/v1/complete",
        ),
        *("/v1/files", "/v1/messages/batches", "/v1/organizations/me", "/v1/messages/", "/v1/messages/count_tokens/x"),
        *(
            "//v1/files",
            "//127.0.0.1/v1/models",
            "/v1//models",
            "/v1/models/",
            "/v1/models/../files",
            "/v1/models/a/../../files",
        ),
        *("/v1/models/..", "/v1/models/.", "/v1/models/%2e%2e", "/v1/models/%2e%2e/files", "/v1/models/..%2ffiles"),
        *(
            "/v1/models/%2e%2e%2ffiles",
            "/v1/models/..%5cfiles",
            "/v1/models/..;/files",
            "/v1/models/a%3fx=y",
            "/v1/models/a%23b",
        ),
        *(
            "/v1/models/a%0d%0aHost:%20x",
            "/v1/models/%00",
            "/v1/models/a%252f..",
            "/v1/%6dodels/../files",
            "/v1/models%2f..%2ffiles",
        ),
    ]
    found = {f"GET {path}": request_text("GET", path) for path in elsewhere}
    found |= {f"POST {path}": message_text(path) for path in elsewhere}
    found |= {
        f"{method} /v1/messages": request_text(method, "/v1/messages", body=b"{}")
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")
    }
    away = f"127.0.0.1:{port}"
    found |= {
        "absolute": request_text("GET", f"http://{away}/v1/models"),
        "absolute with path": request_text("GET", f"http://{away}/v1/files"),
        "other host": request_text("GET", "/v1/models", f"host: {away}"),
        "host with path": request_text("GET", "/v1/models", f"host: {away}/v1/files?x="),
        "host with user": request_text("GET", "/v1/models", f"host: gateway@{away}"),
        "no host": request_text("GET", "/v1/models", "host:"),
        "two hosts": request_text("GET", "/v1/models", "host: gateway", f"host: {away}"),
        "forwarded": request_text("GET", "/v1/models", f"x-forwarded-host: {away}", f"forwarded: host={away}"),
        "rewritten": request_text("GET", "/v1/models", "x-original-url: /v1/files", "x-rewrite-url: /v1/files"),
        "overridden": message_text("/v1/messages", "x-http-method-override: DELETE"),
        "connect": request_text("CONNECT", away),
        "upgrade": request_text(
            "GET",
            "/v1/models",
            "connection: upgrade",
            "upgrade: websocket",
            "sec-websocket-version: 13",
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        ),
        "upgrade elsewhere": request_text(
            "GET",
            "/link",
            "connection: upgrade",
            "upgrade: websocket",
            "sec-websocket-version: 13",
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        ),
        "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "pipelined": request_text("GET", "/v1/models").replace(b"connection: close\r\n", b"")
        + request_text("GET", "/api/v1/sessions").replace(b"connection: close\r\n", b"")
        + request_text("GET", "/v1/models", token="x-api-key: other"),
        "smuggled": b"POST /v1/messages HTTP/1.1\r\nhost: gateway\r\nx-api-key: TOKEN\r\ncontent-length: 4\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/files HTTP/1.1\r\nhost: gateway\r\nx-api-key: TOKEN\r\nconnection: close\r\n\r\n",
        "no token": request_text("GET", "/v1/models", token=""),
        "wrong token": request_text("GET", "/v1/models", token="x-api-key: cak-" + "A" * 43),
        "wrong bearer": request_text("GET", "/v1/models", token="authorization: Bearer cak-" + "A" * 43),
        "no token, message": message_text().replace(b"x-api-key: TOKEN\r\n", b""),
        "query": request_text("GET", "/v1/models?limit=1"),
    }
    return found


def look_at_processes(
    found: Found, home: House, hidden: dict[str, str], mine: str, other: str, nursery: int, own_token: str
) -> None:
    wanted = {name: value.encode() for name, value in hidden.items()}
    everywhere = wanted | {"own agent token": own_token.encode()}
    in_arguments, in_environments, looked_at = [], [], 0
    for pid in pids():
        arguments, environment = read_process(pid, "cmdline"), read_process(pid, "environ")
        looked_at += bool(arguments)
        in_arguments += [f"{name} in {arguments[:80]!r}" for name, value in everywhere.items() if value in arguments]
        in_environments += [
            f"{name} of {arguments[:80]!r}"
            for name, value in wanted.items()
            if value in environment and not (name == "neighbour's agent token" and mark_of(pid) == other)
        ]
    found.host["secrets in arguments"] = in_arguments
    found.host["secrets in environments"] = in_environments
    found.host["processes looked at"] = looked_at
    runner, inside = home.runner(mine), os.readlink(f"/proc/{home.agent(mine)}/ns/pid")
    memories: dict[str, Any] = {}
    for pid in home.processes(mine):
        where = "inside" if link_of(pid, "ns/pid") == inside else "runner" if pid == runner else "wall"
        try:
            secret, size = in_memory(pid, wanted)
        except OSError as error:
            secret, size = {f"unreadable: {error}"}, 0
        memories.setdefault(where, []).append((sorted(secret), size))
    found.host["memories"] = memories
    if os.geteuid() == 0:
        found.host["nursery memory"] = sorted(in_memory(nursery, {"model key": wanted["model key"]})[0])
        found.host["runner memory, by its own user"] = [look_as(home.uid, pid) for pid in (runner, nursery)]
    found.host["unmarked"] = [
        read_process(pid, "cmdline")
        for sandbox in (mine, other)
        for pid in [home.runner(sandbox), *home.processes(sandbox)]
        if mark_of(pid) != sandbox and alive(pid)
    ]
    found.host["marked"] = len(home.processes(mine))
    found.host["mark of the parent"] = mark_of(nursery)


def look_as(uid: int, pid: int) -> str:
    """What a process of this user sees of another: root keeps its eyes, unless it lays down what lets it see."""
    script = f"open('/proc/{pid}/mem', 'rb').read(0); open('/proc/{pid}/environ', 'rb').read(); print('open')"
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    result = subprocess.run([*drop, "/usr/bin/python3", "-c", script], capture_output=True, text=True, check=False)
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]


def look_at_modes(found: Found, home: House, session_id: str) -> None:
    paths = {"data": home.data, "admin.key": home.data / "admin.key", "sandboxes": home.data / "sandboxes"}
    paths |= {"database": home.data / "carrel.db", "session": data_of(home, session_id)}
    paths |= {"link.sock": home.data / "run/link.sock"}
    found.host["modes"] = {name: stat.S_IMODE(path.stat().st_mode) for name, path in paths.items()}
    sandbox = next((home.data / "sandboxes").glob("*-*"))
    found.host["modes"]["sandbox"] = stat.S_IMODE(sandbox.stat().st_mode)
    found.host["workspace owner"] = (data_of(home, session_id) / "workspace").stat().st_uid
    found.host["core_pattern after"] = Path("/proc/sys/kernel/core_pattern").read_bytes()


def stop_with_leftovers(found: Found, home: House, session_id: str, sandbox: str) -> None:
    """A hundred that sleep, each in a way of its own to be overlooked; then the session is stopped."""
    script = """
for i in $(seq 25); do
  setsid sleep 600 >/dev/null 2>&1 </dev/null &
  env -i nohup sleep 600 >/dev/null 2>&1 </dev/null &
  (trap "" TERM HUP INT; setsid env -i sh -c 'trap "" TERM HUP INT; while :; do sleep 600; done' >/dev/null 2>&1 </dev/null &)
  python3 -c 'import os,time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.environ.clear(); os.chdir("/"); time.sleep(600)' >/dev/null 2>&1 </dev/null &
done
wait_until() { while [ $(pgrep -c "sleep|python3") -lt 90 ]; do :; done; }
timeout 30 bash -c "$(declare -f wait_until); wait_until"
echo left
"""
    home.put(session_id, "leave.sh", script.encode())
    assert "left" in home.bash(session_id, "bash leave.sh")
    left = home.processes(sandbox)
    found.host["leftovers"] = len(left)
    space = os.readlink(f"/proc/{home.agent(sandbox)}/ns/pid")
    begun = time.monotonic()
    assert home.client.post(f"/sessions/{session_id}/stop").status_code == 200
    wait_for(lambda: not any(alive(pid) and link_of(pid, "ns/pid") == space for pid in pids()), name="the end")
    wait_for(lambda: sandbox not in home.sandboxes(), name="the end of the sandbox's folder")
    found.host["seconds to end"] = time.monotonic() - begun
    found.host["left of the stopped"] = [read_process(pid, "cmdline") for pid in left if alive(pid)]


def look_at_records(found: Found, home: House, hidden: dict[str, str], sessions: list[str]) -> None:
    events = "".join(home.client.get(f"/sessions/{each}/events?limit=1000").text for each in sessions)
    found.host["events looked at"] = len(events)
    secret = {name: value for name, value in hidden.items() if value in events}
    found.host["secrets in events"] = sorted(secret)
    digest = hashlib.sha256(hidden["own link token"].encode()).hexdigest().encode()
    found.host["database was read"] = any(digest in path.read_bytes() for path in home.data.glob("carrel.db*"))


def look_at_files(found: Found, home: House, hidden: dict[str, str]) -> None:
    """The data folder and what the server has said; done while all is there, and again when the server has ended."""
    shown = {name: value.encode() for name, value in hidden.items()}
    for path in [home.stderr, *(each for each in home.data.rglob("*") if each.is_file() and not each.is_symlink())]:
        data = path.read_bytes()
        found.host.setdefault("files looked at", []).append(path.name)
        found.host.setdefault("secrets in files", []).extend(
            f"{name} in {path}"
            for name, value in shown.items()
            if value in data
            and not (path.name == "admin.key" and name == "admin key")
            # The agent's own copy of its own token, in its own home, is what it is assumed to know.
            and not (name == "neighbour's agent token" and "home" in path.parts)
        )
