"""A whole server in the test's own event loop, on the real CLI and the scripted model."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from carrel.cli.server import Running, running
from carrel.settings import load_settings

Json = dict[str, Any]


class Api:
    """A running server, and the calls that the tests make of it."""

    def __init__(self, server: Running, http: httpx.AsyncClient) -> None:
        self.server = server
        self.http = http

    async def ask(self, method: str, path: str, expected: int | None = None, **options: Any) -> Any:
        response = await self.http.request(method, path, **options)
        if expected is None:
            assert response.is_success, response.text
        else:
            assert response.status_code == expected, response.text
        return response.json() if response.content else None

    async def session(self, **spec: Any) -> str:
        return str((await self.ask("POST", "/sessions", json=spec))["id"])

    async def run(self, session: str, prompt: str, **options: Any) -> Json:
        """A prompt, waited for."""
        body = {"prompt": prompt, "wait": True, **options}
        result: Json = await self.ask("POST", f"/sessions/{session}/turns", json=body)
        return result

    async def send(self, session: str, prompt: str, **options: Any) -> str:
        """A prompt, not waited for: the turn's id."""
        return str((await self.ask("POST", f"/sessions/{session}/turns", json={"prompt": prompt, **options}))["id"])

    async def events(self, session: str, after: int = 0) -> list[Json]:
        page = await self.ask("GET", f"/sessions/{session}/events", params={"after": after, "limit": 1000})
        found: list[Json] = page["data"]
        return found

    async def until(self, what: str, check: Callable[[], Awaitable[Any]], seconds: float = 30.0) -> Any:
        """Wait until `check` answers something true, and answer it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := await check():
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {what}")

    async def until_status(self, session: str, status: str, seconds: float = 30.0) -> Json:
        async def check() -> Json | None:
            found: Json = await self.ask("GET", f"/sessions/{session}")
            return found if found["status"] == status else None

        found: Json = await self.until(f"session is {status}", check, seconds)
        return found

    async def until_event(self, session: str, type: str, turn: str | None = None, seconds: float = 30.0) -> Json:
        async def check() -> Json | None:
            for event in await self.events(session):
                if event["type"] == type and turn in (None, event["turn_id"]):
                    return event
            return None

        found: Json = await self.until(f"event {type}", check, seconds)
        return found

    @asynccontextmanager
    async def stream(self, method: str, path: str, **options: Any) -> AsyncIterator[AsyncIterator[Json]]:
        """Frames of an event stream: `{"id", "event", "data"}`."""
        headers = {"Accept": "text/event-stream", **options.pop("headers", {})}
        async with self.http.stream(method, path, headers=headers, **options) as response:
            assert response.status_code == 200, (await response.aread()).decode()
            yield frames(response)


async def frames(response: httpx.Response) -> AsyncIterator[Json]:
    fields: Json = {}
    async for line in response.aiter_lines():
        if not line:
            if "data" in fields:
                yield {**fields, "data": json.loads(fields["data"])}
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


Start = Callable[..., Awaitable[Api]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.on_both_engines` runs a test on SQLite and on PostgreSQL."""
    if metafunc.definition.get_closest_marker("on_both_engines") is not None:
        metafunc.parametrize("engine", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Json:
    """The settings that say where rows are; the same database for every server of one test."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return {}
    return {"database": {"url": request.getfixturevalue("postgres")()}}


@pytest.fixture
async def start(tmp_path: Path, engine: Json) -> AsyncIterator[Start]:
    """`await start(**settings)` runs a server until the test ends."""
    async with AsyncExitStack() as stack:

        async def start_one(**settings: Any) -> Api:
            given = {"data": tmp_path / "data", "port": 0, "model_upstream": "scripted", "drain_seconds": 0}
            given |= engine | settings
            server = await stack.enter_async_context(running(load_settings(overrides=given)))
            http = httpx.AsyncClient(
                base_url=f"{server.url}/api/v1", headers={"Authorization": f"Bearer {server.key}"}, timeout=60
            )
            return Api(server, await stack.enter_async_context(http))

        yield start_one


@pytest.fixture
async def api(start: Start) -> Api:
    """A server with the settings of every day."""
    return await start()
