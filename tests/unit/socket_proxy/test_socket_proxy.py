"""What the socket proxy passes on, word by word. On a real engine: tests/compose/test_socket_proxy.py."""

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from carrel.errors import EngineCallRefused, InvalidSettings
from carrel.model import Resources, SandboxTemplate
from carrel.protocol.engine_calls import CALLS, EngineCall
from carrel.runtimes import docker as runtime
from carrel.runtimes.docker import container as runtime_container
from carrel.socket_proxy import Bindable, SocketProxy, SocketProxyOptions, checked_container
from carrel.socket_proxy.calls import checked_filters, find
from carrel.socket_proxy.wire import read_request

LABEL = ("carrel.owner", "house")


@pytest.fixture
def bindable(tmp_path: Path) -> Bindable:
    (tmp_path / "here/sessions/1").mkdir(parents=True)
    (tmp_path / "here/way-out").symlink_to("/etc")
    (tmp_path / "here/file").write_text("")
    return Bindable([(PurePosixPath("/host/volume"), tmp_path / "here")])


def container(**host: Any) -> dict[str, Any]:
    """A sandbox as the runtime asks for it, and something else about its wall."""
    return {
        "Image": "carrel-sandbox:1",
        "User": "700001:700001",
        "Labels": {"carrel.session": "1"},
        "HostConfig": {
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "NetworkMode": "none",
            "Privileged": False,
            "Mounts": [{"Type": "bind", "Source": "/host/volume/sessions/1", "Target": "/workspace"}],
            "Tmpfs": {"/tmp": "rw,nosuid,nodev,exec,size=536870912,mode=1777"},
            **host,
        },
    }


def checked(asked: dict[str, Any] | bytes, bindable: Bindable) -> dict[str, Any]:
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    written: dict[str, Any] = json.loads(
        checked_container(body, label=LABEL, bindable=bindable, images=["carrel-sandbox:*"], networks=["none"])
    )
    return written


def test_a_sandbox_is_passed_on_with_our_label(bindable: Bindable) -> None:
    asked = container()
    written = checked(asked, bindable)
    assert written.pop("Labels") == {"carrel.session": "1", "carrel.owner": "house"}
    assert written == {name: value for name, value in asked.items() if name != "Labels"}


