"""What the gateway asks by HTTP on behalf of sandboxes goes to the address that was checked, and follows nothing else."""

import asyncio
from contextlib import AsyncExitStack
from ipaddress import ip_address

import httpx
import pytest

from carrel.egress import CheckedTransport, Dialler, Judge


class Loopback(Judge):
    """Takes 127.0.0.1 for a public address, and 127.0.0.2 for a private one."""

    def permits(self, address):
        return address == ip_address("127.0.0.1")


@pytest.fixture
async def site():
    """A server on 127.0.0.1: its port, and the heads of the requests that came."""
    came = []

    async def answer(reader, writer):
        came.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], came
    server.close()


@pytest.fixture
async def client_of():
    async with AsyncExitStack() as stack:

        async def make(*answers):
            left = list(answers)

            async def resolve(host, port):
                return left.pop(0)

            dialler = Dialler(Loopback(), resolve)
            await dialler.start(stack)
            transport = CheckedTransport(dialler, max_connections=5)
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport))

        yield make


async def test_a_name_is_asked_for_once_and_keeps_its_host(client_of, site):
    port, came = site
    client = await client_of(["127.0.0.2", "127.0.0.1"], ["127.0.0.2"])
    assert (await client.get(f"http://shop.example:{port}/mcp")).text == "ok"
    assert f"host: shop.example:{port}" in came[0].lower()


async def test_a_private_address_is_not_connected_to(client_of, site):
    port, came = site
    client = await client_of(["127.0.0.2"], ["127.0.0.2"])
    for host in ("shop.example", "127.0.0.2"):
        with pytest.raises(httpx.ConnectError, match="private_address"):
            await client.get(f"http://{host}:{port}/mcp")
    assert came == []


async def test_nothing_there(client_of):
    client = await client_of(["127.0.0.1"], [])
    with pytest.raises(httpx.ConnectError, match="unreachable"):
        await client.get("http://shop.example:1/mcp")
    with pytest.raises(httpx.ConnectError, match="unresolved"):
        await client.get("http://shop.example:1/mcp")


async def test_a_proxy_of_the_environment_is_not_used(client_of, site, monkeypatch):
    port, _ = site
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    client = await client_of(["127.0.0.1"])
    assert (await client.get(f"http://shop.example:{port}/")).text == "ok"
