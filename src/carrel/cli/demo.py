"""`carrel demo`: the whole thing in a temporary folder, with the scripted model."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from carrel.cli.context import context_of
from carrel.cli.view import View
from carrel.client import AsyncCarrel, Delta, Event, Session, TurnResult
from carrel.client.results import result_of_events
from carrel.errors import DemoFailed, IsolationUnavailable
from carrel.model import Isolation, SessionStatus
from carrel.settings import Settings

__all__ = ["demo"]

_LONGEST_SECONDS = 180
_IDLE_SECONDS = 1.0
_FILE = "greet.sh"
_CONTENT = 'echo "Hello from $(basename "$PWD"), $((6 * 7)) times."'


def demo(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Show it, end, and leave nothing behind.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port. (default: any free one)")] = 0,
) -> None:
    """Show a whole session with the scripted model, then stay up to play with. Needs no credential."""
    from carrel.cli import seen

    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="carrel-demo-") as folder:
        settings = context_of(context).settings(
            overrides={
                "data": Path(folder),
                "host": "127.0.0.1",
                "port": port,
                "auth": "key",
                "model_upstream": "scripted",
                "isolation": _isolation(console),
                "idle_timeout_seconds": _IDLE_SECONDS,
                "log_level": "error",
            }
        )
        seen.configure_logs(settings)
        try:
            asyncio.run(_demo(settings, console, once=once))
        except (asyncio.CancelledError, KeyboardInterrupt):  # told to end: by SIGTERM, or by Ctrl-C
            raise typer.Exit(1 if once else 0) from None


def _isolation(console: Console) -> Isolation | None:
    """As the settings say; but where bubblewrap is missing the demo goes on without."""
    from carrel.runtimes.local import isolation

    try:
        isolation.choose(None)
    except IsolationUnavailable as error:
        console.print(f"Not isolated here: {error.message}\n", style="yellow", markup=False)
        return Isolation.NONE
    return None


async def _demo(settings: Settings, console: Console, *, once: bool) -> None:
    from carrel.auth import AdminKey
    from carrel.cli import server

    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    AdminKey.load(settings.data / "admin.key")  # made here, so that the server does not announce it
    started = time.monotonic()
    async with server.running(settings) as running, AsyncCarrel(running.url, running.key) as carrel:
        console.print(f"Carrel is up at {running.url} after {time.monotonic() - started:.1f} s.", style="dim")
        try:
            async with asyncio.timeout(_LONGEST_SECONDS):
                session = await Show(carrel, console).run()
        except TimeoutError:
            raise DemoFailed(f"The demo did not come to its end within {_LONGEST_SECONDS} seconds.") from None
        if once:
            console.print("\nAll of it came out as it should.", style="green")
            return
        _say_how_to_go_on(console, running.url, running.key or "", session)
        await asyncio.Event().wait()


class Show:
    """What the demo shows, step by step; each step checks what came of it."""

    def __init__(self, carrel: AsyncCarrel, console: Console) -> None:
        self._carrel = carrel
        self._console = console
        self._session_id = ""

    async def run(self) -> Session:
        """Show everything; answers the session it was shown with.

        Raises:
            DemoFailed: something did not come out as it should.
        """
        # Where nothing isolates the agent, these tools are allowed by name.
        session = await self._carrel.sessions.create(title="Demo", allowed_tools=["Bash", "Read", "Write"])
        self._session_id = session.id
        await self._streams()
        await self._works()
        await self._sleeps()
        await self._remembers()
        return await self._carrel.sessions.get(session.id)

    async def _streams(self) -> None:
        self._step("It streams: twenty words, twenty a second.")
        numbers = " ".join(str(number) for number in range(1, 21))
        result, deltas = await self._turn("[[count: 20 @20]]")
        self._check(result.text.split() == numbers.split(), f"the text was {result.text!r}")
        self._check(deltas >= 5, f"only {deltas} deltas came")

    async def _works(self) -> None:
        self._step("It works: writes a file and runs it.")
        result, _ = await self._turn(f"[[write: {_FILE} | {_CONTENT}]] [[bash: sh {_FILE}]]")
        self._check([call.tool for call in result.tool_calls] == ["Write", "Bash"], "the tools were not called")
        self._check("42 times" in str(result.tool_calls[-1].result), "the file did not run as written")
        content = await self._carrel.files.read(self._session_id, _FILE)
        self._check(content.decode().strip() == _CONTENT.strip(), "the file is not in the workspace as written")

    async def _sleeps(self) -> None:
        self._step(f"It sleeps: after {_IDLE_SECONDS:g} s without work the process is gone (600 s by default).")
        session = await self._carrel.sessions.get(self._session_id)
        if session.status != SessionStatus.IDLE:
            frames = self._carrel.events.follow(self._session_id, after=session.last_seq)
            async with aclosing(frames):
                async for frame in frames:
                    if isinstance(frame, Event) and frame.data.get("status") == SessionStatus.IDLE:
                        break
        self._console.print("idle: no process, no cost")

    async def _remembers(self) -> None:
        self._step("It remembers: the next prompt wakes it, with its conversation and its files.")
        result, _ = await self._turn("Which turn is this?")
        self._check("3" in result.text, f"it does not know that this is the third turn: {result.text!r}")
        result, _ = await self._turn(f"[[bash: cat {_FILE}]]")
        self._check("6 * 7" in str(result.tool_calls[-1].result), "the file is gone")

    async def _turn(self, prompt: str) -> tuple[TurnResult, int]:
        self._console.print(f"> {prompt}", style="bold", markup=False, soft_wrap=True)
        events: list[Event] = []
        deltas = 0
        frames = self._carrel.turns.stream(self._session_id, prompt, timeout_seconds=60)
        async with aclosing(frames):
            with View(self._console) as view:
                async for frame in frames:
                    view.show(frame)
                    deltas += isinstance(frame, Delta)
                    if isinstance(frame, Event):
                        events.append(frame)
        result = result_of_events(self._session_id, events)
        reason = result.error.message if result.error else f"the turn ended {result.status}"
        self._check(events[-1].succeeded, reason)
        return result, deltas

    def _step(self, text: str) -> None:
        self._console.print(f"\n{text}", style="bold cyan", markup=False)

    def _check(self, well: bool, what: str) -> None:
        if not well:
            raise DemoFailed(f"The demo failed: {what}.")


def _say_how_to_go_on(console: Console, url: str, key: str, session: Session) -> None:
    curl = (
        f"curl -N {url}/api/v1/sessions/{session.id}/turns \\\n"
        f"  -H 'Authorization: Bearer {key}' -H 'Accept: text/event-stream' \\\n"
        '  --json \'{"prompt": "Hello again"}\''
    )
    console.print(f"\nIt stays up at {url} until Ctrl-C ({url}/docs shows the API). Go on with it:\n", style="green")
    sys.stdout.write(f"{curl}\n\ncarrel --url {url} --key {key} chat {session.id}\n")
    sys.stdout.flush()
