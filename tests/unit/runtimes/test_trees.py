"""Trees of processes are measured by descent, and shared memory is counted once."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from carrel.abc import SandboxUsage
from carrel.runtimes.local.trees import Trees

MIB = 2**20
# A grandchild holds 60 MiB that its parent holds too, and 20 of its own; it has three threads.
TREE = """
import os, sys, threading, time
shared = os.urandom(60 << 20)
if os.fork() == 0:
    own = os.urandom(20 << 20)
    for _ in range(2):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    print("ready", flush=True)
    time.sleep(600)
time.sleep(600)
"""
ROOT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {TREE!r}])
"""


@pytest.fixture
def root() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", ROOT], stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)


def until(trees: Trees, root: int, what: Callable[[SandboxUsage], bool]) -> SandboxUsage:
    deadline = time.monotonic() + 15
    while not what(usage := trees.measure({"x": root}, memory_cap=1)["x"]):
        assert time.monotonic() < deadline, usage
        time.sleep(0.02)
    return usage


def test_a_tree_is_counted_whole_and_once(root: int) -> None:
    usage = until(Trees(), root, lambda usage: usage.processes == 4)
    assert 80 * MIB < usage.memory_bytes < 80 * MIB + 50 * MIB, "60 shared once, 20 of its own, and two interpreters"
    assert usage.cpu_seconds > 0
    assert usage.excess is None


def test_what_has_not_changed_is_not_looked_at_again(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = Trees()
    until(trees, root, lambda usage: usage.processes == 4)
    first = trees.measure({"x": root})["x"]
    monkeypatch.setattr("carrel.runtimes.local.trees._shared_out", lambda *_: 1)
    assert trees.measure({"x": root})["x"].memory_bytes == first.memory_bytes
    assert trees.measure({"x": root}, memory_cap=MIB)["x"].memory_bytes < 10, "what may be above its cap always is"


def test_a_root_that_is_gone_is_left_out() -> None:
    trees = Trees()
    assert trees.measure({"x": 2**22 + 1}) == {}
    assert trees.measure({}) == {}
    assert trees.known == {}
