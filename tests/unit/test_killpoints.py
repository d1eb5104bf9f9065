"""Named places at which a process is ended."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import carrel
from carrel import killpoints

SOURCE = Path(carrel.__file__).parent


def in_a_process(code: str) -> int:
    """Arming cannot be undone, so each try has a process of its own."""
    command = [sys.executable, "-I", "-c", f"from carrel.killpoints import arm, reached\n{code}"]
    return subprocess.run(command, check=False, timeout=20, capture_output=True).returncode


def test_unarmed_points_do_nothing() -> None:
    for point in killpoints.POINTS:
        killpoints.reached(point)


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("arm('bind.sent'); reached('bind.sent')", -signal.SIGKILL),
        ("arm('bind.sent', 3); reached('bind.sent'); reached('bind.sent')", 0),
        ("arm('bind.sent', 3)\nfor _ in range(3): reached('bind.sent')", -signal.SIGKILL),
        ("arm('bind.sent'); reached('frames.stored')", 0),
        ("arm('no.such')", 1),
    ],
)
def test_an_armed_point_kills_at_its_visit(code: str, result: int) -> None:
    assert in_a_process(code) == result


def test_an_unknown_point_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"there are .*frames\.stored"):
        killpoints.arm("no.such")


def test_every_point_is_reached_somewhere_and_no_other() -> None:
    text = "\n".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name != "killpoints.py")
    reached = set(re.findall(r'\breached\("([\w.]+)"\)', text))
    assert reached <= killpoints.POINTS
    # The hub reaches these two by the event's own type.
    assert killpoints.POINTS - reached == {"tool.called", "tool.finished"}
