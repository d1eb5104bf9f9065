"""The runner's connection to its gateway: dials, says hello, sends what is owed, dials again.

One WebSocket message carries one or more frames, a JSON text each, separated by line feeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
from pydantic_core import to_json
from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from carrel.protocol.bootstrap import Bootstrap
from carrel.protocol.link import GATEWAY_FRAME, Ack, GatewayFrame, Hello, NumberedFrame, OpenBlock, OpenBlocks, Refused
from carrel.runner.outbox import Outbox

log = structlog.get_logger(__name__)

_BATCH_BYTES = 1024 * 1024
_GATHER_SECONDS = 0.002
_DELTA_BACKLOG_BYTES = 8 * 1024 * 1024


class LinkLost(Exception):
    """No gateway was reached within the reconnect window, or the gateway does not want this runner any more."""


class Link:
    """Carries frames both ways and outlives its connections."""

    def __init__(
        self,
        bootstrap: Bootstrap,
        *,
        hello: Callable[[], dict[str, Any]],
        open_blocks: Callable[[], list[OpenBlock]],
        receive: Callable[[GatewayFrame], Awaitable[None]],
    ) -> None:
        """Make the link; nothing is dialled before `run`.

        Args:
            bootstrap: who this runner is and whom it dials.
            hello: the parts of `Hello` that the agent knows.
            open_blocks: the text so far of every block that is being made.
            receive: what to do with a frame of the gateway's.
        """
        self._bootstrap = bootstrap
        self._hello = hello
        self._open_blocks = open_blocks
        self._receive = receive
        self._outbox = Outbox(
            Path(bootstrap.spool_path),
            memory_bytes=bootstrap.outbox_memory_bytes,
            disk_bytes=bootstrap.outbox_disk_bytes,
        )
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._skipped_deltas = False
        self._connected = False
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._awaited: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def next_number(self) -> int:
        """The number of the next numbered frame."""
        return self._outbox.next_number

    def send(self, make: Callable[[int], NumberedFrame], *, last_words: bool = False) -> None:
        """Queue a numbered frame; it is kept until the gateway has stored it. Last words find room where others do not.

        Raises:
            SpoolFull: the gateway was away for too long.
        """
        data = to_json(make(self._outbox.next_number))
        self._outbox.put(data, last_words=last_words)
        self._drained.clear()
        if self._connected:
            self._push(data)

    def send_now(self, frame: Any) -> None:
        """Send an unnumbered frame on this connection; it is dropped where there is none."""
        if self._connected:
            self._push(to_json(frame))

    def send_delta(self, data: bytes) -> None:
        """Send a delta, unless the connection is down or too far behind; the gap is mended when it has caught up."""
        if not self._connected:
            return
        if self._queued_bytes > _DELTA_BACKLOG_BYTES:
            self._skipped_deltas = True
            return
        self._push(data)

    def _push(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._wake.set()

    async def stored(self) -> None:
        """Wait until the gateway has stored everything that was sent so far, for however long that takes."""
        last = self._outbox.next_number - 1
        if last <= self._outbox.last_acked:
            return
        acked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.append((last, acked))
        await acked

    def _tell_stored(self) -> None:
        while self._awaited and self._awaited[0][0] <= self._outbox.last_acked:
            acked = self._awaited.popleft()[1]
            if not acked.done():
                acked.set_result(None)

    async def drain(self, timeout_seconds: float, running: asyncio.Task[None]) -> None:
        """Wait until everything sent is stored, the time is over, or `running` (this link's `run`) has ended."""
        drained = asyncio.create_task(self._drained.wait(), name="drained")
        try:
            await asyncio.wait({drained, running}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()

    async def run(self) -> None:
        """Stay connected.

        Raises:
            LinkLost: the reconnect window has passed without a gateway, or the gateway refused this runner.
        """
        lost_at = time.monotonic()
        pause = 0.02
        while True:
            try:
                async with unix_connect(
                    self._bootstrap.link_socket,
                    uri="ws://gateway/link",
                    max_size=self._bootstrap.max_frame_bytes * 2,
                    compression=None,
                    open_timeout=10,
                    ping_interval=20,
                    ping_timeout=60,
                ) as connection:
                    await self._talk(connection)
                lost_at, pause = time.monotonic(), 0.02
            except (OSError, ConnectionClosed, InvalidHandshake, TimeoutError) as error:
                if self._connected:
                    lost_at, pause = time.monotonic(), 0.02
                log.info("link.lost", error=repr(error))
            finally:
                self._connected = False
            if time.monotonic() - lost_at > self._bootstrap.reconnect_window_seconds:
                raise LinkLost("no gateway within the reconnect window")
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    async def _talk(self, connection: ClientConnection) -> None:
        self._queue.clear()
        self._queued_bytes = 0
        self._push(
            to_json(
                Hello(
                    sandbox_id=self._bootstrap.sandbox_id,
                    token=self._bootstrap.link_token,
                    generation=self._bootstrap.generation,
                    last_acked=self._outbox.last_acked,
                    **self._hello(),
                )
            )
        )
        # What was numbered before this line is owed and comes from the outbox; what comes later is queued behind it.
        owed_up_to = self._outbox.next_number - 1
        self._connected = True
        self._send_open_blocks()
        both = {
            asyncio.create_task(self._write(connection, owed_up_to), name="link-writer"),
            asyncio.create_task(self._read(connection), name="link-reader"),
        }
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    def _send_open_blocks(self) -> None:
        if blocks := self._open_blocks():
            self.send_now(OpenBlocks(blocks=blocks))

    async def _read(self, connection: ClientConnection) -> None:
        async for message in connection:
            text = message if isinstance(message, bytes) else message.encode()
            for line in text.split(b"\n"):
                frame = GATEWAY_FRAME.validate_json(line)
                if isinstance(frame, Ack):
                    self._outbox.ack(frame.n)
                    self._tell_stored()
                    if not len(self._outbox):
                        self._drained.set()
                    continue
                if isinstance(frame, Refused):
                    raise LinkLost(f"refused: {frame.reason}")
                await self._receive(frame)

    async def _write(self, connection: ClientConnection, owed_up_to: int) -> None:
        hello = self._queue.popleft()
        self._queued_bytes -= len(hello)
        await connection.send(hello)
        for n, frame in self._outbox.after(self._outbox.last_acked):
            if n <= owed_up_to:
                await connection.send(frame)
        sent_at = 0.0
        while True:
            if not self._queue:
                if self._skipped_deltas:
                    self._skipped_deltas = False
                    self._send_open_blocks()
                    continue
                self._wake.clear()
                await self._wake.wait()
                # What comes first after a silence goes at once; in a flood, frames share a message and its system call.
                await asyncio.sleep(max(0.0, sent_at + _GATHER_SECONDS - time.monotonic()))
            batch = [self._queue.popleft()]
            size = len(batch[0])
            while self._queue and size + len(self._queue[0]) <= _BATCH_BYTES:
                size += len(self._queue[0])
                batch.append(self._queue.popleft())
            self._queued_bytes -= size
            sent_at = time.monotonic()
            await connection.send(b"\n".join(batch))

    def close(self) -> None:
        """Remove what is left on disk."""
        with contextlib.suppress(OSError):
            self._outbox.close()
