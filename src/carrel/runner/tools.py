"""The gateway's tools, as the agent's own MCP server: what it asks of it is asked of the gateway, as often as it takes.

A gateway that is away comes back: the same call is then repeated under the same key, by which the gateway knows what of it
is done already. So no child is begun twice, and no question asked twice, whatever dies meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import mcp_types as types
import structlog
from mcp.server.lowlevel.server import Server

from carrel.model import new_id

__all__ = ["NAME", "SKILLS", "SessionTools"]

log = structlog.get_logger(__name__)

NAME = "carrel"
"""What the server is called; its tools are `mcp__carrel__…`."""

SKILLS = Path(__file__).with_name("skills")
"""A plugin of Claude Code's with skills that say how the tools are used."""

_PATH = "/mcp"
_PROTOCOL = "2025-06-18"
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_LONGEST_LINE = 64 * 1024 * 1024
_REFUSED = range(400, 500)


class _AwayError(Exception):
    """The gateway did not answer, or not to the end."""


class _RefusedError(Exception):
    """The gateway does not take the call."""


class SessionTools:
    """Tools of one sandbox's agent."""

    def __init__(self, socket: str, token: str, *, patience_seconds: float) -> None:
        """Make it; nothing is connected before a tool is used.

        Args:
            socket: the unix socket of the gateway's that sandboxes see.
            token: the agent's.
            patience_seconds: how long a gateway that is away is waited for.
        """
        self._socket = socket
        self._token = token
        self._patience_seconds = patience_seconds

    def server(self) -> Any:
        """The server, for the Agent SDK to run."""
        return Server(NAME, on_list_tools=self._list, on_call_tool=self._call)

    async def _list(self, context: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult.model_validate(await self._ask("tools/list", {}))

    async def _call(self, context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        given = {"name": params.name, "arguments": params.arguments or {}}
        return types.CallToolResult.model_validate(await self._ask("tools/call", given))

    async def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        key = new_id()
        pause, since = _FIRST_PAUSE_SECONDS, time.monotonic()
        while True:
            try:
                return await self._try(key, method, params)
            except (_AwayError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                if time.monotonic() - since > self._patience_seconds:
                    raise _RefusedError("the gateway does not answer") from error
                log.info("tools.away", error=repr(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _try(self, key: str, method: str, params: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        head = [
            f"POST {_PATH} HTTP/1.1",
            "host: gateway",
            f"authorization: Bearer {self._token}",
            "content-type: application/json",
            "accept: application/json, text/event-stream",
            f"mcp-protocol-version: {_PROTOCOL}",
            f"idempotency-key: {key}",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=_LONGEST_LINE)
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            await writer.drain()
            status = int((await reader.readline()).split(b" ", 2)[1] or 0)
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            if status in _REFUSED:
                raise _RefusedError(f"the gateway refuses the call ({status})")
            if status != 200:
                raise _AwayError(status)
            return await _answer(reader, chunked=b"transfer-encoding: chunked" in headers)
        except (IndexError, ValueError) as error:
            raise _AwayError(repr(error)) from error
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, *, chunked: bool) -> dict[str, Any]:
    """The result in an answer, which is JSON or a stream of events."""
    rest = b""
    while True:
        part = await _chunk(reader) if chunked else await reader.read(65_536)
        rest += part
        *lines, rest = rest.split(b"\n") if part else (rest, b"")
        for line in lines:
            found = _result(line.removeprefix(b"data:").strip())
            if found is not None:
                return found
        if not part:
            raise _AwayError("the answer broke off")


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline()).strip() or b"0", 16)
    data = await reader.readexactly(size + 2)
    return data[:size]


def _result(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    message = json.loads(line)
    if "error" in message:
        raise _RefusedError(str(message["error"].get("message")))
    result = message.get("result")
    return result if isinstance(result, dict) else None
