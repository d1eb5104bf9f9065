"""What the OpenAPI document promises, held against a running server by schemathesis: every check, every operation."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
EXAMPLES = 8


@pytest.mark.on_both_engines
async def test_requests_of_every_kind_are_answered_as_the_document_says(start, tmp_path):
    api = await start(limits={"max_concurrent_turns": 2})
    # Operations on objects are tried on ones that are there.
    session = await api.session(title="here")
    await api.run(session, "[[write: a.txt | b]]")
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "openapi.toml"), "run"]
    command += [f"{api.server.url}/openapi.json", "--header", f"Authorization: Bearer {api.server.key}"]
    command += ["--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES)]
    command += [
        "--seed",
        "7",
        "--generation-database",
        "none",
        "--no-color",
        "--workers",
        "2",
        "--request-timeout",
        "60",
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    document = (await api.http.get(f"{api.server.url}/openapi.json")).json()
    operations = sum(len(item) for item in document["paths"].values())
    assert f"Tested: {operations}" in done.stdout, "every operation was tried"
    log = [line for line in done.stdout.splitlines() if "Server error" in line]
    assert log == []
