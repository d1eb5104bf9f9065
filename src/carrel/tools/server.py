"""The tools over MCP (streamable HTTP), without any state of a connection: each request stands by itself.

So a restart of the gateway is no matter to a client, and nobody's connection can be another's. Who calls is found out
before a request comes here, and stands in its scope.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import mcp_types as types
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from carrel import __version__
from carrel.errors import CarrelError
from carrel.model import Principal
from carrel.tools.toolbox import Call, Toolbox

__all__ = ["CALL_KEY", "PRINCIPAL", "ToolServer"]

PRINCIPAL = "carrel.principal"
"""Where in a request's scope the caller is."""
CALL_KEY = "idempotency-key"
"""The header by which a repeated call is known."""

_MOST_BODY_BYTES = 64 * 1024 * 1024
_LONGEST_KEY = 255


class _App:
    """What a route takes for an application: not a function, which it would take for a handler."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class ToolServer:
    """Answers at one path: agents, who are bound to a session, find other tools there than clients."""

    def __init__(self, *, inside: Toolbox, outside: Toolbox) -> None:
        """Make it of the tools of agents and those of clients; it answers after `start`."""
        self._inside, self._outside = inside, outside
        server: Server[Any] = Server("carrel", version=__version__, on_list_tools=self._list, on_call_tool=self._call)
        # Nothing between a runner and us gives up on an answer that takes its time; between a client and us it may.
        self._plain, self._streaming = (
            StreamableHTTPSessionManager(
                server, stateless=True, json_response=plain, max_request_body_size=_MOST_BODY_BYTES
            )
            for plain in (True, False)
        )

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to answer; closing is registered with `exit_stack`."""
        up, over = asyncio.Event(), asyncio.Event()

        async def run() -> None:
            # In one task from its beginning to its end, as the library wants it; the stack may be closed in another.
            async with self._plain.run(), self._streaming.run():
                up.set()
                await over.wait()

        task = asyncio.create_task(run(), name="tools")

        async def close() -> None:
            over.set()
            await asyncio.gather(task, return_exceptions=True)

        exit_stack.push_async_callback(close)
        await up.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; its scope says who calls."""
        await self._streaming.handle_request(scope, receive, send)

    def route(self, app: ASGIApp | None = None) -> Route:
        """Where it is found; `app` stands before it, and says who calls.

        It takes POST alone: no stream is kept open for what nobody asked for, and there is no connection to be ended.
        """
        return Route("/mcp", app or self, methods=["POST"], name="call_tool")

    def for_sandboxes(self, authenticate: Callable[[str | None], Awaitable[Principal]]) -> Route:
        """Where agents find it: by their tokens alone. `authenticate` raises CarrelError."""

        async def door(scope: Scope, receive: Receive, send: Send) -> None:
            kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            try:
                scope[PRINCIPAL] = await authenticate(token if kind.lower() == "bearer" else None)
            except CarrelError as error:
                await Response(error.message, status_code=error.http_status)(scope, receive, send)
                return
            await self._plain.handle_request(scope, receive, send)

        return self.route(_App(door))

    def _toolbox(self, context: Any) -> tuple[Principal, Toolbox]:
        request: Request = context.request
        principal: Principal = request.scope[PRINCIPAL]
        return principal, self._inside if principal.name.startswith("sandbox:") else self._outside

    async def _list(self, context: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        _, toolbox = self._toolbox(context)
        return types.ListToolsResult(
            tools=[
                types.Tool(name=tool.name, description=tool.description, input_schema=tool.schema)
                for tool in toolbox.tools.values()
            ]
        )

    async def _call(self, context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        principal, toolbox = self._toolbox(context)
        key = context.request.headers.get(CALL_KEY)
        said = 0

        async def progress(text: str) -> None:
            nonlocal said
            said += 1
            await context.session.report_progress(said, message=text)

        call = Call(principal=principal, key=key[:_LONGEST_KEY] if key else None, progress=progress)
        answer = await toolbox.call(params.name, params.arguments or {}, call)
        text = types.TextContent(type="text", text=to_json(answer).decode())
        return types.CallToolResult(content=[text], structured_content=answer, is_error=False)
