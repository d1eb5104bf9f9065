"""`carrel chat`: talk with a session."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from carrel.cli.context import context_of
from carrel.cli.output import one_line
from carrel.cli.view import LiveView, View
from carrel.client import AsyncCarrel, Event, Session
from carrel.errors import CarrelError, NothingToInterrupt, ServerUnreachable
from carrel.model import SessionStatus

__all__ = ["chat"]


def chat(
    context: typer.Context,
    session: Annotated[str | None, typer.Argument(help="The session to go on with. (default: a new one)")] = None,
    model: Annotated[str | None, typer.Option(help="The model from here on.")] = None,
    title: Annotated[str | None, typer.Option(help="The title of a new session.")] = None,
    max_usd: Annotated[float | None, typer.Option(min=0, help="What the session may spend, in US dollars.")] = None,
) -> None:
    """Talk with a session. Ctrl-C interrupts the turn; a second one, or Ctrl-D, leaves.

    From a pipe every line is a prompt, and the exit code is 1 if a turn did not succeed.
    """
    person = sys.stdin.isatty()
    console = Console(highlight=False)
    with asyncio.Runner() as runner:
        talk = Talk(context_of(context).connect_async(), console, lively=person and console.is_terminal)
        try:
            runner.run(talk.open(session, model=model, title=title, max_usd=max_usd))
            well = _at_terminal(runner, talk, console) if person else _from_pipe(runner, talk)
        finally:
            runner.run(talk.close())
    if person:
        console.print(f"Go on with: carrel chat {talk.session_id}", style="dim")
    if not well:
        raise typer.Exit(1)


def _at_terminal(runner: asyncio.Runner, talk: Talk, console: Console) -> bool:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing and history

    while True:
        try:
            prompt = console.input("[bold cyan]>[/] ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return True
        if not prompt.strip():
            continue
        try:
            runner.run(talk.turn(prompt))
        except asyncio.CancelledError:
            return True
        except ServerUnreachable:
            raise
        except CarrelError as error:
            console.print(f"carrel: {one_line(error.message)}", style="red", markup=False)


def _from_pipe(runner: asyncio.Runner, talk: Talk) -> bool:
    well = True
    for prompt in _lines():
        try:
            well = runner.run(talk.turn(prompt)) and well
        except asyncio.CancelledError:
            return False
    return well


def _lines() -> Iterator[str]:
    return (line.rstrip("\n") for line in sys.stdin if line.strip())


class Talk:
    """A conversation with one session."""

    def __init__(self, carrel: AsyncCarrel, console: Console, *, lively: bool) -> None:
        self.session_id = ""
        self._carrel = carrel
        self._console = console
        self._lively = lively

    async def open(
        self, session_id: str | None, *, model: str | None, title: str | None, max_usd: float | None = None
    ) -> None:
        """Make a session, or take one up again."""
        sessions = self._carrel.sessions
        session: Session
        changes: dict[str, Any] = {} if model is None else {"model": model}
        if max_usd is not None:
            changes["budget"] = {"max_usd": max_usd}
        if session_id is None:
            session = await sessions.create(**changes, **({} if title is None else {"title": title}))
        else:
            session = await sessions.get(session_id)
            if session.status in (SessionStatus.STOPPED, SessionStatus.FAILED):
                session = await sessions.resume(session_id)
            if changes:
                session = await sessions.update(session_id, **changes)
        self.session_id = session.id
        if self._lively:
            turns = f", {session.turn_count} turns so far" if session.turn_count else ""
            name = one_line(session.title) if session.title else session.id
            self._console.print(f"{name}{turns}. Ctrl-C interrupts, Ctrl-D leaves.", style="dim", markup=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._carrel.aclose()

    async def turn(self, prompt: str) -> bool:
        """Send a prompt and show what comes of it; whether it succeeded."""
        view = LiveView(self._console) if self._lively else View(self._console)
        well = False
        with view:
            async with self._interruptible(view) as follow:
                frames = self._carrel.turns.stream(self.session_id, prompt)
                async with aclosing(frames):
                    async for frame in frames:
                        follow.turn_id = frame.turn_id or follow.turn_id
                        view.show(frame)
                        if isinstance(frame, Event) and frame.ends_turn:
                            well = frame.succeeded
        return well

    @asynccontextmanager
    async def _interruptible(self, view: View) -> AsyncIterator[_Followed]:
        """Ctrl-C asks for the end of the turn, the second one leaves it to itself."""
        followed = _Followed()
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:

            def pressed() -> None:
                followed.presses += 1
                if followed.presses == 1:
                    view.note("interrupting; once more to leave")
                    group.create_task(self._interrupt(followed.turn_id, view), name="interrupt")
                elif task is not None:
                    task.cancel()

            loop.add_signal_handler(signal.SIGINT, pressed)
            try:
                yield followed
            finally:
                loop.remove_signal_handler(signal.SIGINT)

    async def _interrupt(self, turn_id: str | None, view: View) -> None:
        try:
            await self._carrel.sessions.interrupt(self.session_id, turn_id=turn_id)
        except NothingToInterrupt:
            return  # it has ended by itself in the meantime
        except CarrelError as error:
            view.note(f"it cannot be interrupted: {one_line(error.message)}")


class _Followed:
    turn_id: str | None = None
    presses: int = 0