@pytest.mark.parametrize(
    "host",
    [
        {"Privileged": True},
        {"privileged": True},
        {"CapAdd": ["SYS_ADMIN"]},
        {"CapDrop": []},
        {"CapDrop": ["NET_RAW"]},
        {"SecurityOpt": []},
        {"SecurityOpt": ["no-new-privileges:false"]},
        {"SecurityOpt": ["no-new-privileges:true", "seccomp=unconfined"]},
        {"SecurityOpt": ["no-new-privileges:true", "apparmor=unconfined"]},
        {"NetworkMode": "host"},
        {"NetworkMode": "bridge"},
        {"NetworkMode": "container:other"},
        {"NetworkMode": None},
        {"PidMode": "host"},
        {"IpcMode": "host"},
        {"UTSMode": "host"},
        {"UsernsMode": "host"},
        {"CgroupnsMode": "host"},
        {"CgroupParent": "/"},
        {"Devices": [{"PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda", "CgroupPermissions": "rwm"}]},
        {"DeviceRequests": [{"Driver": "nvidia"}]},
        {"DeviceCgroupRules": ["a *:* rwm"]},
        {"Binds": ["/:/host"]},
        {"VolumesFrom": ["other"]},
        {"GroupAdd": ["docker"]},
        {"PortBindings": {"80/tcp": [{"HostPort": "80"}]}},
        {"Sysctls": {"net.ipv4.ip_forward": "1"}},
        {"MaskedPaths": []},
        {"OomScoreAdj": -1000},
        {"Runtime": "/usr/bin/evil"},
        {"RestartPolicy": {"Name": "always"}},
        {"LogConfig": {"Type": "syslog", "Config": {"syslog-address": "tcp://elsewhere"}}},
        {"Tmpfs": {"/tmp": "rw,bind=/etc"}},
        {"Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume-2/x", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume/sessions/../../..", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume/way-out", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume/way-out/ssh", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume/not-there", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/var/run/docker.sock", "Target": "/host"}]},
        {"Mounts": [{"Type": "volume", "Source": "claude-secrets", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Target": "/host"}]},
        {"Mounts": [{"Type": "bind", "Source": "/host/volume/sessions/1", "Target": "/x", "source": "/"}]},
        {
            "Mounts": [
                {
                    "Type": "bind",
                    "Source": "/host/volume/sessions/1",
                    "Target": "/x",
                    "BindOptions": {"Propagation": "rshared"},
                }
            ]
        },
    ],
    ids=repr,
)
def test_a_wall_with_a_hole_is_refused(host: dict[str, Any], bindable: Bindable) -> None:
    with pytest.raises(EngineCallRefused):
        checked(container(**host), bindable)


@pytest.mark.parametrize(
    "change",
    [
        {"User": ""},
        {"User": "0:0"},
        {"User": "root"},
        {"User": "1000"},
        {"User": "1000:0"},
        {"User": "999:1000"},
        {"Image": "postgres:18"},
        {"Image": ""},
        {"Volumes": {"/x": {}}},
        {"NetworkingConfig": {"EndpointsConfig": {}}},
        {"Healthcheck": {"Test": ["CMD", "true"]}},
        {"Labels": {"carrel.owner": "another"}},
        {"Labels": {"com.docker.compose.project": "house"}},
        {"hostconfig": {"Privileged": True}},
        {"HostConfig": None},
    ],
    ids=repr,
)
def test_a_container_that_is_no_sandbox_is_refused(change: dict[str, Any], bindable: Bindable) -> None:
    with pytest.raises(EngineCallRefused):
        checked(container() | change, bindable)


@pytest.mark.parametrize("name", ["CapDrop", "SecurityOpt", "NetworkMode"])
def test_a_wall_of_which_a_part_is_not_told_is_refused(name: str, bindable: Bindable) -> None:
    asked = copy.deepcopy(container())
    del asked["HostConfig"][name]
    with pytest.raises(EngineCallRefused, match=name):
        checked(asked, bindable)


def test_what_is_told_twice_is_refused(bindable: Bindable) -> None:
    body = json.dumps(container()).replace('"Privileged": false', '"Privileged": false, "Privileged": true')
    with pytest.raises(EngineCallRefused, match="twice"):
        checked(body.encode(), bindable)
    with pytest.raises(EngineCallRefused, match="JSON"):
        checked(b"[" * 100_000, bindable)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1.41/containers/x/exec"),
        ("POST", "/v1.41/containers/x/kill"),
        ("POST", "/v1.41/containers/x/stop"),
        ("GET", "/_ping"),
        ("POST", "/v1.41/exec/x/start"),
        ("POST", "/v1.41/containers/x/update"),
        ("PUT", "/v1.41/containers/x/archive"),
        ("GET", "/v1.41/containers/x/archive"),
        ("GET", "/v1.41/containers/x/export"),
        ("POST", "/v1.41/containers/prune"),
        ("POST", "/v1.41/build"),
        ("POST", "/v1.41/images/create"),
        ("POST", "/v1.41/images/load"),
        ("DELETE", "/v1.41/images/x"),
        ("GET", "/v1.41/images/json"),
        ("POST", "/v1.41/volumes/create"),
        ("GET", "/v1.41/volumes"),
        ("POST", "/v1.41/networks/create"),
        ("POST", "/v1.41/networks/x/connect"),
        ("GET", "/v1.41/secrets"),
        ("POST", "/v1.41/swarm/init"),
        ("POST", "/v1.41/plugins/x/enable"),
        ("POST", "/session"),
        ("POST", "/v1.41/containers/x/../y/start"),
        ("POST", "/v1.41//containers/x/start"),
        ("POST", "/v1.23/containers/x/start"),
        ("GET", "/v1.41/v1.41/info"),
        ("GET", "/v1.41/containers/x/y/json"),
    ],
)
def test_other_calls_are_refused(method: str, path: str) -> None:
    with pytest.raises(EngineCallRefused):
        find(method, path, {})


def test_calls_are_passed_on_with_what_is_known_of_them_alone() -> None:
    call, version, name = find("POST", "/v1.41/containers/box/start", {})
    assert (call.path, version, name) == ("/containers/{}/start", "/v1.41", "box")
    assert find("GET", "/images/registry.example:5000/a/b:1/json", {})[2] == "registry.example:5000/a/b:1"
    with pytest.raises(EngineCallRefused, match="detachKeys"):
        find("POST", "/v1.41/containers/box/start", {"detachKeys": "x"})
    with pytest.raises(EngineCallRefused, match="link"):
        find("DELETE", "/v1.41/containers/box", {"link": "1"})


def test_filters_hold_for_our_own_alone() -> None:
    ours = "carrel.owner=house"
    assert json.loads(checked_filters(None, ours)) == {"label": [ours]}
    assert json.loads(checked_filters('{"label": {"a=b": true, "c": false}, "type": ["container"]}', ours)) == {
        "label": ["a=b", ours],
        "type": ["container"],
    }
    for wrong in ("[]", "{", '{"volume": ["x"]}', '{"label": "x"}', '{"label": [1]}'):
        with pytest.raises(EngineCallRefused):
            checked_filters(wrong, ours)


@pytest.mark.parametrize(
    "head",
    [
        "GET /info HTTP/1.1\r\nTransfer-Encoding: chunked",
        "GET /info HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2",
        "GET /info HTTP/1.1\r\nContent-Length: -1",
        "GET /info HTTP/1.1\r\nContent-Length: 9999999",
        "GET /info HTTP/1.1\r\nContent-Length : 1",
        "GET /info HTTP/1.1\r\n folded",
        "GET http://engine/info HTTP/1.1",
        "GET /%69nfo HTTP/1.1",
        "GET /info?a=1&a=2 HTTP/1.1",
        "GET /info HTTP/2",
        "get /info HTTP/1.1",
        "GET /\x7f HTTP/1.1",
        "GET /info HTTP/1.1\r\nX: \xe9",
    ],
)
async def test_requests_are_read_strictly(head: str) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(head.encode("latin-1") + b"\r\n\r\n")
    reader.feed_eof()
    with pytest.raises(EngineCallRefused):
        await read_request(reader)


class _Engine:
    """Says of every request what it was, and of every container whose it is."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.asked: list[bytes] = []

    async def start(self, exit_stack: AsyncExitStack) -> None:
        server = await asyncio.start_unix_server(self._serve, path=self.socket)
        exit_stack.callback(server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head)
        body: dict[str, Any] = {"asked": "this"}
        status = "200 OK"
        if b"/json" in head.split(b"\r\n")[0]:
            owner = {"mine": "house"}.get(head.split(b"/")[2].decode(), "another")
            body = {"Id": "f00d", "Config": {"Labels": {"carrel.owner": owner}}, "HostConfig": {}, "Mounts": []}
        if b"nobody" in head or (b"HTTP/1.0" in head and b"mine" not in head and b"theirs" not in head):
            status = "404 Not Found"
        content = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[_Engine]:
    async with AsyncExitStack() as stack:
        engine = _Engine(tmp_path / "engine.sock")
        await engine.start(stack)
        options = SocketProxyOptions(listen=tmp_path / "proxy.sock", engine=engine.socket, owner="house")
        await SocketProxy(options, Bindable()).start(stack)
        engine.asked.clear()
        yield engine


async def _say(engine: _Engine, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(engine.socket.with_name("proxy.sock"))
    try:
        writer.write(request)
        return await reader.read()
    finally:
        writer.close()


async def test_a_second_request_behind_the_first_is_not_passed_on(engine: _Engine) -> None:
    second = b"POST /containers/theirs/start HTTP/1.1\r\n\r\n"
    answered = await _say(engine, b"GET /info HTTP/1.1\r\nAuthorization: secret\r\n\r\n" + second)
    assert b"200 OK" in answered
    assert engine.asked == [b"GET /info HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n"]


async def test_a_call_goes_to_the_container_that_was_looked_at(engine: _Engine) -> None:
    assert b"200 OK" in await _say(engine, b"POST /v1.41/containers/mine/start HTTP/1.1\r\n\r\n")
    assert engine.asked[-1].startswith(b"POST /v1.41/containers/f00d/start HTTP/1.1\r\n")


@pytest.mark.parametrize("name", ["theirs", "nobody"])
async def test_somebody_elses_container_is_as_one_that_is_not_there(engine: _Engine, name: str) -> None:
    answered = await _say(engine, f"POST /containers/{name}/start HTTP/1.1\r\n\r\n".encode())
    assert answered.startswith(b"HTTP/1.1 404 Not Found")
    assert f"No such container: {name}".encode() in answered
    assert all(b"start" not in asked for asked in engine.asked)


async def test_a_refusal_says_why(engine: _Engine) -> None:
    answered = await _say(engine, b"POST /containers/mine/exec HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
    assert answered.startswith(b"HTTP/1.1 403 Forbidden")
    assert b"socket proxy: POST /containers/mine/exec is not among" in answered
    assert b"not passed on with a body" in await _say(engine, b"GET /info HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
    upgrade = b"GET /info HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    assert b"does not become a stream" in await _say(engine, upgrade)
    assert engine.asked == []


async def test_an_engine_that_is_away(engine: _Engine) -> None:
    engine.socket.unlink()
    assert (await _say(engine, b"GET /info HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 502 Bad Gateway")


async def test_it_does_not_start_without_knowing_what_it_guards(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        options = SocketProxyOptions(listen=tmp_path / "proxy.sock", engine=tmp_path / "engine.sock")
        with pytest.raises(InvalidSettings, match="No engine answers"):
            await SocketProxy(options).start(stack)
        await _Engine(tmp_path / "engine.sock").start(stack)
        with pytest.raises(InvalidSettings, match="--owner"):
            await SocketProxy(options).start(stack)


@pytest.mark.parametrize("asked", CALLS, ids=lambda asked: f"{asked.method} {asked.path}")
def test_all_that_the_runtime_asks_for_passes(asked: EngineCall) -> None:
    found, _, name = find(asked.method, "/v1.41" + asked.path.replace("{}", "box"), dict.fromkeys(asked.query, "1"))
    assert (found, name) == (asked, "box" if "{}" in asked.path else "")


def test_a_sandbox_of_the_runtime_passes(bindable: Bindable) -> None:
    asked = runtime_container.config(
        sandbox_id="1",
        session_id="2",
        installation="3",
        user=(1000, 1000),
        template=SandboxTemplate(resources=Resources(memory_mb=512, processes=64, cpus=1.5)),
        options=runtime.ContainerOptions(image="carrel-sandbox:1", oci_runtime="runsc"),
        binds=[("/host/volume/sessions/1", runtime_container.Bind(Path("/data/sessions/1"), "/workspace"))],
    )
    assert checked(asked, bindable)["HostConfig"] == asked["HostConfig"]
