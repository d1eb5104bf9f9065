"""Many subscribers of one session in one process: `python -m benchmarks.subscribers OPTIONS` (JSON).

Says `{"ready": …}` when all are connected, and what they received once each has seen the turn's end.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import sys
import time
from typing import Any, cast

import uvloop

from benchmarks.wire import Address, request_bytes

_FRAME = b"event: "
_END = b"event: turn.completed"
_NUMBER = re.compile(rb'event: delta\ndata: [^\n]*"text":"\s*(\d+)')


class Crowd:
    """What all subscribers of this process have seen."""

    def __init__(self, count: int, *, traced: bool) -> None:
        self._left = self._missing = count
        self.traced = traced
        self.frames = 0
        self.lost = 0
        self.first = 0.0
        self.last = 0.0
        self.received: dict[int, list[float]] = {}
        self.ready = asyncio.Event()
        self.over = asyncio.Event()

    def one_connected(self) -> None:
        """A subscriber has its first frame."""
        self._missing -= 1
        if not self._missing:
            self.ready.set()

    def one_ended(self) -> None:
        """A subscriber has seen the turn's end."""
        self._left -= 1
        if not self._left:
            self.over.set()

    def one_lost(self) -> None:
        """A subscriber's connection ended before its time."""
        self.lost += 1
        self.ready.set()
        self.over.set()

    def took(self, frames: int, now: float) -> None:
        """A subscriber received frames."""
        self.frames += frames
        self.first = self.first or now
        self.last = now


class Subscriber(asyncio.Protocol):
    """One connection. Counts, and looks closer only where the numbers are wanted."""

    def __init__(self, crowd: Crowd, request: bytes) -> None:
        self._crowd = crowd
        self._request = request
        self._connected = False
        self._ended = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        cast("asyncio.Transport", transport).write(self._request)  # uvloop's are none by inheritance

    def connection_lost(self, error: Exception | None) -> None:
        """Say so, rather than wait for what will not come."""
        if not self._ended:
            self._crowd.one_lost()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        now = time.time()
        # A frame may be cut anywhere: what follows the last whole one waits for more.
        whole, end, rest = (self._rest + data).rpartition(b"\n\n")
        self._rest = rest
        frames = whole.count(_FRAME) if end else 0
        if not frames:
            return
        if not self._connected:
            # What was stored before, asked for so that it can be seen when the server has begun to follow.
            self._connected = True
            self._crowd.one_connected()
            return
        self._crowd.took(frames, now)
        if self._crowd.traced:
            for number in _NUMBER.findall(whole):
                self._crowd.received.setdefault(int(number), []).append(now)
        if not self._ended and _END in whole:
            self._ended = True
            self._crowd.one_ended()


async def main(options: dict[str, Any]) -> None:
    """Subscribe, tell, wait, tell."""
    address = Address(options["host"], options["port"], options["key"])
    request = request_bytes(address, "GET", options["path"], stream=True)
    crowd = Crowd(options["count"], traced=options["traced"])
    loop = asyncio.get_running_loop()
    transports = []
    for _ in range(options["count"]):
        transport, _ = await loop.create_connection(lambda: Subscriber(crowd, request), address.host, address.port)
        transports.append(transport)
    await crowd.ready.wait()
    print(json.dumps({"ready": True}), flush=True)
    await crowd.over.wait()
    told = {
        "lost": crowd.lost,
        "frames": crowd.frames,
        "first": crowd.first,
        "last": crowd.last,
        "received": crowd.received,
    }
    print(json.dumps(told), flush=True)
    for transport in transports:
        transport.close()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(json.loads(sys.argv[1])))
