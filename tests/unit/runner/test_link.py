"""The runner's link: every numbered frame arrives once and in order, whatever becomes of the connection."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import websockets.asyncio.server as ws
from pydantic_core import to_json
from websockets.exceptions import ConnectionClosed

from carrel.errors import SpoolFull
from carrel.protocol.bootstrap import Bootstrap
from carrel.protocol.link import (
    RUNNER_FRAME,
    Ack,
    Activity,
    DeltaFrame,
    GatewayFrame,
    Hello,
    OpenBlock,
    OpenBlocks,
    Refused,
    RunnerFrame,
    SetModel,
)
from carrel.runner.link import Link, LinkLost


def bootstrap(folder: Path, **changes: Any) -> Bootstrap:
    values: dict[str, Any] = {
        "sandbox_id": "b", "generation": 1, "link_socket": str(folder / "link.sock"), "link_token": "l",
        "agent_token": "a", "lock_path": "", "log_path": "", "spool_path": str(folder / "spool"), "cli_path": "",
        "cwd": "", "workspace": "", "home": "", "config_dir": "", "agent_env": {}, "reconnect_window_seconds": 20.0,
    }  # fmt: skip
    return Bootstrap(**values | changes)


class Gateway:
    """Stores what it is sent, in memory; what a connection does is up to `behave`."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "link.sock")
        self.hellos: list[Hello] = []
        self.received: list[RunnerFrame] = []
        self.stored: list[int] = []
        self.connection: ws.ServerConnection | None = None
        self.on_frame: Callable[[ws.ServerConnection, RunnerFrame], Any] = self.acknowledge
        self.arrived = asyncio.Event()

    async def acknowledge(self, connection: ws.ServerConnection, frame: RunnerFrame) -> None:
        if (n := getattr(frame, "n", None)) is not None:
            if n > (self.stored[-1] if self.stored else 0):
                self.stored.append(n)
            await connection.send(to_json(Ack(n=n)))

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Gateway"]:
        async with ws.unix_serve(self._serve, self._path):
            yield self

    async def _serve(self, connection: ws.ServerConnection) -> None:
        self.connection = connection
        with suppress(ConnectionClosed):
            async for message in connection:
                data = message if isinstance(message, bytes) else message.encode()
                for line in data.split(b"\n"):
                    frame = RUNNER_FRAME.validate_json(line)
                    self.received.append(frame)
                    if isinstance(frame, Hello):
                        self.hellos.append(frame)
                    self.arrived.set()
                    await self.on_frame(connection, frame)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.arrived.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.arrived.wait(), 0.02)


class Side:
    """The runner's side: a link that runs, and what it was told."""

    def __init__(self, boot: Bootstrap) -> None:
        self.told: list[GatewayFrame] = []
        self.open_blocks: list[OpenBlock] = []
        self.link = Link(boot, hello=lambda: {"bound": False}, open_blocks=lambda: self.open_blocks, receive=self._take)
        self.task: asyncio.Task[None]

    async def _take(self, frame: GatewayFrame) -> None:
        self.told.append(frame)

    def send(self, count: int = 1) -> None:
        for _ in range(count):
            self.link.send(lambda n: Activity(n=n, background_tasks=0))

    async def drained(self, seconds: float = 10.0) -> bool:
        await self.link.drain(seconds, self.task)
        return not len(self.link._outbox)

    async def __aenter__(self) -> "Side":
        self.task = asyncio.create_task(self.link.run(), name="link under test")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.link.close()


async def test_it_says_hello_and_what_it_is_told_arrives(tmp_path: Path) -> None:
    async with Gateway(tmp_path).open() as gateway, Side(bootstrap(tmp_path)) as side:
        side.send(3)
        await gateway.until(lambda: len(gateway.stored) == 3)
        assert await side.drained()
        assert gateway.hellos[0].model_dump(include={"sandbox_id", "token", "generation", "last_acked", "bound"}) == {
            "sandbox_id": "b", "token": "l", "generation": 1, "last_acked": 0, "bound": False,
        }  # fmt: skip
        assert isinstance(gateway.received[0], Hello)
        assert gateway.connection is not None
        await gateway.connection.send(b"\n".join(to_json(SetModel(id=str(i), model="m")) for i in range(3)))
        await gateway.until(lambda: len(side.told) == 3)


async def test_what_was_sent_before_there_was_a_gateway_is_sent_then(tmp_path: Path) -> None:
    async with Side(bootstrap(tmp_path)) as side:
        side.send(5)
        side.link.send_delta(to_json(DeltaFrame(delta="text", message_id="m", text="dropped")))
        assert not await side.drained(0.05)
        async with Gateway(tmp_path).open() as gateway:
            await gateway.until(lambda: gateway.stored == [1, 2, 3, 4, 5])
            assert await side.drained()
            assert not any(isinstance(frame, DeltaFrame) for frame in gateway.received)


async def test_after_a_loss_exactly_what_was_not_acknowledged_is_sent_again(tmp_path: Path) -> None:
    async with Gateway(tmp_path).open() as gateway, Side(bootstrap(tmp_path)) as side:

        async def acknowledge_up_to_three(connection: ws.ServerConnection, frame: RunnerFrame) -> None:
            if getattr(frame, "n", 9) <= 3:
                await gateway.acknowledge(connection, frame)

        gateway.on_frame = acknowledge_up_to_three
        side.send(6)
        await gateway.until(lambda: side.link._outbox.last_acked == 3 and len(gateway.received) == 7)
        gateway.received.clear()
        gateway.on_frame = gateway.acknowledge
        assert gateway.connection is not None
        await gateway.connection.close()
        side.send(1)
        await gateway.until(lambda: gateway.stored == [1, 2, 3, 4, 5, 6, 7])
        assert gateway.hellos[-1].last_acked == 3
        assert [frame.n for frame in gateway.received if hasattr(frame, "n")] == [4, 5, 6, 7]


