"""A store, an authenticator over it, and short ways to fill the first."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from carrel import abc
from carrel.auth import AdminKey, Authenticator, JwtOptions, JwtVerifier, make_key
from carrel.model import Sandbox, SandboxStatus, Scope, Session, SessionStatus, Ticket, new_id, utc_now
from carrel.store import SqliteStore

SECRET = "a-secret-that-is-long-enough-0123456789"
STATIC = "static-0123456789abcdef"


class World:
    """A store with people in it, and who may come in."""

    def __init__(self, store: abc.Store, stack: AsyncExitStack) -> None:
        self.store = store
        self.stack = stack
        self.admin_key = AdminKey("carrel_admin_the-key", new=False)

    async def authenticator(self, **options: Any) -> Authenticator:
        given = {
            "admin_key": self.admin_key,
            "static_token": STATIC,
            "jwt_verifier": JwtVerifier(JwtOptions(secret=SECRET)),
        } | options
        made = Authenticator(self.store, **given)
        await made.start(self.stack)
        return made

    async def key(self, user: str = "alice", *, lasts: timedelta | None = None, **columns: Any) -> tuple[str, str]:
        """A key of a user's: its id and its secret."""
        now = utc_now()
        scopes = columns.pop("scopes", [Scope.READ, Scope.WRITE])
        key, secret = make_key(user, scopes=scopes, now=now, expires_at=None if lasts is None else now + lasts)

        def work(tx: abc.Transaction) -> None:
            tx.users.ensure(user, now)
            tx.keys.add(key.model_copy(update=columns))

        await self.store.write(work)
        return key.id, secret

    async def disable(self, user: str) -> None:
        def work(tx: abc.Transaction) -> None:
            tx.users.ensure(user, utc_now())
            tx.users.update(user, disabled=True)

        await self.store.write(work)

    async def session(self, owner: str = "alice") -> str:
        def work(tx: abc.Transaction) -> str:
            session = Session(
                id=new_id(),
                number=tx.sessions.next_number(),
                owner=owner,
                status=SessionStatus.IDLE,
                spec={},
                created_at=utc_now(),
                last_active_at=utc_now(),
            )
            tx.sessions.add(session)
            return session.id

        return await self.store.write(work)

    async def sandbox(self, session_id: str, token_hash: str) -> str:
        sandbox = Sandbox(
            id=new_id(),
            session_id=session_id,
            generation=1,
            status=SandboxStatus.LIVE,
            runtime="fake",
            link_token_hash="l",
            agent_token_hash=token_hash,
            created_at=utc_now(),
        )
        await self.store.write(lambda tx: tx.sandboxes.add(sandbox))
        return sandbox.id

    async def ticket(self, ticket: Ticket) -> None:
        await self.store.write(lambda tx: tx.tickets.add(ticket))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        store = SqliteStore(tmp_path / "carrel.db")
        await store.start(stack)
        yield World(store, stack)


@pytest.fixture
async def authenticator(world: World) -> Authenticator:
    return await world.authenticator()
