"""Who a bearer token is of. From outside, one kind of wrong token cannot be told from another; the log tells them apart."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from hashlib import sha256
from typing import Final

import jwt
import structlog

from carrel import abc
from carrel.auth.admin_key import AdminKey
from carrel.auth.bookkeeping import Bookkeeping
from carrel.auth.jwt import JwtVerifier
from carrel.auth.keys import KEY_PREFIX, digest, visible
from carrel.auth.tickets import BROWSER_PREFIX, TICKET_PREFIX, issuer_of
from carrel.errors import AuthenticationRequired, UnsafeConfiguration
from carrel.model import ADMIN, ApiKey, Principal, Sandbox, SandboxStatus, Scope, User, utc_now

__all__ = ["ALL", "Authenticator"]

log = structlog.get_logger(__name__)

ALL: Final = frozenset({"admin", "key", "jwt", "static", "ticket", "sandbox"})
"""Every kind of token. `ticket` is the reusable kind, a browser's; single-use ones are redeemed."""

SHORTEST_STATIC_BYTES = 16
_SANDBOX_PREFIX = "cak-"
_LONGEST_TOKEN = 16 * 1024
_SHORTEST_SHOWN = 36
_USER_SCOPES = frozenset({Scope.READ, Scope.WRITE})


class _Refused(Exception):
    """Why a token is not good; for the log alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Authenticator:
    """Knows every way in."""

    def __init__(
        self,
        store: abc.Store,
        *,
        admin_key: AdminKey | None = None,
        static_token: str | None = None,
        jwt_verifier: JwtVerifier | None = None,
    ) -> None:
        """Make it; what is not given opens nothing.

        Args:
            store: has keys, tickets, sandboxes, and says which users are disabled.
            admin_key: the key of the first start.
            static_token: one token for the user `static`, of at least 16 bytes.
            jwt_verifier: checks JSON Web Tokens.

        Raises:
            UnsafeConfiguration: the static token is too short.
        """
        if static_token is not None and len(static_token.encode()) < SHORTEST_STATIC_BYTES:
            raise UnsafeConfiguration(
                f"static_token has fewer than {SHORTEST_STATIC_BYTES} bytes and could be guessed. "
                "Make one with: openssl rand -hex 32"
            )
        self._store = store
        self._admin_key = admin_key
        self._static = sha256(static_token.encode()).digest() if static_token is not None else None
        self._jwt = jwt_verifier
        self._bookkeeping = Bookkeeping(store)

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Begin to note what is used; closing is registered with `exit_stack`."""
        await self._bookkeeping.start(exit_stack)

    async def authenticate(self, token: str | None, *, accept: frozenset[str] = ALL) -> Principal:
        """Who brings this token. Touches the store once at most, and writes nothing before it answers.

        Args:
            token: what stood behind `Bearer`, or took that place; None where nothing did.
            accept: which kinds count: `admin`, `key`, `jwt`, `static`, `ticket`, `sandbox`.

        Raises:
            AuthenticationRequired: it is missing, wrong, expired, revoked, a disabled user's, or not of these kinds.
        """
        return await self._log_refusal(token, lambda given: self._principal(given, accept))

    async def redeem(self, ticket: str | None) -> Principal:
        """Who brings this single-use ticket, which opens nothing from now on.

        Raises:
            AuthenticationRequired: it is not one, or was used, or is too old.
        """
        return await self._log_refusal(ticket, self._of_ticket)

    async def still_good(self, principal: Principal) -> bool:
        """Whether a principal that was let in earlier would be let in now. For connections that last."""
        try:
            _in_time(principal.expires_at)
            await self._store.read(lambda tx: _check_again(tx, principal))
        except _Refused:
            return False
        return True

    async def _log_refusal(self, token: str | None, find: Callable[[str], Awaitable[Principal]]) -> Principal:
        try:
            if not token:
                raise _Refused("missing")
            if len(token) > _LONGEST_TOKEN or not token.isascii() or not token.isprintable():
                raise _Refused("malformed")
            return await find(token)
        except _Refused as refused:
            told = log.debug if refused.reason == "missing" else log.info
            told("auth.refused", reason=refused.reason, token=_shown(token or ""))
        raise AuthenticationRequired

    async def _principal(self, token: str, accept: frozenset[str]) -> Principal:
        if self._admin_key is not None and self._admin_key.fits(token):
            _of_kind("admin", accept)
            return ADMIN
        if self._static is not None and hmac.compare_digest(sha256(token.encode()).digest(), self._static):
            _of_kind("static", accept)
            return await self._store.read(_of_static)
        if token.startswith(KEY_PREFIX):
            _of_kind("key", accept)
            return await self._of_key(token)
        if token.startswith(BROWSER_PREFIX):
            _of_kind("ticket", accept)
            return await self._store.read(lambda tx: _of_browser(tx, token))
        if token.startswith(_SANDBOX_PREFIX):
            _of_kind("sandbox", accept)
            return await self._store.read(lambda tx: _of_sandbox(tx, token))
        if self._jwt is not None and token.count(".") == 2:
            _of_kind("jwt", accept)
            return await self._of_jwt(self._jwt, token)
        raise _Refused("unknown")

    async def _of_key(self, token: str) -> Principal:
        found = await self._store.read(lambda tx: tx.keys.by_hash(digest(token)))
        if found is None:
            raise _Refused("unknown key")
        key, user = found
        _key_opens(key, user)
        self._bookkeeping.used(key)
        scopes = frozenset(Scope) if Scope.ADMIN in key.scopes else frozenset(key.scopes)
        return Principal(name=f"key:{key.id}", user=user.id, scopes=scopes, expires_at=key.expires_at)

    async def _of_jwt(self, verifier: JwtVerifier, token: str) -> Principal:
        try:
            principal = await verifier.verify(token)
        except jwt.PyJWTError as error:
            # Its message may repeat parts of the token.
            raise _Refused(type(error).__name__) from None
        user = await self._store.read(lambda tx: tx.users.get(principal.user))
        if user is None:
            self._bookkeeping.came(principal.user)
        elif user.disabled:
            raise _Refused("disabled user")
        if Scope.ADMIN in principal.scopes:
            return principal.model_copy(update={"scopes": frozenset(Scope)})
        return principal

    async def _of_ticket(self, token: str) -> Principal:
        if not token.startswith(TICKET_PREFIX):
            raise _Refused("not a ticket")
        # Looked at before it is taken: whoever guesses must not keep the one writer busy.
        if await self._store.read(lambda tx: tx.tickets.get(digest(token))) is None:
            raise _Refused("unknown ticket")

        def take(tx: abc.Transaction) -> Principal | None:
            ticket = tx.tickets.take(digest(token), utc_now())
            return ticket.principal if ticket is not None and not ticket.reusable else None

        principal = await self._store.write(take)
        if principal is None or not await self.still_good(principal):
            raise _Refused("expired, used or revoked ticket")
        return principal


