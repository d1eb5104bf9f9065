"""API keys: random, shown once, stored as a digest."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256

from carrel.model import ApiKey, Scope, new_id

__all__ = ["KEY_PREFIX", "digest", "make_key", "visible"]

KEY_PREFIX = "carrel_sk_"
_SHOWN = len(KEY_PREFIX) + 8


def make_key(
    user_id: str,
    *,
    scopes: Iterable[Scope],
    now: datetime,
    name: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """A new key of a user's, and the secret itself, which is in no row and cannot be had again.

    Args:
        user_id: whose things the key opens.
        scopes: what it may do.
        now: when it is made.
        name: what it is for.
        expires_at: when it ends; None: never.
    """
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=new_id(),
        user_id=user_id,
        name=name,
        prefix=visible(secret),
        hash=digest(secret),
        scopes=sorted(set(scopes)),
        created_at=now,
        expires_at=expires_at,
    )
    return key, secret


def digest(secret: str) -> str:
    """How a random secret is stored. It has 256 bits of its own, so neither salt nor slowness would add anything."""
    return sha256(secret.encode()).hexdigest()


def visible(secret: str) -> str:
    """The part of a key by which people and logs know it again."""
    return secret[:_SHOWN]
