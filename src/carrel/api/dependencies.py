"""What handlers take from the application, and who is calling."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from carrel import abc
from carrel.auth import ADMIN, AdminKey, Principal
from carrel.errors import AuthenticationRequired
from carrel.model import new_id
from carrel.sessions.service import SessionService


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything the handlers need; made once, by whoever wires the server."""

    store: abc.Store
    sessions: SessionService
    admin_key: AdminKey | None
    """None: authentication is off."""
    ready: Callable[[], Awaitable[dict[str, Any]]]
    """Says of each part whether it works."""
    models: Callable[[], Awaitable[list[dict[str, Any]]]]
    """Asks the upstream for its models."""
    max_file_bytes: int = 1024 * 1024 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    heartbeat_seconds: float = 15.0
    boot_id: str = field(default_factory=new_id)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish something although the request it belongs to is over."""
        task = asyncio.get_running_loop().create_task(work, name="after-request")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def services(connection: HTTPConnection) -> Services:
    """The services of this application."""
    found: Services = connection.app.state.services
    return found


def principal(connection: HTTPConnection) -> Principal:
    """Who is calling.

    Raises:
        AuthenticationRequired: no key, or a wrong one.
    """
    key = services(connection).admin_key
    if key is None:
        return ADMIN
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.fits(given.strip()):
        raise AuthenticationRequired
    return ADMIN


ServicesDep = Annotated[Services, Depends(services)]
PrincipalDep = Annotated[Principal, Depends(principal)]
