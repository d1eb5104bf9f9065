"""What an agent asks of the gateway's tools is asked until it is answered, under one key."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carrel.runner.tools import SessionTools


class Gateway:
    """Answers as it is told: a body of JSON, a stream in pieces, a status, or nothing at all."""

    def __init__(self, path: Path, *answers: Callable[[asyncio.StreamWriter], None]) -> None:
        self.path = path
        self.answers = list(answers)
        self.heard: list[tuple[str, str, dict[str, Any]]] = []

    async def __aenter__(self) -> "Gateway":
        self.server = await asyncio.start_unix_server(self._take, str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        size = int(re.search(r"content-length: (\d+)", head)[1])  # type: ignore[index]
        body = json.loads(await reader.readexactly(size))
        key = re.search(r"idempotency-key: (\S+)", head)[1]  # type: ignore[index]
        self.heard.append((key, head, body))
        self.answers.pop(0)(writer)
        writer.close()


def said(result: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode()


def whole(result: dict[str, Any]) -> Callable[[asyncio.StreamWriter], None]:
    body = said(result)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    return lambda writer: writer.write(head + body)


def streamed(result: dict[str, Any]) -> Callable[[asyncio.StreamWriter], None]:
    text = b": still here\n\nevent: message\ndata: " + said(result) + b"\n\n"

    def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in (text[:30], text[30:]):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")

    return answer


def status(code: int) -> Callable[[asyncio.StreamWriter], None]:
    return lambda writer: writer.write(f"HTTP/1.1 {code} No\r\ncontent-length: 0\r\n\r\n".encode())


def broken(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n: hel")


def dead(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.mark.parametrize("answer", [whole, streamed])
async def test_an_answer_is_read_in_either_form(tmp_path: Path, answer: Any) -> None:
    async with Gateway(tmp_path / "g", answer({"tools": []})) as gateway:
        tools = SessionTools(str(gateway.path), "cak-token", patience_seconds=5)
        assert await tools._ask("tools/list", {}) == {"tools": []}
        ((_, head, body),) = gateway.heard
        assert "authorization: Bearer cak-token" in head
        assert body["method"] == "tools/list"


async def test_what_breaks_off_is_asked_again_under_the_same_key(tmp_path: Path) -> None:
    async with Gateway(tmp_path / "g", dead, broken, status(503), whole({"content": []}), whole({})) as gateway:
        tools = SessionTools(str(gateway.path), "t", patience_seconds=30)
        assert await tools._ask("tools/call", {"name": "spawn_child"}) == {"content": []}
        assert len({key for key, _, _ in gateway.heard}) == 1
        assert len(gateway.heard) == 4
        await tools._ask("tools/call", {"name": "spawn_child"})
        assert len({key for key, _, _ in gateway.heard}) == 2, "another call has another key"


async def test_a_refusal_is_final_and_so_is_a_gateway_that_stays_away(tmp_path: Path) -> None:
    async with Gateway(tmp_path / "g", status(401)) as gateway:
        with pytest.raises(Exception, match="401"):
            await SessionTools(str(gateway.path), "t", patience_seconds=5)._ask("tools/list", {})
        assert len(gateway.heard) == 1
    with pytest.raises(Exception, match="does not answer"):
        await SessionTools(str(tmp_path / "nowhere"), "t", patience_seconds=0.01)._ask("tools/list", {})