@pytest.mark.parametrize("seed", range(6))
async def test_under_random_disconnects_every_frame_arrives_in_order(seed: int, tmp_path: Path) -> None:
    """Small bounds, so that the spool on disk takes part."""
    die = random.Random(seed)
    gateway = Gateway(tmp_path)

    async def erratic(connection: ws.ServerConnection, frame: RunnerFrame) -> None:
        n = getattr(frame, "n", None)
        if n is None:
            return
        assert n <= (gateway.stored[-1] if gateway.stored else 0) + 1, "never a gap"
        if die.random() < 0.9:
            if n == (gateway.stored[-1] if gateway.stored else 0) + 1:
                gateway.stored.append(n)
            if die.random() < 0.5:
                await connection.send(to_json(Ack(n=gateway.stored[-1])))
        else:
            # The connection breaks before this frame is stored: those behind it, on the way, are lost with it.
            connection.transport.abort()
            raise ConnectionClosed(None, None)

    gateway.on_frame = erratic
    boot = bootstrap(tmp_path, outbox_memory_bytes=300, outbox_disk_bytes=1_000_000)
    async with AsyncExitStack() as stack:
        side = await stack.enter_async_context(Side(boot))
        await stack.enter_async_context(gateway.open())
        for _ in range(20):
            side.send(die.randrange(1, 12))
            side.link.send_delta(to_json(DeltaFrame(delta="text", message_id="m", text="x")))
            if die.random() < 0.3:
                await asyncio.sleep(0)
        total = side.link.next_number - 1
        await gateway.until(lambda: gateway.stored and gateway.stored[-1] == total)
        assert gateway.stored == list(range(1, total + 1))
        assert len(gateway.hellos) > 1, "there were disconnects"
        gateway.on_frame = gateway.acknowledge
        side.send()
        assert await side.drained()
        assert not Path(boot.spool_path).exists()


async def test_after_hello_comes_the_text_so_far(tmp_path: Path) -> None:
    side = Side(bootstrap(tmp_path))
    side.open_blocks = [OpenBlock(turn_id="t", kind="text", message_id="m", block=0, text="so far")]
    async with side, Gateway(tmp_path).open() as gateway:
        await gateway.until(lambda: len(gateway.received) >= 2)
        assert [type(frame) for frame in gateway.received] == [Hello, OpenBlocks]


async def test_what_is_said_while_it_connects_is_said_once(tmp_path: Path) -> None:
    """It is in the outbox already when what is owed is sent, and waits in the queue too."""
    side = Side(bootstrap(tmp_path))

    def speak() -> list[OpenBlock]:
        side.send()
        return []

    side.link._open_blocks = speak
    side.send(2)
    async with Gateway(tmp_path).open() as gateway, side:
        await gateway.until(lambda: gateway.stored == [1, 2, 3])
        assert await side.drained()
        assert [frame.n for frame in gateway.received if hasattr(frame, "n")] == [1, 2, 3]


async def test_a_gateway_that_does_not_read_costs_deltas_and_no_event(tmp_path: Path) -> None:
    async with Gateway(tmp_path).open() as gateway, Side(bootstrap(tmp_path)) as side:
        reading = asyncio.Event()

        async def wait_first(connection: ws.ServerConnection, frame: RunnerFrame) -> None:
            if isinstance(frame, Hello):
                await reading.wait()
            await gateway.acknowledge(connection, frame)

        gateway.on_frame = wait_first
        await gateway.until(lambda: gateway.hellos)
        large = to_json(DeltaFrame(delta="text", message_id="m", text="x" * 1_000_000))
        for i in range(40):
            side.link.send_delta(large)
            if i % 10 == 0:
                side.send()
        assert side.link._queued_bytes < 10_000_000, "what waits is bounded"
        side.open_blocks = [OpenBlock(turn_id="t", kind="text", message_id="m", block=0, text="all of it")]
        reading.set()
        await gateway.until(lambda: gateway.stored == [1, 2, 3, 4])
        await gateway.until(lambda: any(isinstance(frame, OpenBlocks) for frame in gateway.received))


async def test_a_refused_runner_gives_up(tmp_path: Path) -> None:
    async with Gateway(tmp_path).open() as gateway, Side(bootstrap(tmp_path)) as side:

        async def refuse(connection: ws.ServerConnection, frame: RunnerFrame) -> None:
            await connection.send(to_json(Refused(reason="a newer one has the session")))

        gateway.on_frame = refuse
        with pytest.raises(LinkLost, match="a newer one"):
            await asyncio.wait_for(side.task, 10)


async def test_without_a_gateway_it_gives_up_when_the_window_has_passed(tmp_path: Path) -> None:
    async with Side(bootstrap(tmp_path, reconnect_window_seconds=0.2)) as side:
        with pytest.raises(LinkLost, match="window"):
            await asyncio.wait_for(side.task, 10)


async def test_a_full_spool_is_said_to_the_sender(tmp_path: Path) -> None:
    async with Side(bootstrap(tmp_path, outbox_memory_bytes=50, outbox_disk_bytes=50)) as side:
        with pytest.raises(SpoolFull):
            side.send(10)
        kept = side.link.next_number - 1
        async with Gateway(tmp_path).open() as gateway:
            await gateway.until(lambda: gateway.stored == list(range(1, kept + 1)))
            assert await side.drained()  # stored is not yet acknowledged: only that makes room
            side.send()
            await gateway.until(lambda: gateway.stored[-1] == kept + 1)
