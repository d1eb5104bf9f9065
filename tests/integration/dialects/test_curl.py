"""The curl scripts, on a port of the dialect's own and under /compat."""

import asyncio
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


@pytest.mark.parametrize("where", ["its own port", "/compat"])
@pytest.mark.parametrize("name", ["claude-agent-http", "claudecode-api", "sdk-server"])
async def test_every_call_by_curl(serve, name, where):
    server = await serve(dialects={name: {"port": 0, "auth": "none"}})
    url = server.listeners[name] if where == "its own port" else f"{server.url}/compat/{name}"
    script = Path(__file__).with_name(f"{name}.sh")
    process = await asyncio.create_subprocess_exec(
        "bash", str(script), url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert (process.returncode, output.decode().strip()) == (0, "all as it was"), output.decode()
