"""Tickets: what an application's back end asks for, and gives its pages in place of a key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from carrel import abc
from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import answer, example
from carrel.auth import make_ticket
from carrel.auth.tickets import LONGEST_SECONDS, REUSABLE_SECONDS, SINGLE_USE_SECONDS
from carrel.errors import BoundToSession, SessionNotFound, ValidationFailed
from carrel.model import Scope, utc_now

router = APIRouter(prefix="/auth/tickets", tags=["keys"])


class CreateTicket(BaseModel):
    """A ticket to be made."""

    model_config = ConfigDict(extra="forbid")

    session_id: str = Field(max_length=64, description="The one session it is for.")
    reusable: bool = Field(
        default=False,
        strict=True,
        description="A short-lived token, used as a bearer token; else good for one `?ticket=`.",
    )
    ttl_seconds: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=LONGEST_SECONDS,
        description=f"How long it opens something. Default: {SINGLE_USE_SECONDS}, which is also the most; "
        f"reusable: {REUSABLE_SECONDS}, and {LONGEST_SECONDS} is the most.",
    )
    scopes: list[Scope] | None = Field(
        default=None, min_length=1, max_length=10, description="Default: yours, without `admin`."
    )


class NewTicket(BaseModel):
    """A ticket."""

    ticket: str = Field(description="Shown in this answer alone.")
    expires_at: datetime


@router.post(
    "",
    status_code=201,
    response_model=NewTicket,
    responses=responses(BoundToSession, SessionNotFound, ValidationFailed)
    | {201: example({"ticket": "carrel_st_9bX2…", "expires_at": "2026-11-21T09:30:30Z"}, "The ticket, shown once.")},
)
async def create_ticket(
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[CreateTicket, Body(examples=[{"session_id": "01980c5e-5f0b-7c3a-9d0e-0d3c7f1f9a10"}])],
) -> Response:
    """Make a ticket for one session, to open its WebSocket or event stream; or a short-lived token for a browser.

    It may do no more than your key, and what it opens ends with your key. Each call makes another one.
    """
    if not body.reusable and body.ttl_seconds is not None and body.ttl_seconds > SINGLE_USE_SECONDS:
        raise ValidationFailed(f"ttl_seconds: a single-use ticket lasts {SINGLE_USE_SECONDS} seconds at most")
    if body.reusable and principal.session_id is not None:
        # A token that made its own successors would never end.
        raise BoundToSession
    session = await services.sessions.get(principal, body.session_id)
    now = utc_now()
    ticket, secret = make_ticket(
        principal,
        session.id,
        reusable=body.reusable,
        lifetime_seconds=body.ttl_seconds or (REUSABLE_SECONDS if body.reusable else SINGLE_USE_SECONDS),
        now=now,
        scopes=body.scopes,
    )

    def work(tx: abc.Transaction) -> None:
        tx.tickets.prune(now)
        tx.tickets.add(ticket)

    await services.store.write(work)
    told = {"ticket": secret, "expires_at": ticket.expires_at}
    return answer(told, status=201, headers={"Cache-Control": "no-store"})
