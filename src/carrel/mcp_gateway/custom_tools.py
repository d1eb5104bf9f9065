"""Tools that an environment declares as addresses: an agent's call becomes a signed request, whose answer is the result."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from hashlib import sha256
from typing import Any

import httpx
import mcp_types as types
import structlog
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send

from carrel import __version__
from carrel.errors import SecretMissing, StoreUnavailable
from carrel.mcp_gateway.open_secrets import OpenSecrets
from carrel.model import new_id
from carrel.protocol.environments import CustomTool, EnvironmentSpec

__all__ = ["CustomTools", "signature"]

log = structlog.get_logger(__name__)

_CALLER = "carrel.caller"
_MOST_BODY_BYTES = 16 * 1024 * 1024
_MOST_ANSWER_BYTES = 1024 * 1024
_MOST_ERROR_CHARS = 2000


class CustomTools:
    """Answers the agents of an environment as an MCP server of its tools; no request needs another before it."""

    def __init__(self, client: httpx.AsyncClient, open_secrets: OpenSecrets) -> None:
        """Make it of a client that connects to what may be connected to; it answers after `start`."""
        self._client = client
        self._open_secrets = open_secrets
        server: Server[Any] = Server("custom", version=__version__, on_list_tools=self._list, on_call_tool=self._call)
        self._manager = StreamableHTTPSessionManager(
            server, stateless=True, json_response=True, max_request_body_size=_MOST_BODY_BYTES
        )

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to answer; closing is registered with `exit_stack`."""
        up, over = asyncio.Event(), asyncio.Event()

        async def run() -> None:
            # In one task from its beginning to its end, as the library wants it; the stack may be closed in another.
            async with self._manager.run():
                up.set()
                await over.wait()

        task = asyncio.create_task(run(), name="custom-tools")

        async def close() -> None:
            over.set()
            await asyncio.gather(task, return_exceptions=True)

        exit_stack.push_async_callback(close)
        await up.wait()

    def answering(self, spec: EnvironmentSpec, session_id: str) -> ASGIApp:
        """What answers a request of the agent of this session, of this environment."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await self._manager.handle_request({**scope, _CALLER: (spec, session_id)}, receive, send)

        return answer

    async def _list(self, context: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        spec, _ = context.request.scope[_CALLER]
        return types.ListToolsResult(
            tools=[
                types.Tool(name=tool.name, description=tool.description, input_schema=tool.input_schema)
                for tool in spec.custom_tools
            ]
        )

    async def _call(self, context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        spec, session_id = context.request.scope[_CALLER]
        tool = next((each for each in spec.custom_tools if each.name == params.name), None)
        if tool is None:
            return _failed("There is no such tool.")
        arguments = params.arguments or {}
        wrong = best_match(Draft202012Validator(tool.input_schema).iter_errors(arguments))
        if wrong is not None:
            return _failed(f"The tool does not take this: {wrong.json_path}: {wrong.message}"[:_MOST_ERROR_CHARS])
        try:
            async with asyncio.timeout(tool.timeout_seconds):
                return await self._ask(tool, arguments, spec, session_id)
        except TimeoutError:
            return self._problem(tool, session_id, f"The tool did not answer within {tool.timeout_seconds:g} seconds.")
        except httpx.ConnectError as error:
            private = "private_address" in str(error)
            said = "stands at an address that is not public" if private else "cannot be reached"
            return self._problem(tool, session_id, f"The tool {said}.")
        except httpx.InvalidURL:
            return self._problem(tool, session_id, "The tool cannot be reached.")
        except httpx.HTTPError:
            return self._problem(tool, session_id, "The tool broke its answer off.")
        except (SecretMissing, StoreUnavailable) as error:
            return self._problem(tool, session_id, error.message)

    async def _ask(
        self, tool: CustomTool, arguments: Mapping[str, Any], spec: EnvironmentSpec, session_id: str
    ) -> types.CallToolResult:
        call_id, now = new_id(), str(int(time.time()))
        body = to_json({"id": call_id, "tool": tool.name, "arguments": arguments, "session_id": session_id})
        headers = {"content-type": "application/json", "webhook-id": call_id, "webhook-timestamp": now}
        if tool.signed_with is not None:
            values = await self._open_secrets(spec, [tool.signed_with])
            headers["webhook-signature"] = signature(values[tool.signed_with], call_id, now, body)
        asked = self._client.build_request("POST", tool.url, headers=headers, content=body, timeout=None)
        answer = await self._client.send(asked, stream=True, follow_redirects=False)
        try:
            content = b""
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > _MOST_ANSWER_BYTES:
                    return self._problem(tool, session_id, "The tool answered with more than 1 MiB.")
        finally:
            await answer.aclose()
        text = content.decode(errors="replace")
        if not answer.is_success:
            said = f"The tool answered with status {answer.status_code}. {text[:_MOST_ERROR_CHARS]}"
            return self._problem(tool, session_id, said.strip())
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text)], structured_content=_object(text)
        )

    def _problem(self, tool: CustomTool, session_id: str, message: str) -> types.CallToolResult:
        log.warning("custom_tool.failed", session=session_id, tool=tool.name, problem=message[:100])
        return _failed(message)


def signature(secret: str, call_id: str, timestamp: str, body: bytes) -> str:
    """How a request is signed, in the form of Standard Webhooks: who knows the secret can tell that it is ours, and new.

    A secret that begins with `whsec_` is base64, as that specification has it; any other is taken as it is written.
    See https://www.standardwebhooks.com.
    """
    key = base64.b64decode(secret[6:] + "==") if secret.startswith("whsec_") else secret.encode()
    mac = hmac.new(key, b".".join([call_id.encode(), timestamp.encode(), body]), sha256)
    return f"v1,{base64.b64encode(mac.digest()).decode()}"


def _failed(message: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=message)], is_error=True)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
