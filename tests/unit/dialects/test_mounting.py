"""Listeners and prefixes, without a server."""

import asyncio
from typing import Any

import pytest

from carrel.api.dialects.mounting import Listeners


def scope(port: int, path: str) -> dict[str, Any]:
    return {"type": "http", "path": path, "raw_path": path.encode(), "server": ("127.0.0.1", port)}


async def test_nothing_is_answered_before_every_listener_listens() -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    front = Listeners(app, {3000: "sdk-server"})
    async with asyncio.TaskGroup() as group:
        for port in (3000, 8000):
            group.create_task(front(scope(port, "/health"), None, None), name=f"call {port}")  # type: ignore[arg-type]
        for _ in range(5):
            await asyncio.sleep(0)
        assert seen == []
        front.up.set()
    assert sorted(one["path"] for one in seen) == ["/compat/sdk-server/health", "/health"]
    assert sorted(one["raw_path"] for one in seen) == [b"/compat/sdk-server/health", b"/health"]


@pytest.mark.parametrize("server", [None, ("127.0.0.1", 8000), ("/run/gateway.sock", None)])
async def test_other_listeners_are_passed_on_as_they_are(server: Any) -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    front = Listeners(app, {3000: "sdk-server"})
    front.up.set()
    given = scope(1, "/health") | {"server": server}
    await front(given, None, None)  # type: ignore[arg-type]
    assert seen == [given]