def _of_kind(kind: str, accept: frozenset[str]) -> None:
    if kind not in accept:
        raise _Refused(f"{kind} not accepted here")


def _of_static(tx: abc.Transaction) -> Principal:
    principal = Principal(name="static", user="static", scopes=_USER_SCOPES)
    _check_again(tx, principal)
    return principal


def _of_browser(tx: abc.Transaction, token: str) -> Principal:
    ticket = tx.tickets.get(digest(token))
    if ticket is None or not ticket.reusable:
        raise _Refused("unknown browser token")
    _in_time(ticket.expires_at)
    _check_again(tx, ticket.principal)
    return ticket.principal


def _of_sandbox(tx: abc.Transaction, token: str) -> Principal:
    sandbox = tx.sandboxes.by_agent_token(digest(token))
    session = tx.sessions.get(sandbox.session_id) if sandbox is not None else None
    if sandbox is None or session is None:
        raise _Refused("unknown sandbox")
    principal = Principal(name=f"sandbox:{sandbox.id}", user=session.owner, scopes=_USER_SCOPES, session_id=session.id)
    _check_again(tx, principal)
    return principal


def _check_again(tx: abc.Transaction, principal: Principal, name: str | None = None) -> None:
    """Look at what a principal rests on as it is now. Raises _Refused."""
    name = name or principal.name
    issuer = issuer_of(name)
    if issuer is not None:
        _check_again(tx, principal, issuer)
        return
    kind, _, which = name.partition(":")
    user = tx.users.get(principal.user)
    if kind == "key":
        _key_opens(tx.keys.get(which), user)
    if kind == "sandbox":
        _sandbox_lives(tx.sandboxes.get(which))
    if kind != "admin" and user is not None and user.disabled:
        raise _Refused("disabled user")


def _key_opens(key: ApiKey | None, user: User | None) -> None:
    if key is None:
        raise _Refused("unknown key")
    if key.revoked_at is not None:
        raise _Refused("revoked key")
    if user is None or user.disabled:
        raise _Refused("disabled user")
    _in_time(key.expires_at)


def _sandbox_lives(sandbox: Sandbox | None) -> None:
    if sandbox is None or sandbox.status is SandboxStatus.GONE:
        raise _Refused("unknown sandbox")


def _in_time(expires_at: datetime | None) -> None:
    if expires_at is not None and expires_at <= utc_now():
        raise _Refused("expired")


def _shown(token: str) -> str | None:
    """What the log may know of a token: how it begins, where that is no secret."""
    ours = token.startswith((KEY_PREFIX, BROWSER_PREFIX, TICKET_PREFIX))
    return visible(token) if ours and len(token) >= _SHORTEST_SHOWN else None
