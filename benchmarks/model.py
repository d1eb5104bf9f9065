"""The scripted model in a process of its own, which also keeps a record of when requests came and answers began.

`python -m benchmarks.model` prints its port. `GET /bench/marks` hands the record over and starts a new one.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from collections import deque
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carrel.model_gateway.scripted import create_app

_NUMBER = re.compile(rb'"text":"\s*(\d+)')


class Recorder:
    """Wraps the model: one mark for each request, and, while `tracing`, when each number of a count was sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._marks: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._tracing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith("/bench/"):
            await self._answer(path, send)
            return
        if path != "/v1/messages":
            await self._app(scope, receive, send)
            return
        mark: dict[str, Any] = {"arrived": time.time(), "first": None, "numbers": {}}
        self._marks.append(mark)

        async def watched(message: Message) -> None:
            body = message.get("body", b"")
            if mark["first"] is None and b"content_block_delta" in body:
                mark["first"] = time.time()
            if self._tracing:
                now = time.time()
                mark["numbers"] |= dict.fromkeys((int(number) for number in _NUMBER.findall(body)), now)
            await send(message)

        await self._app(scope, receive, watched)

    async def _answer(self, path: str, send: Send) -> None:
        told: list[dict[str, Any]] = []
        if path == "/bench/marks":
            told = list(self._marks)
            self._marks.clear()
        else:
            self._tracing = path == "/bench/trace/on"
        body = json.dumps(told).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def main() -> int:
    """Serve until told to end."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(
        Recorder(create_app()), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
