"""Users and keys, through the server where one runs, and straight on its database where none does."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from carrel import abc
from carrel.auth import make_key
from carrel.cli.context import Context, running_server
from carrel.client import ApiKey, Carrel, User
from carrel.errors import DataFolderInUse, InvalidSettings, OperatorError
from carrel.model import Scope, utc_now
from carrel.settings import Settings

__all__ = ["Registry", "registry"]

T = TypeVar("T")

_DEFAULT_SCOPES = (Scope.READ, Scope.WRITE)
_PAGE = 500
_PATIENCE_SECONDS = 5.0


class Registry(Protocol):
    """What the commands do with users and keys."""

    def create_key(self, user: str, scopes: list[Scope] | None, name: str | None, seconds: int | None) -> ApiKey:
        """Make a key; its secret is in the answer. `seconds`: how long it is good."""

    def keys(self, user: str | None) -> list[ApiKey]:
        """Every key, newest first."""

    def revoke_key(self, key_id: str) -> None:
        """Have the key open nothing any more. Raises KeyNotFound."""

    def users(self) -> list[User]:
        """Every user, by id."""

    def set_disabled(self, user_id: str, disabled: bool) -> User:
        """Lock a user out, or let them in again. Raises UserNotFound."""


@contextmanager
def registry(context: Context, *, make: bool = False) -> Iterator[Registry]:
    """The registry of the server that is named, or of the data folder.

    Args:
        context: the global options.
        make: whether a data folder that is not there is made.

    Raises:
        OperatorError: there is no data folder, or the server that runs on it does not answer.
    """
    if context.url is not None:
        with context.connect() as carrel:
            yield _OfServer(carrel)
        return
    settings = context.settings()
    if not make and not settings.data.is_dir():
        raise OperatorError(f"There is no data folder {settings.data}; name it with --data.")
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(settings.data)
    if lock is None:
        with context.connect() as carrel:
            yield _OfServer(carrel)
        return
    try:
        if settings.memory:
            raise InvalidSettings("With memory: true users and keys are in the server alone; start it first.")
        yield _OfStore(settings)
    finally:
        os.close(lock)


def _lock(data: Path) -> int | None:
    """The lock that a server holds for its life; None where one does, and says where it listens."""
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if running_server(data) is not None:
                os.close(lock)
                return None
        # A server that is starting, or another command that will be done in a moment.
        if time.monotonic() > deadline:
            os.close(lock)
            raise DataFolderInUse(operator_detail=str(data))
        time.sleep(0.05)


class _OfServer:
    def __init__(self, carrel: Carrel) -> None:
        self._carrel = carrel

    def create_key(self, user: str, scopes: list[Scope] | None, name: str | None, seconds: int | None) -> ApiKey:
        return self._carrel.keys.create(user=user, scopes=scopes, name=name, expires_in_seconds=seconds)

    def keys(self, user: str | None) -> list[ApiKey]:
        return list(self._carrel.keys.list(user=user))

    def revoke_key(self, key_id: str) -> None:
        self._carrel.keys.revoke(key_id)

    def users(self) -> list[User]:
        return list(self._carrel.users.list())

    def set_disabled(self, user_id: str, disabled: bool) -> User:
        return self._carrel.users.update(user_id, disabled=disabled)


class _OfStore:
    """Each call opens the database, and closes it again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def create_key(self, user: str, scopes: list[Scope] | None, name: str | None, seconds: int | None) -> ApiKey:
        now = utc_now()
        expires_at = None if seconds is None else now + timedelta(seconds=seconds)
        key, secret = make_key(user, scopes=scopes or _DEFAULT_SCOPES, now=now, name=name, expires_at=expires_at)

        def work(tx: abc.Transaction) -> None:
            tx.users.ensure(user, now)
            tx.keys.add(key)

        self._run(work)
        return ApiKey.model_validate({**key.model_dump(mode="json"), "key": secret})

    def keys(self, user: str | None) -> list[ApiKey]:
        found = self._run(lambda tx: _all(lambda cursor: tx.keys.page(user, cursor=cursor, limit=_PAGE)))
        return [ApiKey.model_validate(key.model_dump(mode="json")) for key in found]

    def revoke_key(self, key_id: str) -> None:
        def work(tx: abc.Transaction) -> None:
            known = tx.keys.get(key_id)
            if known is None or known.revoked_at is None:
                tx.keys.update(key_id, revoked_at=utc_now())

        self._run(work)

    def users(self) -> list[User]:
        found = self._run(lambda tx: _all(lambda cursor: tx.users.page(cursor=cursor, limit=_PAGE)))
        return [User.model_validate(user.model_dump(mode="json")) for user in found]

    def set_disabled(self, user_id: str, disabled: bool) -> User:
        user = self._run(lambda tx: tx.users.update(user_id, disabled=disabled))
        return User.model_validate(user.model_dump(mode="json"))

    def _run(self, work: Callable[[abc.Transaction], T]) -> T:
        from carrel.cli.storage import open_store  # SQLAlchemy takes a while; a server that runs has it already

        async def run() -> T:
            async with AsyncExitStack() as stack:
                store = open_store(self._settings, on_commit=lambda events: None)
                await store.start(stack)
                return await store.write(work)

        return asyncio.run(run())


def _all(page: Callable[[str | None], abc.Page[Any]]) -> list[Any]:
    found: list[Any] = []
    cursor: str | None = None
    while True:
        part = page(cursor)
        found += part.items
        cursor = part.next_cursor
        if cursor is None:
            return found
