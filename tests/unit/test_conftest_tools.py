"""The strict fixtures of `tests/conftest.py` are able to fail: each runs here over a small suite of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = (Path(__file__).resolve().parents[1] / "conftest.py").read_text(encoding="utf-8")
SLEEP = "import subprocess, sys\nSLEEP = [sys.executable, '-c', 'import time; time.sleep(60)']\n"


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs a suite of one file under our conftest, with a short grace time, and answers its result."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # to load them all costs a second each time

    def run_suite(source: str) -> pytest.RunResult:
        pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
        pytester.makeconftest(CONFTEST.replace("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.3"))
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess(
            "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider", "--strict-markers", "-rsfE", "--tb=short"
        )

    return run_suite


def test_a_tidy_suite_passes(run):
    result = run(
        SLEEP
        + """
import asyncio, shutil, tempfile

def test_sync(tmp_path):
    process = subprocess.Popen(SLEEP, cwd=tmp_path)
    process.kill()
    process.wait()
    shutil.rmtree(tempfile.mkdtemp(prefix="carrel-"))

async def test_async():
    process = await asyncio.create_subprocess_exec(*SLEEP)
    process.kill()
    await process.wait()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(0))

async def test_a_task_on_its_way_out():
    asyncio.create_task(asyncio.sleep(0.05))
"""
    )
    result.assert_outcomes(passed=3)


def test_a_child_left_running_fails_and_is_ended(run):
    result = run(
        SLEEP
        + """
def test_it(tmp_path):
    global process
    process = subprocess.Popen(SLEEP, env={"CARREL_SANDBOX": "abc"})

def test_the_next_one_does_not_suffer():
    assert process.poll() is not None
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*left behind*", "*process *time.sleep(60)* CARREL_SANDBOX=abc"])


