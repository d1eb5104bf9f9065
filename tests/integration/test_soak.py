"""A minute of the soak: twenty users at the limit, and nothing is left behind."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.cli,
    pytest.mark.requires("bubblewrap"),
    pytest.mark.slow,
    pytest.mark.timeout(420),
]
ROOT = Path(__file__).parents[2]


async def test_a_minute_of_twenty_users_leaves_nothing_behind():
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "1", "--no-results"]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Nothing has leaked, nothing failed." in done.stdout
