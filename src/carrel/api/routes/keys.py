"""API keys: make, list, look at, revoke."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from carrel import abc
from carrel.api.dependencies import ServicesDep, UnboundDep, need
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, Listing, answer, example
from carrel.auth import make_key
from carrel.auth.tickets import earliest
from carrel.errors import (
    BoundToSession,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidCursor,
    KeyNotFound,
    ValidationFailed,
)
from carrel.model import USER_ID, ApiKey, Principal, Scope, utc_now
from carrel.sessions.service import Mark

router = APIRouter(prefix="/keys", tags=["keys"])

KeyId = Annotated[str, Path(max_length=64, description="The key's id.")]

_DEFAULT_SCOPES = frozenset({Scope.READ, Scope.WRITE})
_TEN_YEARS_SECONDS = 10 * 366 * 86_400
_EXAMPLE = {
    "id": "01980c5e-7a02-7d1c-8d51-6f1d2a9f0b11",
    "user_id": "alice",
    "name": "ci",
    "prefix": "carrel_sk_3fA9xQ2b",
    "scopes": ["sessions:read", "sessions:write"],
    "created_at": "2026-11-21T09:30:00Z",
    "expires_at": "2027-02-19T09:30:00Z",
    "revoked_at": None,
    "last_used_at": None,
}


class CreateKey(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    user: str | None = Field(
        default=None, pattern=USER_ID, description="Whose; default: your own. Another's needs `admin`; made if unknown."
    )
    name: str | None = Field(default=None, max_length=200, description="What it is for.")
    scopes: list[Scope] | None = Field(
        default=None, min_length=1, max_length=10, description="Default: read and write. Never more than your own."
    )
    expires_in_seconds: int | None = Field(
        default=None, strict=True, ge=1, le=_TEN_YEARS_SECONDS, description="Default: it does not expire."
    )


class NewKey(ApiKey):
    """A key, and once the secret itself."""

    key: str | None = Field(description="The key. Shown in this answer alone; null when the request is repeated.")


@router.post(
    "",
    status_code=201,
    response_model=NewKey,
    responses=responses(BoundToSession, ValidationFailed, IdempotencyInFlight, IdempotencyMismatch)
    | {201: example(_EXAMPLE | {"key": "carrel_sk_3fA9xQ2b…"}, "The key, shown once.")},
)
async def create_key(
    request: Request,
    services: ServicesDep,
    principal: UnboundDep,
    body: Annotated[CreateKey, Body(examples=[{"name": "ci", "expires_in_seconds": 7_776_000}])] = CreateKey(),
) -> Response:
    """Make an API key. It can do what its scopes say with its user's things, and never more than who makes it."""
    user = body.user or principal.user
    if user != principal.user:
        need(principal, Scope.ADMIN)
    for scope in body.scopes or ():
        need(principal, scope)
    scopes = frozenset(body.scopes) if body.scopes else _DEFAULT_SCOPES & principal.scopes

    async def make(mark: Mark | None) -> Response:
        now = utc_now()
        expires_at = now + timedelta(seconds=body.expires_in_seconds) if body.expires_in_seconds else None
        if principal.name.startswith("key:") and principal.expires_at is not None:
            # Else a key that ends could make itself a successor that does not.
            expires_at = earliest(principal.expires_at, expires_at)
        key, secret = make_key(user, scopes=scopes, now=now, name=body.name, expires_at=expires_at)

        def work(tx: abc.Transaction) -> None:
            tx.users.ensure(user, now)
            tx.keys.add(key)
            if mark is not None:
                tx.idempotency.update(mark.principal, mark.key, object_id=key.id)

        await services.store.write(work)
        return _told(key, secret)

    async def replay(object_id: str) -> Response:
        return _told(await services.store.read(lambda tx: _key(tx, principal, object_id)), None)

    return await once(request, services, principal, make, replay, keep=False)


def _told(key: ApiKey, secret: str | None) -> Response:
    return answer({**key.model_dump(mode="json"), "key": secret}, status=201, headers={"Cache-Control": "no-store"})


def _key(tx: abc.Transaction, principal: Principal, key_id: str) -> ApiKey:
    key = tx.keys.get(key_id)
    if key is None or not (principal.is_admin or key.user_id == principal.user):
        raise KeyNotFound
    return key


@router.get(
    "",
    response_model=Listing[ApiKey],
    responses=responses(BoundToSession, InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "Newest first.")},
)
async def list_keys(
    services: ServicesDep,
    principal: UnboundDep,
    user: Annotated[str | None, Query(max_length=64, description="Only this user's; with `admin`.")] = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """Your keys, newest first; an admin's: everybody's."""
    if not principal.is_admin and user not in (None, principal.user):
        return answer({"data": [], "next_cursor": None})
    whose = user if principal.is_admin else principal.user
    page = await services.store.read(lambda tx: tx.keys.page(whose, cursor=cursor, limit=limit))
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get(
    "/{key_id}",
    response_model=ApiKey,
    responses=responses(BoundToSession, KeyNotFound) | {200: example(_EXAMPLE)},
)
async def get_key(key_id: KeyId, services: ServicesDep, principal: UnboundDep) -> Response:
    """One key; never the secret itself."""
    return answer(await services.store.read(lambda tx: _key(tx, principal, key_id)))


@router.delete("/{key_id}", status_code=204, responses=responses(BoundToSession, KeyNotFound))
async def revoke_key(key_id: KeyId, services: ServicesDep, principal: UnboundDep) -> Response:
    """Revoke a key: from now on it opens nothing, and streams that it has open end within half a minute."""

    def work(tx: abc.Transaction) -> None:
        key = _key(tx, principal, key_id)
        if key.revoked_at is None:
            tx.keys.update(key.id, revoked_at=utc_now())

    await services.store.write(work)
    return Response(status_code=204)