def test_a_child_that_nobody_waited_for_fails(run):
    result = run(
        """
import os

def test_it():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*process *never waited for*"])


ORPHANS = {
    "working folder": "cwd=tmp_path, env={}",
    "environment": "cwd='/', env={'HOME': f'{tmp_path}/home'}",
    "a mark of its own": "cwd='/', env={'CARREL_SANDBOX': 'sb_17'}",
}


@pytest.mark.parametrize("bears", ORPHANS.values(), ids=ORPHANS.keys())
def test_an_orphan_is_known_by_what_it_bears(run, bears):
    result = run(
        SLEEP
        + f"""
import os

def test_it(tmp_path, no_leaks):
    no_leaks.mark("CARREL_SANDBOX=sb_17")
    parent = os.fork()
    if parent == 0:
        subprocess.Popen(SLEEP, start_new_session=True, {bears})
        os._exit(0)
    os.waitpid(parent, 0)
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*process *time.sleep(60)*"])


@pytest.mark.requires("bubblewrap")
def test_an_orphan_in_a_sandbox_is_known_by_its_mounts(run):
    result = run(
        """
import os, subprocess, time

SANDBOX = ["bwrap", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
SANDBOX += ["--symlink", "usr/lib64", "/lib64", "--dev", "/dev", "--clearenv"]

def test_it(tmp_path):
    (tmp_path / "files").mkdir()
    script = "setsid sleep 60 >/dev/null 2>&1 & echo started"
    command = [*SANDBOX, "--bind", tmp_path / "files", "/workspace", "--chdir", "/workspace", "/bin/sh", "-c", script]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"started\\n"
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*process *sleep 60*"])


def test_processes_of_others_are_nobodys_leak(run):
    """They start while the test runs, but neither descend from it nor bear its marks."""
    result = run(
        SLEEP
        + """
import os

def test_it():
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        stranger = subprocess.Popen(SLEEP, start_new_session=True, cwd="/", env={"CARREL_SANDBOX": "another run's"})
        os.write(write, str(stranger.pid).encode())
        os._exit(0)
    os.waitpid(parent, 0)
    with open("stranger", "w") as file:
        file.write(os.read(read, 20).decode())
    os.close(read), os.close(write)
"""
    )
    os.kill(int(Path("stranger").read_text()), 9)
    result.assert_outcomes(passed=1)


def test_what_a_wider_fixture_leaves_is_found_at_the_end(run):
    result = run(
        SLEEP
        + """
import os, pytest

@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    parent = os.fork()
    if parent == 0:
        subprocess.Popen(SLEEP, start_new_session=True, cwd=folder, env={})
        os._exit(0)
    os.waitpid(parent, 0)

def test_one():
    pass

def test_two():
    pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_two*", "*left behind*"])


def test_a_temporary_folder_left_fails(run):
    result = run(
        """
import tempfile

def test_it():
    tempfile.mkdtemp(prefix="carrel-demo-")
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*folder */tmp/carrel-demo-*"])


def test_a_task_left_fails(run):
    result = run(
        """
import asyncio

async def test_it():
    globals()["task"] = asyncio.create_task(asyncio.sleep(60), name="the-pump")
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left tasks behind: the-pump (sleep)*"])


def test_tasks_that_a_fixture_ends_are_no_leak(run):
    result = run(
        """
import asyncio, contextlib, pytest

@pytest.fixture
async def pump():
    task = asyncio.create_task(asyncio.sleep(60))
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

async def test_it(pump):
    pass
"""
    )
    result.assert_outcomes(passed=1)


@pytest.mark.slow
def test_a_blocked_loop_fails_unless_the_test_says_why(run):
    result = run(
        """
import time, pytest

async def test_blocks():
    time.sleep(1)

@pytest.mark.blocks_loop("to show that it may")
async def test_may_block():
    time.sleep(1)

def test_has_no_loop():
    time.sleep(1)

async def test_is_quick():
    time.sleep(0.05)
"""
    )
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["*event loop was blocked: * s in <Task *test_blocks*"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="needs a kernel with schedstat")
def test_a_busy_machine_blames_nobody(run):
    """The loop's thread waits for its processor most of the time, because others want the same one."""
    result = run(
        """
import os, subprocess, sys, time

async def test_starved():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(4)]
    try:
        start = time.thread_time()
        while time.thread_time() - start < 0.25:
            pass
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()
"""
    )
    result.assert_outcomes(passed=1)


REQUIRING = """
import pytest

@pytest.fixture(scope="module")
def part():
    raise RuntimeError("the part is not there")

@pytest.mark.requires("absent")
def test_marked(part):
    pass

def test_called(require):
    require("absent")

@pytest.mark.requires("present")
def test_present():
    pass
"""
TWO_PARTS = """
PARTS["absent"] = Part(lambda: False, "an unobtainable thing")
PARTS["present"] = Part(lambda: True, "")
"""


@pytest.mark.parametrize(("required", "outcomes"), [("", {"skipped": 2}), ("docker, absent", {"failed": 2})])
def test_a_missing_part_skips_with_its_remedy_or_fails(run, monkeypatch, required, outcomes):
    monkeypatch.setattr(sys.modules[__name__], "CONFTEST", CONFTEST + TWO_PARTS)
    monkeypatch.setenv("CARREL_REQUIRE", required)

    result = run(REQUIRING)

    found = result.parseoutcomes()
    unmet = {"skipped": found.get("skipped", 0), "failed": found.get("failed", 0) + found.get("errors", 0)}
    assert {kind: count for kind, count in unmet.items() if count} == outcomes
    assert found["passed"] == 1
    result.stdout.fnmatch_lines(["*needs an unobtainable thing*"])


def test_a_test_that_starts_nothing_pays_little(no_leaks):
    import time

    start = time.perf_counter()
    for _ in range(10):
        no_leaks.verify()
    assert (time.perf_counter() - start) / 10 < 0.01


def test_temporary_folders_of_children_are_this_runs_own(tmp_path_factory):
    where = subprocess.run(
        [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == tmp_path_factory.getbasetemp() / "tmp"
