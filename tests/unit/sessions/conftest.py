"""Gateways over fake sandboxes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from carrel.protocol.events import StoredEvent
from carrel.sessions.owner import OwnerOptions
from carrel.testing import FakeGateway, FakeHost, FakeTurn
from carrel.testing.fakes import FakeRunner


class OpenGateway(Protocol):
    async def __call__(self, **options: Any) -> FakeGateway: ...


@pytest.fixture
async def host() -> AsyncIterator[FakeHost]:
    async with FakeHost() as host:

        async def hold(turn: FakeTurn) -> None:
            turn.delta("half a ")
            await turn.interrupted.wait()
            turn.finish()

        async def forget(turn: FakeTurn) -> None:
            """Is never over, whatever it is told."""
            await asyncio.Event().wait()

        host.scripts |= {"hold": hold, "forget": forget}
        yield host


@pytest.fixture
async def open_gateway(host: FakeHost, tmp_path: Path) -> AsyncIterator[OpenGateway]:
    """Opens a gateway; opened again, it is the same one restarted. `idle_timeout_seconds` and the like are options."""
    async with AsyncExitStack() as stack:

        async def open_gateway(**options: Any) -> FakeGateway:
            limits = {name: options.pop(name) for name in list(options) if name in OwnerOptions.__annotations__}
            gateway = FakeGateway(host, tmp_path, owner_options=OwnerOptions(**limits), **options)
            return await stack.enter_async_context(gateway)

        yield open_gateway


@pytest.fixture
async def gateway(open_gateway: OpenGateway) -> FakeGateway:
    return await open_gateway()


Eventually = Callable[..., Awaitable[None]]


@pytest.fixture
def eventually() -> Eventually:
    """`await eventually(lambda: condition)`, with a deadline."""

    async def wait(condition: Callable[[], object], seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
            await asyncio.sleep(0.002)

    return wait


@pytest.fixture
def story() -> Callable[[list[StoredEvent]], list[str]]:
    """What a log tells, in short: types, with the status or text where there is one."""

    def tell(log: list[StoredEvent]) -> list[str]:
        assert [event.seq for event in log] == list(range(1, len(log) + 1)), "numbered without gaps"
        found = []
        for event in log:
            data = event.data
            more = data.get("status") or data.get("text") or data.get("tool") or ""
            if event.type == "message.user":
                more = data["content"][0]["text"]
            found.append(f"{event.type} {more}".strip())
        return found

    return tell


@pytest.fixture
def runner_of(host: FakeHost) -> Callable[[], FakeRunner]:
    """The one runner that is alive."""

    def find() -> FakeRunner:
        (runner,) = host.alive
        return runner

    return find
