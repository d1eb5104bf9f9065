"""The images as they are shipped, started on a real engine: what is in them, and how far one variable alone carries.

An agent that needs a model gets the scripted one, over the host's loopback.
"""

import asyncio
import json
import os
import re
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from carrel import __version__
from carrel.client import AsyncCarrel
from carrel.model_gateway.scripted import create_app

pytestmark = [pytest.mark.requires("docker", "images"), pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SANDBOX, GATEWAY = f"carrel-sandbox:{__version__}", f"carrel-gateway:{__version__}"
ANY_USER = ("--user", "4242:4242")
OFFLINE = ("--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
CREDENTIALS = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_SESSION")


def docker(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *args], input=stdin, capture_output=True, text=True, check=False, timeout=240)


def run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """A container that ends with its command."""
    name = f"carrel-test-images-{secrets.token_hex(6)}"
    try:
        return docker("run", "--rm", "--interactive", "--name", name, *args, stdin=stdin)
    except subprocess.TimeoutExpired:
        docker("rm", "--force", name)
        raise


def inspect(image: str) -> dict[str, Any]:
    found = json.loads(docker("image", "inspect", image).stdout)
    assert isinstance(found, list)
    return dict(found[0])


@pytest.fixture
async def model() -> AsyncIterator[tuple[str, ...]]:
    """The scripted model, as options of `docker run`."""
    config = uvicorn.Config(create_app(), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(), name="scripted model")
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    quiet = ("--env", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1")
    yield ("--init", "--network", "host", *quiet, "--env", f"ANTHROPIC_BASE_URL=http://127.0.0.1:{port}")
    server.should_exit = True
    await serving


# ---------------------------------------------------------------------------------------------------------------
# What is in them


@pytest.mark.parametrize("image", [SANDBOX, GATEWAY])
def test_labels_user_and_health_check(image: str) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "1000:1000"
    assert config["Healthcheck"]["Test"][0] == "CMD-SHELL"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.title"] == image.partition(":")[0]
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert {"org.opencontainers.image.revision", "org.opencontainers.image.created"} <= labels.keys()


def test_the_gateway_is_a_thin_layer_over_the_sandbox() -> None:
    sandbox, gateway = inspect(SANDBOX), inspect(GATEWAY)
    layers = sandbox["RootFS"]["Layers"]
    assert gateway["RootFS"]["Layers"][: len(layers)] == layers
    assert gateway["Size"] - sandbox["Size"] < 1_000_000


def test_tools_for_any_user_without_network_on_a_read_only_root() -> None:
    script = """
        set -e
        for tool in claude git gh rg jq node npm tsc python3 pip curl sqlite3 carrel \\
                mcp-server-filesystem mcp-server-github mcp-server-postgres mcp-server-sqlite playwright-mcp; do
            command -v $tool >/dev/null || echo "missing: $tool"
        done
        python3 -I -c 'import sys, claude_agent_sdk, carrel; print("python", sys.version_info[:2], carrel.__version__)'
        cd /tmp && echo 'import("@anthropic-ai/claude-agent-sdk").then(sdk => console.log(typeof sdk.query))' >t.mjs
        node t.mjs
        readlink -f /node_modules/@anthropic-ai/claude-agent-sdk-linux-*/claude $(command -v claude)
        find / -xdev -type f -size +150M 2>/dev/null || true
        jq --raw-output .version /node_modules/@anthropic-ai/claude-agent-sdk/manifest.json
        claude --version
    """
    done = run(*OFFLINE, *ANY_USER, SANDBOX, "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stdout
    python, query, by_node, by_path, large, sdks_cli, cli = done.stdout.splitlines()
    assert python == f"python (3, 13) {__version__}"
    assert query == "function"
    assert by_node == by_path == large  # one copy, and no other file of its size
    assert cli == f"{sdks_cli} (Claude Code)"  # both SDKs were made for it


def test_mcp_servers_of_the_presets_answer_without_network() -> None:
    servers = {
        "mcp-server-filesystem /workspace": "read_text_file",
        "mcp-server-sqlite --db-path /tmp/notes.db": "read_query",
        "mcp-server-github": "create_issue",
        "mcp-server-postgres postgres://127.0.0.1/nothing": "query",
        "playwright-mcp --headless": "browser_navigate",
    }
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
    ]
    asked = "\\n".join(json.dumps(line) for line in lines)
    # Each is held open until its second answer, however long that takes, and then let go.
    script = "\n".join(
        f"""
        mkfifo /tmp/in; {server} </tmp/in 2>/dev/null | while read -r line; do
            echo "$line"; case $line in *'"id":2'*) kill $(cat /tmp/feeder);; esac
        done & exec 3>/tmp/in
        sleep 120 3>&- & echo $! >/tmp/feeder; printf '{asked}\\n' >&3
        wait $(cat /tmp/feeder); exec 3>&-; wait; rm /tmp/in
        """
        for server in servers
    )
    done = run("--init", *OFFLINE, *ANY_USER, SANDBOX, "bash", "-c", script)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    listed = [[tool["name"] for tool in answer["result"]["tools"]] for answer in answers if answer.get("id") == 2]
    assert len(listed) == len(servers), done.stderr
    for tool, tools in zip(servers.values(), listed, strict=True):
        assert tool in tools


@pytest.mark.requires("browser-image")
def test_the_browser_is_driven_within_a_sandboxs_walls() -> None:
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    page = {"name": "browser_navigate", "arguments": {"url": "data:text/html,<title>There</title>"}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": page},
    ]
    asked = "".join(json.dumps(line) + "\n" for line in lines)
    # Its input stays open until it has answered.
    script = """
        mkfifo /tmp/in; exec 3<>/tmp/in; cat >&3
        playwright-mcp </tmp/in 2>/dev/null | while read -r line; do
            case $line in *'"id":2'*) echo "$line"; kill 0;; esac
        done
    """
    walls = ("--init", *OFFLINE, *ANY_USER, "--security-opt", "no-new-privileges", "--tmpfs", "/home/agent:mode=1777")
    done = run(*walls, f"{SANDBOX}-browser", "timeout", "120", "bash", "-c", script, stdin=asked)
    assert "Page Title: There" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("image", [SANDBOX, GATEWAY])
def test_no_secret_in_history_or_files(image: str) -> None:
    secret = r"sk-ant-[a-z]+[0-9]+-[A-Za-z0-9_-]{20}|carrel_(sk|admin)_[A-Za-z0-9_-]{20}|gh[pos]_[A-Za-z0-9]{30}"
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    environment = "\n".join(inspect(image)["Config"]["Env"])
    assert not re.search(secret, history + environment)
    assert not re.search(r"(?i)(token|api_key|password|secret)=[^\s]", history + environment)
    # As root: what only root may read is searched too. Of the packages of others, their own examples of a key remain.
    script = f"""
        grep -rIlE '{secret}|BEGIN [A-Z ]*PRIVATE KEY' /etc /home /root /var /data /workspace /usr/local \\
            /opt/carrel/lib/python3.13/site-packages/carrel 2>/dev/null
        find / -xdev \\( -name '.credentials.json' -o -name '.env' -o -name '.npmrc' -o -name 'pip.conf' \\
            -o -name 'admin.key' -o -name '.git-credentials' \\) -not -path '/proc/*' 2>/dev/null
        true
    """
    done = run("--network", "none", "--user", "0:0", "--entrypoint", "bash", image, "-c", script)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# ---------------------------------------------------------------------------------------------------------------
# The sandbox image alone


async def test_claude_and_both_sdks_work_unattended(model: tuple[str, ...]) -> None:
    """One variable, any user id: the command line, the Python and the TypeScript example, each a whole turn."""
    examples = ROOT / "examples"
    script = """
        set -e
        claude -p '[[text: from the command line]]'
        python3 /examples/agent.py '[[bash: echo from Python > python.txt; cat python.txt]]'
        tsc --noCheck --noResolve --module nodenext --outDir /tmp/agent /examples/agent.mts
        node /tmp/agent/agent.mjs '[[bash: echo from TypeScript > node.txt; cat node.txt]]'
    """
    mount = ("--volume", f"{examples}:/examples:ro", "--env", "CLAUDE_CODE_OAUTH_TOKEN=sk-ant-oat01-nothing")
    done = await asyncio.to_thread(run, *model, *ANY_USER, *mount, SANDBOX, "bash", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from the command line" in done.stdout
    assert "from Python" in done.stdout
    assert "from TypeScript" in done.stdout
    assert done.stdout.count("success after 2 turns") == 2
    assert "entrypoint: using CLAUDE_CODE_OAUTH_TOKEN" in done.stderr
    assert "sk-ant-oat01" not in done.stdout + done.stderr


SHOW = "env; cat $CLAUDE_CONFIG_DIR/.credentials.json 2>/dev/null; true"


@pytest.mark.parametrize(
    ("given", "said", "left"),
    [
        ({"ANTHROPIC_API_KEY": "key-1"}, "using ANTHROPIC_API_KEY", {"ANTHROPIC_API_KEY": "key-1"}),
        (
            {"ANTHROPIC_API_KEY": "key-1", "CLAUDE_CODE_OAUTH_TOKEN": "token-2", "CLAUDE_CODE_SESSION": ""},
            "several credentials are there (ANTHROPIC_API_KEY CLAUDE_CODE_OAUTH_TOKEN): using ANTHROPIC_API_KEY",
            {"ANTHROPIC_API_KEY": "key-1"},
        ),
        (
            {
                "ANTHROPIC_API_KEY": "key-1",
                "CLAUDE_CODE_OAUTH_TOKEN": "token-2",
                "CARREL_CREDENTIAL": "CLAUDE_CODE_OAUTH_TOKEN",
            },
            "using CLAUDE_CODE_OAUTH_TOKEN",
            {"CLAUDE_CODE_OAUTH_TOKEN": "token-2"},
        ),
        (
            {"CLAUDE_CODE_SESSION": "sk-ant-oat01-legacy"},
            "using CLAUDE_CODE_SESSION",
            {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-legacy"},
        ),
        ({"CLAUDE_CODE_SESSION": '{"login": "file"}'}, "using CLAUDE_CODE_SESSION", {}),
        ({}, "no credential is set", {}),
    ],
)
def test_the_choice_among_credentials(given: dict[str, str], said: str, left: dict[str, str]) -> None:
    options = [option for name, value in given.items() for option in ("--env", f"{name}={value}")]
    done = run("--network", "none", *ANY_USER, *options, SANDBOX, "bash", "-c", SHOW)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert not any(value in done.stderr for name, value in given.items() if value and name in CREDENTIALS)
    seen = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert {name: value for name, value in seen.items() if name in CREDENTIALS} == left
    if given.get("CLAUDE_CODE_SESSION", "").startswith("{"):
        assert done.stdout.endswith(given["CLAUDE_CODE_SESSION"])


def test_an_existing_login_file_is_kept(tmp_path: Path) -> None:
    login = tmp_path / ".credentials.json"
    login.write_text('{"kept": true}')
    for path in (tmp_path, login):
        os.chmod(path, 0o777)  # for whatever user the container is
    folder = ("--network", "none", *ANY_USER, "--volume", f"{tmp_path}:/home/agent/.claude")
    alone = run(*folder, SANDBOX, "bash", "-c", SHOW)
    assert "entrypoint: using login-file" in alone.stderr
    assert '{"kept": true}' in alone.stdout
    refused = run(*folder, "--env", 'CLAUDE_CODE_SESSION={"another": 1}', SANDBOX, "true")
    assert refused.returncode == 64
    assert "which is kept" in refused.stderr
    chosen = ("--env", 'CLAUDE_CODE_SESSION={"another": 1}', "--env", "CARREL_CREDENTIAL=login-file")
    assert run(*folder, *chosen, SANDBOX, "true").returncode == 0
    missing = run(*folder, "--env", "CARREL_CREDENTIAL=ANTHROPIC_API_KEY", SANDBOX, "true")
    assert (missing.returncode, "is not there" in missing.stderr) == (64, True)
    assert login.read_text() == '{"kept": true}'


# ---------------------------------------------------------------------------------------------------------------
# The gateway image alone


@pytest.fixture
def started() -> Iterator[Callable[..., str]]:
    """`started(option, …)` is the name of a container of the gateway image; it and its volumes go with the test."""
    names: list[str] = []

    def start(*options: str) -> str:
        name = f"carrel-test-gateway-{secrets.token_hex(6)}"
        names.append(name)
        done = docker("run", "--detach", "--init", "--name", name, *options, GATEWAY)
        assert done.returncode == 0, done.stderr
        return name

    yield start
    for name in names:
        docker("rm", "--force", "--volumes", name)


async def test_the_whole_service_in_one_container(started: Callable[..., str]) -> None:
    options = ("--health-interval", "2s", "--env", "CARREL_MODEL_UPSTREAM=scripted")
    name = started("--publish", "127.0.0.1::8000", *options)
    url = "http://" + (await asyncio.to_thread(docker, "port", name, "8000/tcp")).stdout.splitlines()[0]
    async with asyncio.timeout(240), httpx.AsyncClient() as http:
        while True:
            with suppress(httpx.TransportError):
                if (await http.get(f"{url}/health/live")).status_code == 200:
                    break
            await asyncio.sleep(0.2)
    key = (await asyncio.to_thread(docker, "exec", name, "cat", "/data/admin.key")).stdout.strip()
    async with AsyncCarrel(url, key) as carrel:
        session = await carrel.sessions.create()
        result = await carrel.turns.run(session.id, "[[bash: node -p 6*7; rg --version | head -c 7]]")
        assert "42" in (result.text or "")
        assert "ripgrep" in (result.text or "")
        await carrel.sessions.delete(session.id)
    async with asyncio.timeout(240):
        state = ["inspect", "--format", "{{.State.Health.Status}}", name]
        while (await asyncio.to_thread(docker, *state)).stdout.strip() != "healthy":
            await asyncio.sleep(0.5)
    stopped = await asyncio.to_thread(docker, "stop", "--time", "60", name)
    assert stopped.returncode == 0
    code = await asyncio.to_thread(docker, "inspect", "--format", "{{.State.ExitCode}}", name)
    assert code.stdout.strip() in ("0", "143")
