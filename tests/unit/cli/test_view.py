"""How a turn looks on the terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from carrel.cli.view import LiveView, View, describe_call, describe_result
from carrel.client.streams import FollowEvents


def frames(*chunks: bytes) -> list[Any]:
    stream = FollowEvents("http://x", "s1", after=0, deltas=True, give_up_seconds=1)
    stream.opened()
    return list(stream.feed(b"".join(chunks)))


def shown(*chunks: bytes) -> str:
    console = Console(file=io.StringIO(), highlight=False, width=40)
    with View(console) as view:
        for frame in frames(*chunks):
            view.show(frame)
    return console.file.getvalue()  # type: ignore[attr-defined]


def lively(*chunks: bytes) -> tuple[LiveView, Console]:
    console = Console(file=io.StringIO(), highlight=False, width=60, height=20, force_terminal=True)
    view = LiveView(console)
    for frame in frames(*chunks):
        view.show(frame)
    return view, console


def test_text_is_shown_as_it_comes_and_once(wire: Any) -> None:
    said = "Hello, this is longer than the terminal is wide."
    assert shown(wire.delta("Hello, "), wire.delta("this", 7), wire.said(1, said), wire.completed(2)) == f"{said}\n"


def test_text_without_deltas_is_shown_whole(wire: Any) -> None:
    assert shown(wire.said(1, "One"), wire.said(2, "[bold]Two[/]", message="m2")) == "One\n[bold]Two[/]\n"


def test_a_message_made_anew_begins_a_line(wire: Any) -> None:
    reset = wire.delta("", kind="reset")
    assert shown(wire.delta("Hel"), reset, wire.delta("Hel"), wire.said(1, "Hello")) == "Hel\nHello\n"


def test_tools(wire: Any) -> None:
    called = wire.event(1, "tool.called", id="c", tool="Bash", input={"command": "ls\n-l"})
    result = "\n".join(str(number) for number in range(9))
    finished = wire.event(2, "tool.finished", id="c", tool="Bash", result=result, is_error=False)
    assert shown(wire.delta("So"), called, finished) == (
        "So\n> Bash: ls -l\n    0\n    1\n    2\n    3\n    4\n    5\n    … 3 more lines\n"
    )


def test_a_turn_that_fails_says_why(wire: Any) -> None:
    assert shown(wire.completed(1, "failed", error={"code": "x", "message": "It broke."})) == "failed: It broke.\n"
    assert shown(wire.completed(1, "interrupted", stop_reason="interrupted")) == "interrupted: interrupted\n"


def test_a_turn_that_waits_says_so(wire: Any) -> None:
    assert shown(wire.event(1, "turn.queued", number=3, ahead=2)) == "queued behind 2\n"


def test_what_sub_agents_say_is_left_out(wire: Any) -> None:
    said = wire.event(1, "message.assistant", message_id="m", block=0, text="psst", parent_tool_use_id="c")
    assert shown(said) == ""


def test_an_agent_cannot_steer_the_terminal(wire: Any) -> None:
    evil = "\x1b[2J\x1b]0;title\x07\x9bok"
    called = wire.event(3, "tool.called", id="c", tool="Bash", input={"command": evil})
    finished = wire.event(4, "tool.finished", id="c", result=evil, is_error=True)
    text = shown(wire.delta(evil), wire.said(1, evil), called, finished, wire.completed(5, "failed", stop_reason=evil))
    assert not set(text) & {"\x1b", "\x07", "\x9b"}
    view, console = lively(wire.delta(evil))
    console.print(view._render())
    assert "\x1b]0;title" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"file_path": "/workspace/a", "content": "x"}, "T: /workspace/a"),
        ({"odd": [1, "ü"]}, 'T: {"odd": [1, "ü"]}'),
        ({"command": "x" * 999}, f"T: {'x' * 200}…"),
        ({}, "T: {}"),
    ],
)
def test_calls_in_one_line(given: dict[str, Any], text: str) -> None:
    assert describe_call({"tool": "T", "input": given}) == text


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, ""),
        ("", ""),
        ([{"type": "text", "text": "a\nb"}, {"type": "image"}], "    a\n    b\n    [image]"),
        ({"n": 1}, '    {"n": 1}'),
    ],
)
def test_results_of_every_shape(result: Any, text: str) -> None:
    assert describe_result({"result": result}) == text


def test_markdown_is_rendered_when_its_block_is_done(wire: Any) -> None:
    view, console = lively(wire.delta("# Ti"), wire.said(1, "# Title\n\n* one"), wire.completed(2, cost_usd=0.5))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Title" in text
    assert "# Title" not in text
    assert " • " in text
    assert "1 model request · $0.5000" in text
    assert view._open == {}


def test_what_is_being_made_fits_the_terminal(wire: Any) -> None:
    view, console = lively(wire.delta("\n\n".join(f"line {number}" for number in range(200))))
    console.print(view._render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "line 199" in text
    assert "line 0" not in text
    assert len(text.splitlines()) <= console.height
    assert "writing" in text
