"""Clients of the older services, written from their shapes alone, against a running server."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from carrel.cli.server import Running, running
from carrel.settings import load_settings

Json = dict[str, Any]


class Client:
    """What both services' clients do."""

    def __init__(self, server: Running, http: httpx.AsyncClient) -> None:
        self.server = server
        self.http = http

    @asynccontextmanager
    async def native(self) -> AsyncIterator[httpx.AsyncClient]:
        """The native API of the same server, by the admin's key."""
        headers = {"Authorization": f"Bearer {self.server.key}"}
        async with httpx.AsyncClient(base_url=f"{self.server.url}/api/v1", headers=headers, timeout=60) as http:
            yield http

    async def frames(self, path: str, body: Json) -> list[Json]:
        """Every frame of a stream; fails on anything that is not `data: <json>`."""
        return [frame async for frame in self.watch(path, body)]

    async def watch(self, path: str, body: Json) -> AsyncIterator[Json]:
        async with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-accel-buffering"] == "no"
            async for line in response.aiter_lines():
                if line:
                    assert line.startswith("data: "), line
                    yield json.loads(line.removeprefix("data: "))


class AgentHttp(Client):
    """A client of claude-agent-http."""

    async def session(self, user: str = "alice", **more: Any) -> str:
        response = await self.http.post("/api/v1/sessions", json={"user_id": user, **more})
        assert response.status_code == 201, response.text
        return str(response.json()["session_id"])

    async def chat(self, session: str, message: str, expected: int = 200, **more: Any) -> Json:
        body = {"session_id": session, "message": message, **more}
        response = await self.http.post("/api/v1/chat", json=body)
        assert response.status_code == expected, response.text
        answer: Json = response.json()
        return answer

    async def stream(self, session: str, message: str, **more: Any) -> list[Json]:
        return await self.frames("/api/v1/chat/stream", {"session_id": session, "message": message, **more})


class SdkServer(Client):
    """A client of sdk-server."""

    async def ask(self, method: str, path: str, expected: int = 200, **body: Any) -> Json:
        response = await self.http.request(method, path, json=body or None)
        assert response.status_code == expected, response.text
        answer: Json = response.json()
        return answer


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """`await serve(dialects={…}, **settings)` runs a server until the test ends."""
    async with AsyncExitStack() as stack:

        async def serve_one(**settings: Any) -> Running:
            given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": 0} | settings
            return await stack.enter_async_context(running(load_settings(overrides=given)))

        yield serve_one


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def agent_http(serve: Serve, stack: AsyncExitStack) -> Callable[..., Awaitable[AgentHttp]]:
    """`await agent_http(auth="none", **settings)`: a server with the dialect on a port of its own, and its client."""

    async def start(auth: str = "none", key: str | None = None, **settings: Any) -> AgentHttp:
        server = await serve(dialects={"claude-agent-http": {"port": 0, "auth": auth}}, **settings)
        headers = {"Authorization": f"Bearer {key or server.key}"} if auth != "none" else {}
        url = server.listeners["claude-agent-http"]
        http = httpx.AsyncClient(base_url=url, headers=headers, timeout=60)
        return AgentHttp(server, await stack.enter_async_context(http))

    return start


@pytest.fixture
async def old(agent_http: Callable[..., Awaitable[AgentHttp]]) -> AgentHttp:
    return await agent_http()


@pytest.fixture
async def sdk(serve: Serve, stack: AsyncExitStack) -> SdkServer:
    server = await serve(dialects={"sdk-server": {"port": 0, "auth": "none"}})
    http = httpx.AsyncClient(base_url=server.listeners["sdk-server"], timeout=60)
    return SdkServer(server, await stack.enter_async_context(http))
