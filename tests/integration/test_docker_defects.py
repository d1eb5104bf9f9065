"""What older services got wrong, and sessions in containers do not: each a defect by its number in the design.

The fourteenth, a restart of everything, is in `tests/kill/test_docker.py`.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import uvicorn

from carrel.errors import OperatorError
from carrel.model_gateway.scripted import create_app
from carrel.testing.s3 import S3Server

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images"), pytest.mark.timeout(120)]

SECRET = "a-secret-that-is-long-enough-0123456789"


def as_(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def command(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    return (await process.communicate())[0].decode(errors="replace")


async def container_of(api: Any, session: str) -> str:
    label = f"label=carrel.session={session}"
    (name,) = (await command("docker", "ps", "--filter", label, "--format", "{{.Names}}")).split()
    return name


async def test_6_a_turn_that_is_longer_than_the_idle_timeout_keeps_its_container(start: Any) -> None:
    api = await start(runtime="docker", idle_timeout_seconds=0.3)
    session = await api.session()
    turn = await api.send(session, "[[bash: touch begun; sleep 3; hostname > /tmp/here]] [[bash: cat /tmp/here]]")
    await api.until_status(session, "running")
    container = await container_of(api, session)
    event = await api.until_event(session, "turn.completed", turn)
    assert event["data"]["status"] == "succeeded", event
    started = [event for event in await api.events(session) if event["type"] == "agent.initialised"]
    assert len(started) == 1, "it was not begun anew"
    await api.until_status(session, "idle")

    async def gone() -> bool:
        return container not in await command("docker", "ps", "-a", "--format", "{{.Names}}")

    await api.until("an idle one is freed, and its container with it", gone)


async def test_13_a_strangers_session_is_not_there_and_no_false_token_opens_the_door(start: Any) -> None:
    api = await start(runtime="docker", jwt={"secret": SECRET})
    claims = {"exp": int(time.time()) + 60}
    alice, bob = (as_(jwt.encode({"sub": name, **claims}, SECRET)) for name in ("alice", "bob"))
    session = (await api.ask("POST", "/sessions", 201, json={}, headers=alice))["id"]
    body = {"prompt": "[[bash: echo hers > note]]", "wait": True}
    assert (await api.ask("POST", f"/sessions/{session}/turns", headers=alice, json=body))["status"] == "succeeded"
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/files"),
        ("GET", "/files/note"),
        ("GET", "/network"),
        ("POST", "/turns"),
        ("POST", "/stop"),
        ("DELETE", ""),
    ):
        sent = {"json": {"prompt": "whose is this?"}} if path == "/turns" else {}
        problem = await api.ask(method, f"/sessions/{session}{path}", 404, headers=bob, **sent)
        assert problem["code"] == "session_not_found"
    spoofed = {"X-User-Id": "alice", "X-Forwarded-User": "alice", "X-Remote-User": "alice"}
    await api.ask("GET", f"/sessions/{session}", 404, headers=bob | spoofed)
    for token in (
        jwt.encode({"sub": "alice", **claims}, None, algorithm="none"),
        jwt.encode({"sub": "alice", **claims}, SECRET + "x"),
        jwt.encode({"sub": "alice", "exp": 1}, SECRET),
        "changeme",
    ):
        await api.ask("GET", f"/sessions/{session}", 401, headers=as_(token) | spoofed)
    assert (await api.ask("GET", f"/sessions/{session}", headers=alice))["status"] == "ready", "and all is as it was"


async def test_13_a_secret_that_everybody_knows_does_not_start(start: Any) -> None:
    with pytest.raises(OperatorError, match=r"jwt\.secret"):
        await start(runtime="docker", jwt={"secret": "changeme"})


@pytest.mark.requires("s3")
async def test_15_without_the_object_store_all_else_works(start: Any, s3_server: S3Server) -> None:
    api = await start(
        runtime="docker",
        objects={
            "kind": "s3",
            "bucket": s3_server.bucket,
            "endpoint": s3_server.endpoint,
            "access_key": s3_server.access_key,
            "secret_key": s3_server.secret_key,
            "timeout_seconds": 0.5,
        },
    )
    s3_server.stop()
    session = await api.session()
    for number in range(2):
        turn = await api.run(session, f"[[bash: echo {number} >> trail; cat trail | wc -l]]")
        assert (turn["status"], turn["text"]) == ("succeeded", f"Result: {number + 1}"), turn
    told = await api.until_event(session, "workspace.snapshot_failed")
    assert told["data"]["code"] == "object_store_unavailable"
    await api.ask("POST", f"/sessions/{session}/stop")
    await api.ask("POST", f"/sessions/{session}/resume")
    assert (await api.run(session, "[[bash: cat trail | wc -l]]"))["text"] == "Result: 2"
    s3_server.start()

    async def caught_up() -> bool:
        return bool((await api.ask("GET", f"/sessions/{session}/snapshots"))["data"])

    await api.until("it catches up when the store is back", caught_up, 90)


@pytest.fixture
async def model() -> AsyncIterator[tuple[str, list[bytes]]]:
    """The scripted model behind an address, and the keys that it was shown."""
    scripted, shown = create_app(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        shown.extend(value for name, value in scope.get("headers", ()) if name == b"x-api-key")
        await scripted(scope, receive, send)

    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(), name="scripted model")
    while not server.started:
        await asyncio.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", shown
    server.should_exit = True
    await serving


async def test_18_no_secret_is_in_a_log_a_workspace_or_a_process(
    start: Any, model: tuple[str, list[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    model_key, secrets_key = (
        "sk-ant-api03-" + "canary" * 6,
        base64.b64encode(b"canary of 32 bytes for a keyring").decode(),
    )
    url, shown = model
    api = await start(
        runtime="docker",
        model_upstream=url,
        anthropic_api_key=model_key,
        jwt={"secret": SECRET},
        secrets_key=secrets_key,
    )
    session = await api.session()
    seen = (
        "env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; ls -laR /run /opt/carrel/lib | head -50"
    )
    turn = await api.run(session, f"[[bash: {seen}]]")
    assert turn["status"] == "succeeded", turn
    container = await container_of(api, session)
    admin_key = (api.server.data / "admin.key").read_text().strip()
    secrets = [each.encode() for each in (model_key, SECRET, secrets_key, admin_key)]
    places: dict[str, bytes] = {"events": json.dumps(await api.events(session)).encode()}
    for what in (["inspect", container], ["logs", container], ["top", container, "-eo", "pid,args"]):
        places["docker " + what[0]] = (await command("docker", *what)).encode()
    captured = capfd.readouterr()
    places["the server's log"] = (captured.out + captured.err).encode()
    for path in (p for p in api.server.data.rglob("*") if p.is_file() and p.name not in ("admin.key", "reserve")):
        places[str(path.relative_to(api.server.data))] = path.read_bytes()
    for path in (p for p in Path("/proc").iterdir() if p.name.isdigit()):
        for part in ("cmdline", "environ"):
            try:
                places[f"{path}/{part}"] = (path / part).read_bytes()
            except OSError:
                continue
    assert model_key.encode() in shown, "it was used"
    assert {"carrel.db", "events", "docker inspect"} <= set(places)
    assert b"CARREL_SANDBOX" in places["docker inspect"], "the search looks at the right container"
    assert [name for name, text in places.items() if any(secret in text for secret in secrets)] == []
