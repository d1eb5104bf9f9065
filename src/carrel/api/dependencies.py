"""What handlers take from the application, and who is calling."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from carrel import abc
from carrel.api.edges import Edges
from carrel.auth import Authenticator
from carrel.errors import BoundToSession, MissingScope
from carrel.model import ADMIN, Principal, Scope, new_id
from carrel.sessions.archives import Archives
from carrel.sessions.artifacts import Artifacts
from carrel.sessions.children import Children
from carrel.sessions.diffs import Diffs
from carrel.sessions.environment_life import EnvironmentLife
from carrel.sessions.environments import Environments
from carrel.sessions.history import History
from carrel.sessions.interactions import Interactions
from carrel.sessions.rules import Rules
from carrel.sessions.secrets import Secrets
from carrel.sessions.service import SessionService
from carrel.sessions.snapshots import Snapshots
from carrel.sessions.spending import Spending
from carrel.sessions.tree_streams import TreeStreams
from carrel.sessions.workspaces import NamedWorkspaces
from carrel.tools import ToolServer


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything the handlers need; made once, by whoever wires the server."""

    store: abc.Store
    sessions: SessionService
    workspaces: NamedWorkspaces
    interactions: Interactions
    children: Children
    trees: TreeStreams
    rules: Rules
    environments: Environments
    snapshots: Snapshots
    artifacts: Artifacts
    archives: Archives
    diffs: Diffs
    secrets: Secrets
    life: EnvironmentLife
    spending: Spending
    history: History
    authenticator: Authenticator | None
    """None: authentication is off, and everybody is the admin."""
    tools: ToolServer | None
    """Answers at `/mcp`; None: nothing does."""
    ready: Callable[[], Awaitable[dict[str, Any]]]
    """Says of each part whether it works."""
    models: Callable[[], Awaitable[list[dict[str, Any]]]]
    """Asks the upstream for its models."""
    settle_network: Callable[[], Awaitable[None]] | None = None
    """Has all that sandboxes have asked for on record; None where nobody records it."""
    max_file_bytes: int = 1024 * 1024 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    heartbeat_seconds: float = 15.0
    edges: Edges = field(default_factory=Edges)
    """What stands around the routes: limits, audit, origins, logs, metrics."""
    first_message_seconds: float = 5.0
    """How long a WebSocket may take to say whose it is."""
    recheck_seconds: float = 30.0
    """How often whoever holds a stream is looked up again."""
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


PRINCIPAL = "carrel.principal"
"""Where in an ASGI scope the caller is, once known."""


def bearer(connection: HTTPConnection) -> str | None:
    """What the caller sent as `Authorization: Bearer`; None where it sent nothing of the kind."""
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    return given.strip() or None if scheme.lower() == "bearer" else None


async def principal(connection: HTTPConnection) -> Principal:
    """Who is calling.

    Raises:
        AuthenticationRequired: no key, or a wrong one.
    """
    known: Principal | None = connection.scope.get(PRINCIPAL)
    if known is not None:
        return known
    authenticator = services(connection).authenticator
    found = ADMIN if authenticator is None else await authenticator.authenticate(bearer(connection))
    connection.scope[PRINCIPAL] = found
    return found


def need(principal: Principal, scope: Scope) -> None:
    """Go on only if the caller has the scope. Raises MissingScope."""
    if scope not in principal.scopes:
        raise MissingScope(scope)


async def admin(found: Annotated[Principal, Depends(principal)]) -> Principal:
    """Who is calling, if they may administer. Raises MissingScope."""
    if not found.is_admin:
        raise MissingScope(Scope.ADMIN)
    return found


async def unbound(found: Annotated[Principal, Depends(principal)]) -> Principal:
    """Who is calling, if their token is not bound to one session. Raises BoundToSession."""
    if found.session_id is not None:
        raise BoundToSession
    return found


ServicesDep = Annotated[Services, Depends(services)]
PrincipalDep = Annotated[Principal, Depends(principal)]
AdminDep = Annotated[Principal, Depends(admin)]
UnboundDep = Annotated[Principal, Depends(unbound)]
