"""The command line as people run it: processes, pipes, a terminal, and a server that dies."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from carrel.client import AsyncCarrel, Delta, Event

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]

ROOT = Path(__file__).resolve().parents[2]
CARREL = (sys.executable, "-m", "carrel")
SECONDS = 90


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CARREL_", "ANTHROPIC_"))}
    return own | {"TERM": "xterm", "PYTHONUNBUFFERED": "1"} | more


@asynccontextmanager
async def process(*command: str | Path, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    options = {"stdin": asyncio.subprocess.DEVNULL, "env": environment()} | options
    started = await asyncio.create_subprocess_exec(*map(str, command), **options)
    try:
        yield started
    finally:
        if started.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                started.kill()
            await started.wait()


async def ran(*command: str | Path, stdin: str = "", **env: str) -> tuple[int | None, str, str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    async with process(*command, **pipes, env=environment(**env)) as started, asyncio.timeout(SECONDS):
        out, err = await started.communicate(stdin.encode())
    return started.returncode, out.decode(), err.decode()


async def until(what: str, check: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)
    return found


def temporary() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).iterdir()}


async def test_the_demo_shows_everything_and_leaves_nothing():
    before = temporary()
    code, out, err = await ran(*CARREL, "demo", "--once")
    assert code == 0, out + err
    for sign in ("1 2 3 4 5 6 7 8 9 10", "Hello from workspace, 42 times.", "turn 3", "All of it came out"):
        assert sign in out
    assert "Traceback" not in err
    assert temporary() == before


async def test_a_demo_that_goes_wrong_says_so():
    before = temporary()
    code, out, err = await ran(*CARREL, "demo", "--once", CARREL_CLI_PATH="/bin/false")
    assert code == 1, out + err
    assert err.splitlines()[-1].startswith("carrel: The demo failed: ")
    assert temporary() == before


async def test_the_demo_stays_up_and_its_curl_line_works(tmp_path):
    before = temporary()
    out = tmp_path / "out"
    with out.open("wb") as file:
        # Whoever runs these tests in the background may have told them to ignore Ctrl-C, and so their children.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started = process(*CARREL, "demo", stdout=file, stderr=file, preexec_fn=heard)
        async with started as demo, asyncio.timeout(SECONDS):
            await until("the demo says how to go on", lambda: " chat " in out.read_text(), SECONDS)
            line = out.read_text().partition("curl -N")[2].partition("\n\n")[0]
            code, streamed, err = await ran("sh", "-c", f"curl -sN{line}")
            assert code == 0, err
            assert 'Hello again\\"' in streamed
            assert "event: turn.completed" in streamed
            demo.send_signal(signal.SIGINT)
            assert await demo.wait() == 0
    assert temporary() == before


async def test_a_chat_through_pipes(start, tmp_path):
    await start()
    data = tmp_path / "data"
    code, out, err = await ran(*CARREL, "--data", data, "chat", stdin="Hello\n\n[[bash: echo $((6 * 7))]]\n")
    assert (code, err) == (0, "")
    assert 'This is turn 1 of our conversation. You said: "Hello"\n> Bash: echo $((6 * 7))\n    42\n' in out
    _, listed, _ = await ran(*CARREL, "--data", data, "sessions", "list", "--json")
    [session] = json.loads(listed)
    code, out, _ = await ran(*CARREL, "--data", data, "chat", session["id"], stdin="And now?")
    assert (code, out) == (0, 'This is turn 3 of our conversation. You said: "And now?"\n')


async def test_sessions_are_shown_stopped_exported_and_deleted(start, tmp_path):
    api = await start()
    session = await api.session(title="Of the test")
    await api.run(session, "Hello")
    command = (*CARREL, "--data", tmp_path / "data", "sessions")
    assert "Of the test" in (await ran(*command, "list"))[1]
    assert "succeeded" in (await ran(*command, "show", session))[1]
    assert (await ran(*command, "export", session, "--output", tmp_path / "export"))[0] == 0
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "export").read_text().split("\n") if line}
    assert kinds == {"session", "turn", "event", "transcript"}
    assert (await ran(*command, "stop", session))[1] == f"{session}  stopped\n"
    assert (await ran(*command, "delete", session))[:2] == (0, f"{session}  deleted\n")
    assert (await ran(*command, "show", session)) == (1, "", "carrel: There is no session with this id.\n")


class Terminal:
    """A process that has a terminal, and a person at it."""

    def __init__(self, keyboard: int) -> None:
        self._keyboard = keyboard
        self.screen = ""
        asyncio.get_running_loop().add_reader(keyboard, self._read)

    def _read(self) -> None:
        try:
            self.screen += os.read(self._keyboard, 65536).decode(errors="replace")
        except OSError:  # the process has ended, and the terminal with it
            asyncio.get_running_loop().remove_reader(self._keyboard)

    async def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    async def shows(self, text: str) -> None:
        """Wait until this is shown; what was shown up to there is forgotten."""
        deadline = time.monotonic() + 30
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} is not shown in {self.screen!r}"
            await asyncio.sleep(0.02)
        self.screen = self.screen.partition(text)[2]


@asynccontextmanager
async def at_terminal(*command: str | Path) -> AsyncIterator[tuple[Terminal, asyncio.subprocess.Process]]:
    keyboard, side = os.openpty()
    try:
        options = {"stdin": side, "stdout": side, "stderr": side, "preexec_fn": lambda: os.login_tty(side)}
        async with process(*command, **options) as started, asyncio.timeout(SECONDS):
            terminal = Terminal(keyboard)
            yield terminal, started
            await started.wait()
    finally:
        asyncio.get_running_loop().remove_reader(keyboard)
        os.close(keyboard)
        os.close(side)


async def test_a_chat_at_a_terminal(start, tmp_path):
    api = await start()
    session = await api.session(title="At a terminal")
    async with at_terminal(*CARREL, "--data", tmp_path / "data", "chat", session) as (terminal, chat):
        await terminal.shows("At a terminal")
        await terminal.type("[[say: Some *Markdown*]]\r")
        await terminal.shows("Markdown\x1b[0m")
        await terminal.shows("1 model request")
        await terminal.type("[[count: 100000 @20]]\r")
        await terminal.shows("7 8 9")
        await terminal.type("\x03")
        await terminal.shows("interrupting")
        await terminal.shows("interrupted")
        await terminal.type("Which turn?\r")
        await terminal.shows("This is turn 3")
        await terminal.shows(">\x1b[0m ")
        await terminal.type("\x04")
        assert await chat.wait() == 0
    turns = (await api.ask("GET", f"/sessions/{session}/turns"))["data"]
    assert [turn["status"] for turn in turns] == ["succeeded", "interrupted", "succeeded"]


async def test_the_second_interrupt_leaves_a_chat(start, tmp_path):
    api = await start()
    async with at_terminal(*CARREL, "--data", tmp_path / "data", "chat") as (terminal, chat):
        await terminal.shows("Ctrl-D leaves")
        await terminal.type("[[bash: trap '' INT TERM; sleep 20]]\r")
        await terminal.shows("running Bash")
        await terminal.type("\x03")
        await terminal.shows("interrupting")
        await terminal.type("\x03")
        assert await chat.wait() == 0
    [session] = (await api.ask("GET", "/sessions"))["data"]
    await api.ask("DELETE", f"/sessions/{session['id']}")


async def test_the_examples_work(start):
    api = await start()
    key = (await api.ask("POST", "/keys", json={"user": "alice"}))["key"]
    user = {"CARREL_URL": api.server.url, "CARREL_KEY": key}
    code, out, err = await ran(sys.executable, ROOT / "examples" / "quickstart.py", **user)
    assert (code, err) == (0, "")
    assert "(Write)\n" in out
    assert "succeeded: Result: Hello from the sandbox\n" in out
    assert re.search(r"^claude-\S+: 4 requests, \$0\.[0-9]{4}$", out, re.MULTILINE)
    assert "left of the session's budget: $4." in out
    code, out, err = await ran(ROOT / "examples" / "stream.sh", 'Say\t"Hi"\n\\o/\n', **user)
    assert (code, err) == (0, "")
    assert "event: turn.completed" in out
    prompt = next(json.loads(line[6:]) for line in out.splitlines() if '"message.user"' in line and line[0] == "d")
    assert prompt["data"]["content"][0]["text"] == 'Say\t"Hi"\n\\o/\n'
    assert re.search(r"^claude-\S+,1,", out, re.MULTILINE)
    assert (await api.ask("GET", "/sessions"))["data"] == []
    usage = (await api.ask("GET", "/usage", params={"group_by": "user"}))["data"]
    assert [(row["user"], row["requests"]) for row in usage] == [("alice", 5)]
    code, out, err = await ran(ROOT / "examples" / "stream.sh", CARREL_URL=api.server.url, CARREL_KEY="wrong")
    assert code != 0
    assert "A valid key is required" in err


@asynccontextmanager
async def serving(data: Path, port: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    address = data / "server.json"
    address.unlink(missing_ok=True)
    command = (*CARREL, "serve", "--data", data, "--port", str(port), "--model-upstream", "scripted")
    log = data.parent / "log"
    with log.open("ab") as file:
        async with process(*command, stdout=file, stderr=file) as server:

            def is_up() -> bool:
                assert server.returncode is None, log.read_text()
                return address.exists() and address.read_text().endswith("}")

            await until("the server is up", is_up)
            yield server, json.loads(address.read_text())["url"]


async def test_a_client_does_not_notice_that_the_server_was_killed(tmp_path, no_leaks):
    data = tmp_path / "data"
    data.mkdir()
    shown, seqs = "", []
    async with contextlib.AsyncExitStack() as stack:
        server, url = await stack.enter_async_context(serving(data, 0))
        port = int(url.rpartition(":")[2])
        carrel = await stack.enter_async_context(AsyncCarrel(url, (data / "admin.key").read_text()))
        session = await carrel.sessions.create()
        killed = False
        frames = carrel.turns.stream(session.id, "[[bash: echo once >> log]] [[count: 40 @20]]")
        async for frame in frames:
            if isinstance(frame, Event):
                seqs.append(frame.seq)
                if frame.type == "tool.called":
                    shown = ""
            elif frame.kind == "reset":
                shown = ""
            elif frame.kind == "text":
                shown += frame.text
            if isinstance(frame, Delta) and "10" in shown and not killed:
                killed = True
                server.kill()
                await server.wait()
                server, _ = await stack.enter_async_context(serving(data, port))
        assert killed, (shown, seqs, frame)
        assert frame.succeeded
        stored = await carrel.events.list(session.id, limit=1000)
        turn_id = frame.turn_id
        assert seqs == [event.seq for event in stored if event.turn_id == turn_id]
        counted = " ".join(map(str, range(1, 41)))
        assert shown == f"{counted} Result: (Bash completed with no output)"
        assert (await carrel.files.read(session.id, "log")) == b"once\n"
        assert "turn 2" in (await carrel.turns.run(session.id, "Which turn?")).text
        server.terminate()
        assert await server.wait() == 0
    assert not (data / "server.json").exists()
