"""The application over a gateway with fake sandboxes, called without a network."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from carrel.api import Services, create_app
from carrel.api.audit import AuditLog
from carrel.api.edges import Edges
from carrel.api.operations import Operations
from carrel.auth import AdminKey, Authenticator
from carrel.budgets import Allowances
from carrel.sessions.history import History
from carrel.sessions.spending import Spending
from carrel.testing import FakeGateway, FakeHost

KEY = "carrel_admin_0123456789abcdefghijklmnopqrstuv"


class Called:
    """An application, and clients that call it from wherever they say."""

    def __init__(self, gateway: FakeGateway, services: Services) -> None:
        self.gateway = gateway
        self.services = services
        self.app = create_app(services)
        list(Operations(self.app))  # what the first request would do, in the test's loop
        self.key = KEY

    def client(self, address: str = "192.0.2.7", key: str | None = KEY, **headers: str) -> httpx.AsyncClient:
        given = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, client=(address, 1234), raise_app_exceptions=False),
            base_url="http://localhost:8000",
            headers=given | {name.replace("_", "-"): value for name, value in headers.items()},
        )


Build = Callable[..., Awaitable[Called]]


@pytest.fixture
async def build(tmp_path: Path) -> AsyncIterator[Build]:
    """`await build(per_key=Limiter(…))` makes an application with these edges; `auth=False` wants no key."""
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(FakeHost())

        async def build_one(*, auth: bool = True, audit: dict[str, Any] | None = None, **edges: Any) -> Called:
            gateway = await stack.enter_async_context(FakeGateway(host, tmp_path))
            if audit is not None:
                edges["audit"] = AuditLog(gateway.store, **audit)
                await edges["audit"].start(stack)

            async def ready() -> dict[str, Any]:
                return {"store": True}

            async def models() -> list[dict[str, Any]]:
                raise KeyError("an error that nobody expected")

            key = AdminKey(KEY, new=False) if auth else None
            services = Services(
                store=gateway.store,
                sessions=gateway.service,
                workspaces=gateway.workspaces,
                interactions=gateway.interactions,
                children=gateway.children,
                trees=gateway.trees,
                tools=None,
                rules=gateway.rules,
                environments=gateway.environments,
                snapshots=gateway.snapshots,
                artifacts=gateway.artifacts,
                archives=gateway.archives,
                diffs=gateway.diffs,
                secrets=gateway.secrets,
                life=gateway.life,
                authenticator=Authenticator(gateway.store, admin_key=key) if key is not None else None,
                spending=Spending(gateway.store, Allowances()),
                history=History(gateway.store),
                ready=ready,
                models=models,
                edges=Edges(**edges),
            )
            return await asyncio.to_thread(Called, gateway, services)  # its hundred routes take a while to build

        yield build_one
