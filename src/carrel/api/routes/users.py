"""Users, for admins; and for everybody: who am I."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from carrel import abc
from carrel.api.dependencies import AdminDep, PrincipalDep, ServicesDep
from carrel.api.idempotency import once
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, Listing, answer, example
from carrel.errors import (
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidCursor,
    UserExists,
    UserNotFound,
    ValidationFailed,
)
from carrel.model import USER_ID, Scope, User, utc_now
from carrel.protocol.spec import GivenBudget
from carrel.sessions.service import Mark

router = APIRouter(tags=["users"])

UserId = Annotated[str, Path(max_length=64, description="The user's id.")]

_MOST_SESSIONS = 1_000_000
_EXAMPLE = {
    "id": "alice",
    "disabled": False,
    "budget": None,
    "daily_budget": {"max_usd": 20.0, "max_tokens": None},
    "max_sessions": 50,
    "created_at": "2026-11-21T09:30:00Z",
}


class UpdateUser(BaseModel):
    """What is to change; null goes back to what the settings say."""

    model_config = ConfigDict(extra="forbid")

    disabled: bool = Field(default=False, strict=True, description="A disabled user's keys and tokens open nothing.")
    budget: GivenBudget | None = Field(default=None, description="What the user may spend in all.")
    daily_budget: GivenBudget | None = Field(default=None, description="What the user may spend a day (UTC).")
    max_sessions: int | None = Field(
        default=None, strict=True, ge=0, le=_MOST_SESSIONS, description="How many sessions at most."
    )


class CreateUser(UpdateUser):
    """A user to be made."""

    id: str = Field(pattern=USER_ID, description="Letters, digits, `_` and `-`.")


class Me(BaseModel):
    """Who a key is of, and what it may do."""

    name: str = Field(description="`admin`, `static`, `key:<id>`, `jwt:<user>`, `sandbox:<id>`, `ticket:…`.")
    user: str = Field(description="Whose things it opens.")
    scopes: list[Scope]
    session_id: str | None = Field(description="The one session it is bound to, if it is.")
    expires_at: str | None = Field(description="When it ends, if it does.")


@router.get(
    "/me",
    response_model=Me,
    responses=responses()
    | {
        200: example(
            {
                "name": "key:01980c5e-7a02-7d1c-8d51-6f1d2a9f0b11",
                "user": "alice",
                "scopes": ["sessions:read", "sessions:write"],
                "session_id": None,
                "expires_at": None,
            }
        )
    },
)
async def who_am_i(principal: PrincipalDep) -> Response:
    """Who you are here, and what your key may do."""
    return answer(
        {
            "name": principal.name,
            "user": principal.user,
            "scopes": sorted(principal.scopes),
            "session_id": principal.session_id,
            "expires_at": principal.expires_at,
        }
    )


@router.post(
    "/users",
    status_code=201,
    response_model=User,
    responses=responses(UserExists, ValidationFailed, IdempotencyInFlight, IdempotencyMismatch)
    | {201: example(_EXAMPLE, "The new user.")},
)
async def create_user(
    request: Request,
    services: ServicesDep,
    principal: AdminDep,
    body: Annotated[CreateUser, Body(examples=[{"id": "alice", "daily_budget": {"max_usd": 20}}])],
) -> Response:
    """Make a user. Users also come to be with their first key or token. Needs `admin`."""

    def work(tx: abc.Transaction) -> User:
        if tx.users.get(body.id) is not None:
            raise UserExists
        tx.users.ensure(body.id, utc_now())
        return tx.users.update(body.id, **_changes(body))

    async def make(mark: Mark | None) -> Response:
        return answer(await services.store.write(work), status=201)

    return await once(request, services, principal, make)


def _changes(body: UpdateUser) -> dict[str, Any]:
    return {name: getattr(body, name) for name in UpdateUser.model_fields}


@router.get(
    "/users",
    response_model=Listing[User],
    responses=responses(InvalidCursor)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "In the order of their ids.")},
)
async def list_users(services: ServicesDep, principal: AdminDep, cursor: Cursor = None, limit: Limit = 100) -> Response:
    """Every user. Needs `admin`."""
    page = await services.store.read(lambda tx: tx.users.page(cursor=cursor, limit=limit))
    return answer({"data": page.items, "next_cursor": page.next_cursor})


@router.get("/users/{user_id}", response_model=User, responses=responses(UserNotFound) | {200: example(_EXAMPLE)})
async def get_user(user_id: UserId, services: ServicesDep, principal: AdminDep) -> Response:
    """One user. Needs `admin`."""
    return answer(await services.store.read(lambda tx: _user(tx, user_id)))


def _user(tx: abc.Transaction, user_id: str) -> User:
    user = tx.users.get(user_id)
    if user is None:
        raise UserNotFound
    return user


@router.patch(
    "/users/{user_id}",
    response_model=User,
    responses=responses(UserNotFound, ValidationFailed) | {200: example(_EXAMPLE)},
)
async def update_user(
    user_id: UserId,
    services: ServicesDep,
    principal: AdminDep,
    body: Annotated[UpdateUser, Body(examples=[{"max_sessions": 50}])],
) -> Response:
    """Change limits, or disable and enable. Only what is given changes. Needs `admin`."""
    given = {name: value for name, value in _changes(body).items() if name in body.model_fields_set}
    return answer(await services.store.write(lambda tx: _update(tx, user_id, given)))


def _update(tx: abc.Transaction, user_id: str, given: dict[str, Any]) -> User:
    return tx.users.update(user_id, **given) if given else _user(tx, user_id)


@router.delete("/users/{user_id}", status_code=204, responses=responses(UserNotFound))
async def disable_user(user_id: UserId, services: ServicesDep, principal: AdminDep) -> Response:
    """Disable a user: keys and tokens open nothing from now on. Sessions and usage stay. Needs `admin`."""
    await services.store.write(lambda tx: _update(tx, user_id, {"disabled": True}))
    return Response(status_code=204)
