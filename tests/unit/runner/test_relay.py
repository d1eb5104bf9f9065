"""The road from a loopback port to the egress proxy: whose it is, what passes, what becomes of it without a proxy."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from carrel.protocol.bootstrap import Road
from carrel.runner.namespaces import listen_within
from carrel.runner.relay import Relay

GREETING = b"OPTIONS * HTTP/1.1\r\nproxy-authorization: Bearer cak-own\r\n\r\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Proxy:
    """Greets, then says back what it is told, turned around, once the other side has said all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.greeted: list[bytes] = []
        self.welcome = b"HTTP/1.1 200 OK\r\n\r\n"

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.greeted.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.welcome)
        writer.write((await reader.read())[::-1])
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._take, self.path)
        try:
            yield
        finally:
            server.close()
            self.path.unlink(missing_ok=True)


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    made = Relay("cak-own", egress=Road(socket=str(tmp_path / "egress.sock"), port=free_port()))
    await made.open()
    yield made
    await made.close()


async def ask(relay: Relay, data: bytes) -> bytes:
    host, _, port = relay.variables["HTTP_PROXY"].removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


async def test_what_programs_say_passes_once_it_is_said_whose_it_is(relay: Relay, tmp_path: Path) -> None:
    proxy = Proxy(tmp_path / "egress.sock")
    async with proxy.running():
        sent = os.urandom(300_000)
        answers = await asyncio.gather(*(ask(relay, sent + bytes([i])) for i in range(5)))
    assert answers == [bytes([i]) + sent[::-1] for i in range(5)]
    assert proxy.greeted == [GREETING] * 5


async def test_a_proxy_that_does_not_know_us_is_heard(relay: Relay, tmp_path: Path) -> None:
    proxy = Proxy(tmp_path / "egress.sock")
    proxy.welcome = b"HTTP/1.1 407 Who\r\ncontent-length: 0\r\n\r\n"
    async with proxy.running():
        assert (await ask(relay, b"")).startswith(b"HTTP/1.1 407 ")


async def test_a_proxy_that_is_away_is_told_as_a_bad_gateway_and_may_come_back(relay: Relay, tmp_path: Path) -> None:
    assert (await ask(relay, b"")).startswith(b"HTTP/1.1 502 ")
    async with Proxy(tmp_path / "egress.sock").running():
        assert await ask(relay, b"ab") == b"ba"
    assert (await ask(relay, b"")).startswith(b"HTTP/1.1 502 ")


async def test_variables_in_both_spellings_and_the_model_past_them(relay: Relay) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        assert relay.variables[name] == relay.variables[name.upper()]
    assert "gateway" in relay.variables["NO_PROXY"].split(",")
    assert "cak-own" not in str(relay.variables)


async def test_mcp_servers_of_the_gateway_have_a_port_of_their_own(tmp_path: Path) -> None:
    """Nothing is said there before what the agent says, which names itself by a variable."""
    relay = Relay("cak-own", mcp=Road(socket=str(tmp_path / "gateway.sock"), port=0))
    theirs = {"type": "http", "url": "https://docs.example/mcp", "headers": {"A": "b"}}
    given = {"shop": {"type": "http", "url": "http://gateway/mcp/shop"}, "docs": theirs, "here": {"command": "x"}}
    await relay.open()
    servers = relay.servers(given)
    assert servers["docs"] == theirs
    assert servers["here"] == {"command": "x"}
    assert servers["shop"]["headers"] == {"Authorization": "Bearer ${CARREL_AGENT_TOKEN}"}
    assert relay.variables == {"CARREL_AGENT_TOKEN": "cak-own"}
    port = int(servers["shop"]["url"].removeprefix("http://127.0.0.1:").removesuffix("/mcp/shop"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "gateway.sock")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"ab")
    writer.write_eof()
    assert await reader.read() == b"ba"
    writer.close()
    server.close()
    await relay.close()


async def test_without_a_road_servers_are_told_as_they_are() -> None:
    relay = Relay("cak-own", egress=Road(socket=""))
    given = {"mine": {"type": "http", "url": "http://gateway/mcp/shop"}}
    assert relay.servers(given) == given
    assert "CARREL_AGENT_TOKEN" not in relay.variables


async def test_a_wall_is_let_go_whatever_becomes_of_its_port(tmp_path: Path) -> None:
    """The process that it names has ended already: there is no network to enter. Nobody may wait for ever."""
    for name in ("wall", "go"):
        os.mkfifo(tmp_path / name)
    relay = Relay("cak-own", egress=Road(socket="", port=free_port(), entrance=str(tmp_path)))
    opening = relay.open()
    told, go = os.open(tmp_path / "wall", os.O_WRONLY), os.open(tmp_path / "go", os.O_RDONLY)
    os.write(told, b'{\n  "child-pid": 4194304,')
    os.write(told, b'  "net-namespace": 1\n}\n')
    with pytest.raises(OSError, match="no port in the sandbox"):
        await opening
    assert os.read(go, 1) == b""
    for descriptor in (told, go):
        os.close(descriptor)
    await relay.close()


def test_a_port_is_made_in_the_network_of_another_process() -> None:
    """Here in our own, which takes no privilege where we are root."""
    if os.geteuid() != 0:
        with pytest.raises(OSError, match="no port in the sandbox"):
            listen_within(os.getpid(), free_port())
        return
    port = free_port()
    with listen_within(os.getpid(), port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        with pytest.raises(OSError, match="no port in the sandbox"):
            listen_within(os.getpid(), port)
