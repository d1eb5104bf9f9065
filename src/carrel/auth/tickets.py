"""Tickets: what a browser is given in place of a key, for one session."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta

from carrel.auth.keys import digest
from carrel.errors import MissingScope
from carrel.model import Principal, Scope, Ticket

__all__ = [
    "BROWSER_PREFIX",
    "LONGEST_SECONDS",
    "REUSABLE_SECONDS",
    "SINGLE_USE_SECONDS",
    "TICKET_PREFIX",
    "earliest",
    "issuer_of",
    "make_ticket",
]

TICKET_PREFIX = "carrel_st_"
"""Opens one connection, as `?ticket=`."""
BROWSER_PREFIX = "carrel_bt_"
"""Good as a bearer token until it expires."""

SINGLE_USE_SECONDS = 30
REUSABLE_SECONDS = 15 * 60
LONGEST_SECONDS = 60 * 60
_NAME = "ticket:"


def make_ticket(
    principal: Principal,
    session_id: str,
    *,
    reusable: bool,
    lifetime_seconds: int,
    now: datetime,
    scopes: Iterable[Scope] | None = None,
) -> tuple[Ticket, str]:
    """A ticket for one session, and its secret. It may never do more than who gave it, nor outlive them.

    Args:
        principal: who gives it; what is done with it counts as done by them.
        session_id: the session it is bound to. Whether it exists for the principal is for the caller to check.
        reusable: a short-lived token for a browser, and not for one connection.
        lifetime_seconds: how long it opens something.
        now: when it is made.
        scopes: less than the principal's own; None: all of them but `admin`.

    Raises:
        MissingScope: the principal does not have one of the scopes.
    """
    wanted = frozenset(scopes) if scopes is not None else principal.scopes - {Scope.ADMIN}
    for scope in sorted(wanted - (principal.scopes - {Scope.ADMIN})):
        raise MissingScope(scope)
    expires_at = earliest(now + timedelta(seconds=lifetime_seconds), principal.expires_at)
    secret = (BROWSER_PREFIX if reusable else TICKET_PREFIX) + secrets.token_urlsafe(32)
    bound = Principal(
        # The session is part of the name: two callers with one name share their Idempotency-Keys.
        name=principal.name if principal.name.startswith(_NAME) else f"{_NAME}{session_id}:{principal.name}",
        user=principal.user,
        scopes=wanted,
        session_id=session_id,
        # A connection that a ticket has opened lasts as long as who gave it; a token's connections as long as the token.
        expires_at=expires_at if reusable else principal.expires_at,
    )
    return Ticket(hash=digest(secret), principal=bound, reusable=reusable, expires_at=expires_at), secret


def earliest(moment: datetime, other: datetime | None) -> datetime:
    """The earlier of the two; None is never."""
    return moment if other is None else min(moment, other)


def issuer_of(name: str) -> str | None:
    """The name of who gave the ticket that a principal of this name came with; None where it came with none."""
    if not name.startswith(_NAME):
        return None
    return name.removeprefix(_NAME).partition(":")[2]
