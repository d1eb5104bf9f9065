"""From a name to a connection: to the address that was checked, whatever the name's answers become."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address

import pytest

from carrel.egress import Dialler, Judge
from carrel.egress.dialling import NotDialled


class Answers:
    """A resolver that answers something else each time."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append((host, port))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Loopback(Judge):
    """Takes 127.0.0.1 for a public address, and 127.0.0.2 for a private one."""

    def permits(self, address):
        return address == ip_address("127.0.0.1")


@asynccontextmanager
async def listening(host="127.0.0.1"):
    visitors = []

    async def greet(reader, writer):
        visitors.append(writer.get_extra_info("sockname")[0])
        writer.write(b"hello")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, host, 0)
    try:
        yield server.sockets[0].getsockname()[1], visitors
    finally:
        server.close()


async def reason_of(dialler, host="name.example", port=80):
    with pytest.raises(NotDialled) as refused:
        await dialler.connect(host, port)
    return refused.value.reason


async def test_a_name_that_turns_is_asked_for_once():
    """The first answer is public and checked; the one that a second question would get is not."""
    resolve = Answers(["127.0.0.1"], ["127.0.0.2"])
    async with listening() as (port, visitors):
        reader, writer = await Dialler(Loopback(), resolve).connect("turning.example", port)
        assert await reader.read() == b"hello"
        writer.close()
    assert visitors == ["127.0.0.1"]
    assert resolve.asked == [("turning.example", port)]
    assert await reason_of(Dialler(Loopback(), resolve)) == "private_address"


async def test_of_several_addresses_only_public_ones_are_tried():
    resolve = Answers(["127.0.0.2", "fe80::1%lo", "127.0.0.1"])
    async with listening() as (port, visitors):
        _, writer = await Dialler(Loopback(), resolve).connect("mixed.example", port)
        writer.close()
    assert visitors == ["127.0.0.1"]


async def test_an_address_that_does_not_answer_gives_way_to_the_next():
    class Both(Judge):
        def permits(self, address):
            return True

    async with listening() as (port, visitors):
        _, writer = await Dialler(Both(), Answers(["127.0.0.9", "127.0.0.1"])).connect("two.example", port)
        writer.close()
    assert visitors == ["127.0.0.1"]


async def test_why_there_is_no_connection():
    async with listening() as (port, _):
        pass
    assert await reason_of(Dialler(Loopback(), Answers(["127.0.0.1"])), port=port) == "unreachable"
    assert await reason_of(Dialler(Loopback(), Answers(OSError("no such name")))) == "unresolved"
    assert await reason_of(Dialler(Loopback(), Answers([]))) == "unresolved"
    for private in (["10.0.0.1"], ["169.254.169.254", "::1"], ["fe80::1%eth0"], ["::ffff:192.168.0.1"]):
        assert await reason_of(Dialler(Judge(), Answers(private))) == "private_address"


async def test_this_machines_resolver_is_asked():
    async with AsyncExitStack() as stack, listening() as (port, _):
        dialler = Dialler(Loopback())
        await dialler.start(stack)
        _, writer = await dialler.connect("localhost", port)
        writer.close()
        assert await reason_of(Dialler(Judge()), "localhost", port) == "private_address"
