"""The socket proxy before a real engine: what sandboxes need goes through, and no door opens beside it."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import aiodocker
import pytest

from carrel.socket_proxy import Bindable, SocketProxy, SocketProxyOptions

pytestmark = pytest.mark.requires("docker")

ENGINE = Path("/var/run/docker.sock")
IMAGE = "debian:trixie-slim"
OWNER = f"p3-compose-{os.getpid()}"


@pytest.fixture
async def engine() -> AsyncIterator[aiodocker.Docker]:
    """The engine itself, without a proxy; containers of these tests are removed at the end."""
    async with aiodocker.Docker(url=f"unix://{ENGINE}") as docker:
        yield docker
        filters = {"label": [f"test={OWNER}"]}
        for container in await docker.containers.list(all=1, filters=json.dumps(filters)):
            with suppress(aiodocker.DockerError):  # its own test has removed it
                await container.delete(force=True)


@pytest.fixture
async def proxied(tmp_path: Path, engine: aiodocker.Docker) -> AsyncIterator[aiodocker.Docker]:
    (tmp_path / "data/workspace").mkdir(parents=True)
    (tmp_path / "data/workspace").chmod(0o777)
    bindable = Bindable([(PurePosixPath(tmp_path / "data"), tmp_path / "data")])
    options = SocketProxyOptions(listen=tmp_path / "proxy.sock", engine=ENGINE, owner=OWNER)
    async with AsyncExitStack() as stack:
        await SocketProxy(options, bindable).start(stack)
        yield await stack.enter_async_context(aiodocker.Docker(url=f"unix://{options.listen}"))


def _name() -> str:
    return f"p3-compose-{uuid4().hex[:12]}"


def _config(tmp_path: Path, *command: str, **host: Any) -> dict[str, Any]:
    return {
        "Image": IMAGE,
        "User": "70000:70000",
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": list(command),
        "Labels": {"test": OWNER},
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "HostConfig": {
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "NetworkMode": "none",
            "Mounts": [
                {"Type": "bind", "Source": str(tmp_path / "data/workspace"), "Target": "/workspace", "ReadOnly": False}
            ],
            **host,
        },
    }


async def _refusal(asked: Any) -> aiodocker.DockerError:
    with pytest.raises(aiodocker.DockerError) as raised:
        await asked
    return raised.value


async def test_a_sandboxs_whole_life(tmp_path: Path, proxied: aiodocker.Docker) -> None:
    heard = proxied.events.subscribe(create_task=False)
    listening = asyncio.create_task(
        proxied.events.run(filters=json.dumps({"type": ["container"], "event": ["die"]})), name="events"
    )
    name = _name()
    container = await proxied.containers.create(_config(tmp_path, "cat > /workspace/told; exit 7"), name=name)
    stream = container.attach(stdin=True)
    await stream._init()
    await container.start()
    await stream.write_in(b"hello\n" * 100_000)
    await stream.close()
    async with asyncio.timeout(20):
        while (await heard.get())["Actor"]["Attributes"]["name"] != name:
            pass
    assert (tmp_path / "data/workspace/told").read_bytes() == b"hello\n" * 100_000
    assert (await container.show())["State"]["ExitCode"] == 7
    assert [each.id for each in await proxied.containers.list(all=1)] == [container.id]
    await container.delete(force=True, v=True)
    assert await proxied.containers.list(all=1) == []
    listening.cancel()
    with suppress(asyncio.CancelledError):
        await listening


async def test_logs_stats_and_end(tmp_path: Path, proxied: aiodocker.Docker) -> None:
    container = await proxied.containers.create(_config(tmp_path, "echo here; sleep 100"), name=_name())
    await container.start()
    async with asyncio.timeout(20):
        while await container.log(stdout=True) != ["here\n"]:
            await asyncio.sleep(0.05)
    assert (await container.stats(stream=False))[0]["pids_stats"]["current"] >= 1
    await container.delete(force=True)
    assert (await _refusal(container.show())).status == 404


async def test_of_other_peoples_containers_nothing_is_known(
    tmp_path: Path, engine: aiodocker.Docker, proxied: aiodocker.Docker
) -> None:
    theirs = await engine.containers.create(_config(tmp_path, "sleep 100"), name=_name())
    await theirs.start()
    assert await proxied.containers.list(all=1) == []
    seen = proxied.containers.container(theirs.id)
    for asked in (
        seen.show(),
        seen.start(),
        seen.delete(force=True),
        seen.log(stdout=True),
        seen.stats(stream=False),
        seen.attach(stdin=True)._init(),
    ):
        assert (await _refusal(asked)).status == 404
    assert (await theirs.show())["State"]["Running"] is True


async def test_doors_beside_it_are_shut(tmp_path: Path, proxied: aiodocker.Docker) -> None:
    (tmp_path / "data/link").symlink_to("/etc")
    mount = {"Type": "bind", "Target": "/host"}
    for host in (
        {"Privileged": True},
        {"CapAdd": ["SYS_ADMIN"]},
        {"PidMode": "host"},
        {"NetworkMode": "host"},
        {"IpcMode": "host"},
        {"Devices": [{"PathOnHost": "/dev/null", "PathInContainer": "/dev/x", "CgroupPermissions": "rwm"}]},
        {"Binds": ["/:/host"]},
        {"Mounts": [mount | {"Source": "/"}]},
        {"Mounts": [mount | {"Source": str(ENGINE)}]},
        {"Mounts": [mount | {"Source": str(tmp_path / "data/link")}]},
    ):
        error = await _refusal(proxied.containers.create(_config(tmp_path, "true", **host), name=_name()))
        assert (error.status, "socket proxy" in str(error)) == (403, True), host
    container = await proxied.containers.create(_config(tmp_path, "sleep 100"), name=_name())
    await container.start()
    execution = _refusal(container.exec(["id"], user="root"))
    assert (await execution).status == 403
    for asked in (
        container.rename("another"),
        container.get_archive("/etc/passwd"),
        container.commit(repository="mine"),
        proxied.volumes.list(),
        proxied.networks.list(),
        proxied.images.list(),
        proxied.images.delete(IMAGE),
    ):
        assert (await _refusal(asked)).status == 403


async def test_a_link_that_is_put_there_afterwards(tmp_path: Path, proxied: aiodocker.Docker) -> None:
    container = await proxied.containers.create(_config(tmp_path, "true"), name=_name())
    (tmp_path / "data/workspace").rename(tmp_path / "data/before")
    (tmp_path / "data/workspace").symlink_to("/etc")
    assert (await _refusal(container.start())).status == 403


async def test_another_compose_projects_container_tells_nothing(
    tmp_path: Path, engine: aiodocker.Docker, proxied: aiodocker.Docker
) -> None:
    config = _config(tmp_path, "sleep 100")
    config["Labels"] |= {"com.docker.compose.project": "another"}
    theirs = await engine.containers.create(config, name=_name())
    assert (await _refusal(proxied.containers.container(theirs.id).show())).status == 404
