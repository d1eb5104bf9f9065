"""Runs a command again whenever Carrel's code changes; for those who work on Carrel."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

__all__ = ["newest_change", "supervise"]

_LOOK_SECONDS = 0.5


def newest_change(folder: Path) -> float:
    """When a Python file of the folder was last changed, or one removed."""
    times = [0.0]
    for path in [folder, *folder.rglob("*")]:
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            try:
                times.append(path.stat().st_mtime)
            except FileNotFoundError:  # an editor's file that came and went
                continue
    return max(times)


def supervise(arguments: Sequence[str]) -> None:
    """Run `carrel` with these arguments, and anew after each change, until it is told to end."""
    folder = Path(__file__).resolve().parent.parent
    ending = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        ending = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while not ending:
        seen = newest_change(folder)
        # In a session of its own: Ctrl-C reaches us alone, and we end it in order.
        child = subprocess.Popen([sys.executable, "-m", "carrel", *arguments], start_new_session=True)
        try:
            while not ending and newest_change(folder) <= seen:
                time.sleep(_LOOK_SECONDS)  # a child that died of a mistake waits for the mistake to be mended
        finally:
            child.terminate()
            child.wait()
