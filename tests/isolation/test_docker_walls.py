"""What a Bash tool can get hold of in a container: the engine, the host, others' sandboxes, its own runner."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from carrel.cli.server import running
from carrel.protocol.link import PROTOCOL_VERSION
from carrel.runtimes.docker import DockerRuntime
from carrel.settings import load_settings

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images"), pytest.mark.timeout(180)]

PROBE = Path(__file__).with_name("docker_probe.py")
CONTROLS = {"control_status", "control_sees_the_runner", "control_gateway"}


class House:
    """A server, two sessions in containers, and what was said to their runners."""

    def __init__(self, http: httpx.AsyncClient, data: Path, port: int) -> None:
        self.http = http
        self.data = data
        self.port = port

    async def run(self, session: str, prompt: str) -> Any:
        answer = await self.http.post(f"/sessions/{session}/turns", json={"prompt": prompt, "wait": True})
        return answer.json()

    async def session(self, **options: Any) -> str:
        return str((await self.http.post("/sessions", json=options)).json()["id"])

    def workspace(self, session: str) -> Path:
        return self.data / "sessions" / session / "workspace"


@pytest.fixture
async def specs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each sandbox was launched with, by its session: the tokens that the probe must not find."""
    found: dict[str, Any] = {}
    launch = DockerRuntime.launch

    async def launch_and_note(self: DockerRuntime, spec: Any) -> AsyncIterator[dict[str, Any]]:
        found[spec.session_id] = spec
        async for state in launch(self, spec):
            yield state

    monkeypatch.setattr(DockerRuntime, "launch", launch_and_note)
    return found


@pytest.fixture
async def house(tmp_path: Path, specs: dict[str, Any]) -> AsyncIterator[House]:
    given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": 0}
    async with running(load_settings(overrides=given | {"runtime": "docker"})) as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1", headers=headers, timeout=120) as http:
            yield House(http, tmp_path / "data", int(server.url.rpartition(":")[2]))


async def test_no_way_out_of_a_container_is_found(house: House, specs: dict[str, Any]) -> None:
    prober, neighbour = await house.session(), await house.session()
    marker = "marker-of-the-neighbour"
    await asyncio.gather(
        house.run(neighbour, f"[[bash: touch {marker} /tmp/{marker} /dev/shm/{marker} $HOME/{marker}]]"),
        house.run(prober, "hello"),
    )
    plan = {
        "private_paths": [str(house.data / name) for name in ("admin.key", "carrel.db", "installation")]
        + [str(house.workspace(neighbour) / marker)],
        "marker": marker,
        "port": house.port,
        "token_digest": hashlib.sha256(specs[prober].link_token.encode()).hexdigest(),
        "neighbour": specs[neighbour].sandbox_id,
        "protocol": PROTOCOL_VERSION,
    }
    (house.workspace(prober) / "plan.json").write_text(json.dumps(plan))
    (house.workspace(prober) / "probe.py").write_text(PROBE.read_text())
    turn = await house.run(prober, "[[bash: /opt/carrel/bin/python -I probe.py]]")
    assert turn["status"] == "succeeded", turn
    found = json.loads((house.workspace(prober) / "found.json").read_text())

    assert not {name: got for name, got in found.items() if "the probe itself failed" in str(got)}
    status = found["control_status"]
    assert {value for name, value in status.items() if name.startswith("Cap")} == {"0000000000000000"}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "0" not in status["Uid"].split()
    assert found["control_sees_the_runner"] == 1, "it looks at the right process"
    assert found["control_gateway"] == "connected"
    assert len(found.keys() - CONTROLS) >= 20
    assert {name: got for name, got in found.items() if name not in CONTROLS and got is not None} == {}
    # Whoever said hello in the runner's name has cost it nothing.
    assert (await house.run(prober, "are you there?"))["status"] == "succeeded"


async def test_hooks_of_a_workspace_do_no_more_than_its_agent(house: House) -> None:
    session = await house.session(setting_sources=["user", "project", "local"])
    seen = "cat /proc/self/status > /workspace/hooked; ls /var/run/docker.sock >> /workspace/hooked 2>&1; true"
    hooks = {"PreToolUse": [{"matcher": "*", "hooks": [{"type": "command", "command": seen}]}]}
    (house.data / "sessions").mkdir(exist_ok=True)
    await house.run(session, f"[[write: .claude/settings.json | {json.dumps({'hooks': hooks})}]]")
    await house.http.post(f"/sessions/{session}/stop")
    await house.http.post(f"/sessions/{session}/resume")
    await house.run(session, "[[bash: true]]")
    hooked = house.workspace(session) / "hooked"
    if hooked.exists():
        text = hooked.read_text()
        assert "CapEff:\t0000000000000000" in text
        assert "NoNewPrivs:\t1" in text
        assert "No such file" in text


async def test_no_secret_is_on_show_in_the_engine(house: House, specs: dict[str, Any]) -> None:
    """Neither in what `docker inspect` and `docker logs` tell, nor in arguments and environments of any process."""
    session = await house.session()
    await house.run(session, "[[bash: env > env.txt]]")
    spec = specs[session]
    name = f"carrel-{spec.sandbox_id}"
    told = b""
    for command in (["inspect", name], ["logs", name], ["top", name, "-eo", "pid,args"]):
        process = await asyncio.create_subprocess_exec(
            "docker", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        told += (await process.communicate())[0]
    for token in (spec.link_token, spec.agent_token):
        assert token.encode() not in told
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            for part in ("cmdline", "environ"):
                try:
                    text = (path / part).read_bytes()
                except OSError:
                    continue
                assert spec.link_token.encode() not in text, f"{path}/{part}"
    for path in (house.data / "containers").rglob("*"):
        if path.is_file():
            assert spec.link_token not in path.read_text(errors="replace")
