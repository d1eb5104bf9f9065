"""Finds and ends the processes of a sandbox by the marks they carry."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from carrel.runtimes.view import MARK


def marked(sandbox_id: str | None = None) -> Iterator[tuple[int, str]]:
    """Every process that carries a mark (of this sandbox, if one is given): its pid and the sandbox's id."""
    prefix = f"{MARK}=".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            environ = Path(entry.path, "environ").read_bytes()
        except OSError:
            continue
        for variable in environ.split(b"\0"):
            if variable.startswith(prefix):
                found = variable[len(prefix) :].decode("utf-8", "replace")
                if sandbox_id is None or found == sandbox_id:
                    yield int(entry.name), found


def lock_held(path: Path) -> bool:
    """Whether a runner holds this lock. No pid is compared, so none can be mistaken."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def holder(path: Path) -> int | None:
    """The id of the process that holds this lock; None where nobody does."""
    try:
        return int(path.read_text()) if lock_held(path) else None
    except (OSError, ValueError):  # it is gone, or has not said its id yet
        return None


def end_holder(path: Path, *, timeout_seconds: float = 10.0) -> None:
    """Kill the process that holds this lock, and wait until it is gone."""
    deadline = time.monotonic() + timeout_seconds
    while lock_held(path) and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)
        time.sleep(0.01)


def end_marked(sandbox_id: str, *, timeout_seconds: float = 10.0) -> list[int]:
    """Kill every process that carries the sandbox's mark, and wait until none is left. Answers those that will not."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = [pid for pid, _ in marked(sandbox_id) if pid != os.getpid()]
        if not found or time.monotonic() > deadline:
            return found
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
