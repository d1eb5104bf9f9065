"""A server that says what a test tells it to: for the client and the command line."""

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

NOW = "2026-11-21T09:30:00Z"


class BrokenOff(Exception):
    """Ends a response before it is complete, as a killed server does."""


@dataclass
class Asked:
    """A request the server got."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FakeServer:
    """Answers each request with the next of the answers told for it; the last one is given again and again."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    _answers: dict[tuple[str, str], list[Response]] = field(default_factory=dict)

    def on(
        self, method: str, path: str, value: Any = None, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._add(method, path, lambda: Response(body, status_code=status, headers=headers))

    def problem(self, method: str, path: str, code: str, status: int, **context: Any) -> None:
        value = {"type": "about:blank", "title": "No", "status": status, "detail": f"About {code}.", "code": code}
        self.on(method, path, value | {"instance": path} | context, status=status)

    def stream(self, method: str, path: str, *chunks: bytes, breaks: bool = False) -> None:
        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk
            if breaks:
                raise BrokenOff

        self._add(method, path, lambda: StreamingResponse(body(), media_type="text/event-stream"))

    def _add(self, method: str, path: str, make: Any) -> None:
        self._answers.setdefault((method, path), []).append(make)

    async def answer(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        asked = Asked(request.method, path, dict(request.query_params), dict(request.headers), await request.body())
        self.asked.append(asked)
        answers = self._answers.get((request.method, path))
        if not answers:
            return Response(f"nothing was told for {request.method} {path}", status_code=599)
        make: Any = answers.pop(0) if len(answers) > 1 else answers[0]
        response: Response = make()
        return response


class Wire:
    """Texts as the real server sends them."""

    @staticmethod
    def session(session_id: str = "s1", **more: Any) -> dict[str, Any]:
        told = {"id": session_id, "status": "idle", "created_at": NOW, "last_active_at": NOW, "turn_count": 2}
        return told | {"title": "First", "cost_usd": 0.25, "spec": {}, "last_seq": 9} | more

    @staticmethod
    def turn(turn_id: str = "t1", **more: Any) -> dict[str, Any]:
        return {"id": turn_id, "session_id": "s1", "number": 1, "status": "queued", "created_at": NOW} | more

    @staticmethod
    def event(seq: int, type: str, turn_id: str | None = "t1", **data: Any) -> bytes:
        value = {"seq": seq, "type": type, "turn_id": turn_id, "at": NOW, "data": data}
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, type.encode(), json.dumps(value, ensure_ascii=False).encode())

    @staticmethod
    def delta(text: str, offset: int = 0, *, message: str = "m1", kind: str = "text", turn_id: str = "t1") -> bytes:
        value = {"type": "delta", "kind": kind, "turn_id": turn_id, "message_id": message, "block": 0}
        return (
            b"event: delta\ndata: %s\n\n"
            % json.dumps(value | {"offset": offset, "text": text}, ensure_ascii=False).encode()
        )

    @classmethod
    def said(cls, seq: int, text: str, *, message: str = "m1", turn_id: str = "t1") -> bytes:
        return cls.event(seq, "message.assistant", turn_id, message_id=message, block=0, text=text)

    @classmethod
    def completed(cls, seq: int, status: str = "succeeded", turn_id: str = "t1", **data: Any) -> bytes:
        return cls.event(seq, "turn.completed", turn_id, status=status, num_turns=1, **data)


@pytest.fixture
def wire() -> type[Wire]:
    return Wire


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """It listens on loopback in a thread of its own."""
    fake = FakeServer()
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", fake.answer, methods=methods)])
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, log_level="critical", lifespan="off", ws="none", loop="asyncio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="fake server")
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive(), "the fake server ended while it was starting"
        assert time.monotonic() < deadline, "the fake server did not start"
        time.sleep(0.005)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield fake
    server.should_exit = True
    server.force_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def data(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of the fake server, which CARREL_DATA names."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "server.json").write_text(json.dumps({"url": fake.url, "pid": 1}))
    (folder / "admin.key").write_text("the-key")
    monkeypatch.setenv("CARREL_DATA", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port of loopback on which nobody listens, held so that nobody will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
