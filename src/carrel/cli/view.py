"""Shows a turn on the terminal as it happens: plain, or with Markdown and a line of progress."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.spinner import Spinner
from rich.text import Text

from carrel.cli.output import clean, one_line
from carrel.client import Delta, Event, Frame

__all__ = ["LiveView", "View", "describe_call", "describe_result"]

_SHOWN_LINES = 6
_WIDEST_CALL = 200
_TELLING_INPUTS = ("command", "file_path", "path", "pattern", "url", "query", "description", "prompt", "skill")

Block = tuple[str, int]


def describe_call(data: dict[str, Any]) -> str:
    """A call of a tool in one line."""
    given = data.get("input") or {}
    said = next((given[name] for name in _TELLING_INPUTS if isinstance(given.get(name), str)), None)
    text = one_line(said if said is not None else json.dumps(given, ensure_ascii=False))
    return f"{data.get('tool')}: {text[:_WIDEST_CALL]}{'…' if len(text) > _WIDEST_CALL else ''}"


def describe_result(data: dict[str, Any]) -> str:
    """The first lines of a tool's result, indented."""
    lines = clean(_text_of(data.get("result"))).strip().splitlines()
    shown = [f"    {line[:_WIDEST_CALL]}" for line in lines[:_SHOWN_LINES]]
    if len(lines) > _SHOWN_LINES:
        shown.append(f"    … {len(lines) - _SHOWN_LINES} more lines")
    return "\n".join(shown)


def _text_of(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, list):
        return "\n".join(
            str(block.get("text", f"[{block.get('type')}]")) for block in result if isinstance(block, dict)
        )
    return "" if result is None else json.dumps(result, ensure_ascii=False)


class View:
    """A turn as plain text, each piece where it comes: for pipes, and for those who want it so."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[Block, int] = {}
        self._in_line = False

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_line()

    def show(self, frame: Frame) -> None:
        """Show an event or a delta. What sub-agents say among themselves is left out."""
        if isinstance(frame, Delta):
            if frame.parent_tool_use_id is None:
                self._piece(frame)
            return
        data = frame.data
        if data.get("parent_tool_use_id") is None or frame.type == "turn.completed":
            self._fact(frame, data)

    def note(self, text: str) -> None:
        """A remark of our own."""
        self._line(text, "dim")

    def _fact(self, event: Event, data: dict[str, Any]) -> None:
        match event.type:
            case "turn.queued" if data.get("ahead"):
                self.note(f"queued behind {data['ahead']}")
            case "turn.started" if data.get("attempt", 1) > 1:
                self.note("the sandbox was lost; a new one goes on")
            case "message.assistant":
                self._block((data["message_id"], data["block"]), clean(data["text"]))
            case "tool.called":
                self._call(data)
            case "tool.finished":
                self._result(data)
            case "message.system" if data.get("subtype") == "api_retry":
                self.note("the model's answer broke off; asking again")
            case "error":
                self._line(f"{data['code']}: {one_line(data['message'])}", "red")
            case "turn.completed":
                self._end(data)

    # What follows is what a view with more to show does in its own way.

    def _piece(self, delta: Delta) -> None:
        if delta.kind == "reset":
            self._end_line()
            self._shown = {block: shown for block, shown in self._shown.items() if block[0] != delta.message_id}
        elif delta.kind == "text":
            block = (delta.message_id, delta.block)
            self._write(clean(delta.text))
            self._shown[block] = self._shown.get(block, 0) + len(clean(delta.text))

    def _block(self, block: Block, text: str) -> None:
        self._write(text[self._shown.pop(block, 0) :])
        self._end_line()

    def _call(self, data: dict[str, Any]) -> None:
        self._line(f"> {describe_call(data)}", "cyan")

    def _result(self, data: dict[str, Any]) -> None:
        if text := describe_result(data):
            self._line(text, "red" if data.get("is_error") else "dim")

    def _end(self, data: dict[str, Any]) -> None:
        if data.get("status") != "succeeded":
            error = data.get("error") or {}
            reason = one_line(str(error.get("message") or data.get("stop_reason") or ""))
            self._line(f"{data.get('status')}{': ' + reason if reason else ''}", "red")

    def _write(self, text: str) -> None:
        if text:
            self._console.print(Text(text), end="", soft_wrap=True)
            self._in_line = not text.endswith("\n")

    def _line(self, text: str, style: str) -> None:
        self._end_line()
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _end_line(self) -> None:
        if self._in_line:
            self._console.print()
            self._in_line = False


class LiveView(View):
    """A turn for a person at a terminal: finished blocks as Markdown, below them what is being made."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._open: dict[Block, str] = {}
        self._doing = "starting"
        self._since = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=12, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._open:
            # Only its end: a region higher than the terminal could not be drawn over.
            room = max(self._console.height - 4, 3)
            text = list(self._open.values())[-1]
            parts.append(Markdown("\n".join(text.splitlines()[-room:])))
        seconds = int(time.monotonic() - self._since)
        self._spinner.update(text=Text(f"{self._doing}{f' ({seconds} s)' if seconds else ''}", style="dim"))
        return Group(*parts, self._spinner)

    def _now(self, doing: str) -> None:
        if doing != self._doing:
            self._doing, self._since = doing, time.monotonic()

    def _fact(self, event: Event, data: dict[str, Any]) -> None:
        if event.type == "turn.started":
            self._now("waiting for the model")
        super()._fact(event, data)

    def _piece(self, delta: Delta) -> None:
        if delta.kind == "reset":
            self._open = {block: text for block, text in self._open.items() if block[0] != delta.message_id}
            return
        self._now({"text": "writing", "thinking": "thinking"}.get(delta.kind, "calling a tool"))
        if delta.kind == "text":
            block = (delta.message_id, delta.block)
            self._open[block] = self._open.get(block, "") + clean(delta.text)

    def _block(self, block: Block, text: str) -> None:
        self._open.pop(block, None)
        self._console.print(Markdown(text))

    def _call(self, data: dict[str, Any]) -> None:
        super()._call(data)
        self._now(f"running {one_line(str(data.get('tool')))}")

    def _result(self, data: dict[str, Any]) -> None:
        super()._result(data)
        self._now("waiting for the model")

    def _end(self, data: dict[str, Any]) -> None:
        super()._end(data)
        requests = data.get("num_turns", 0)
        facts = [f"{requests} model request{'' if requests == 1 else 's'}"]
        if data.get("duration_ms") is not None:
            facts.append(f"{data['duration_ms'] / 1000:.1f} s")
        if data.get("cost_usd") is not None:
            facts.append(f"${data['cost_usd']:.4f}")
        self.note(" · ".join(facts))
