"""What the OpenAPI document promises, held against a running server by schemathesis: every check, every operation."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.slow, pytest.mark.timeout(1200)]
HERE = Path(__file__).parent
EXAMPLES = 8
OF_SESSIONS = "/(sessions|query)"


@pytest.mark.parametrize("part", ["include", "exclude"])
@pytest.mark.on_both_engines
async def test_requests_of_every_kind_are_answered_as_the_document_says(start, tmp_path, engine, part):
    """The five thousand requests of the coverage phase are about the edges of what is read, whatever rows are in."""
    phases = "examples,fuzzing" if engine else "examples,coverage,fuzzing"
    api = await start(limits={"max_concurrent_turns": 2})
    # Operations on objects are tried on ones that are there.
    session = await api.session(title="here")
    await api.run(session, "[[write: a.txt | b]]")
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "openapi.toml"), "run"]
    command += [f"{api.server.url}/openapi.json", "--header", f"Authorization: Bearer {api.server.key}"]
    command += [f"--{part}-path-regex", OF_SESSIONS]
    command += ["--checks", "all", "--phases", phases, "--max-examples", str(EXAMPLES)]
    command += [
        "--seed",
        "7",
        "--generation-database",
        "none",
        "--no-color",
        "--workers",  # of CPython 3.11, threads may not parse Python side by side, as hypothesis does (gh-106905)
        "1",
        "--request-timeout",
        "60",
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=1150, check=False
    )
    report = re.sub(r"(.)\1{100,}", r"\1…\1", done.stdout)  # bodies of a megabyte of zeros
    assert done.returncode == 0, report[-20_000:] + done.stderr[-2000:]
    document = (await api.http.get(f"{api.server.url}/openapi.json")).json()
    paths = document["paths"].items()
    operations = [len(item) for path, item in paths if bool(re.search(OF_SESSIONS, path)) is (part == "include")]
    assert len(operations) > 20
    assert f"Tested: {sum(operations)}" in done.stdout, "every operation was tried"
    log = [line for line in done.stdout.splitlines() if "Server error" in line]
    assert log == []
