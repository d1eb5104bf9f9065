"""The audit log: listed in pages, or exported whole."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime, BaseModel, BeforeValidator, Field
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse

from carrel import abc
from carrel.api.dependencies import PrincipalDep, Services, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import Cursor, Limit, Listing, answer
from carrel.errors import InvalidCursor, MissingScope, ValidationFailed
from carrel.model import Principal, Scope

router = APIRouter(prefix="/audit", tags=["audit"])

_PAGE = 1000
_DATE = re.compile(r"\d{4}-\d\d-\d\d[Tt ]")
_NDJSON, _CSV = "application/x-ndjson", "text/csv"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Record(BaseModel):
    """Who did what to which object, from where, with what outcome."""

    id: str
    at: datetime
    principal: str = Field(description="Who called; `anonymous` where that is not known.")
    user_id: str | None
    action: str = Field(description="A stable word, such as `session.create`.")
    object_type: str | None
    object_id: str | None
    address: str | None
    request_id: str | None
    outcome: int = Field(description="A status of HTTP.")
    details: dict[str, Any]


_COLUMNS = tuple(Record.model_fields)
_EXAMPLE = {
    "id": "01980c5e-7a10-7b10-8a55-1f0a3b7f22c4",
    "at": "2026-11-21T09:31:00Z",
    "principal": "key:01980c5d-0000-7000-8000-000000000000",
    "user_id": "alice",
    "action": "session.create",
    "object_type": "session",
    "object_id": "01980c5e-5f0b-7c3a-9d0e-0d3c7f1f9a10",
    "address": "192.0.2.7",
    "request_id": "01980c5e-79ff-7000-8000-000000000000",
    "outcome": 201,
    "details": {},
}


def _written(value: Any) -> Any:
    if not _DATE.match(str(value)):  # a bare number would be taken for seconds since 1970
        raise ValueError("must be a time in ISO 8601 with its zone, such as 2026-11-21T09:30:00Z")
    return value


_Moment = Annotated[AwareDatetime | None, BeforeValidator(_written)]
_Word = Annotated[str | None, Query(max_length=256)]


@router.get(
    "",
    response_model=Listing[Record],
    responses=responses(MissingScope, InvalidCursor, ValidationFailed)
    | {
        200: {
            "description": "A page, newest first; or all that fits, as JSON lines (`Accept: application/x-ndjson`) "
            "or CSV (`Accept: text/csv`).",
            "content": {
                "application/json": {"example": {"data": [_EXAMPLE], "next_cursor": None}},
                _NDJSON: {"example": _EXAMPLE},
                _CSV: {"example": ",".join(_COLUMNS)},
            },
        }
    },
)
async def list_audit(
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    user: _Word = None,
    who: Annotated[str | None, Query(alias="principal", max_length=256, description="As records name it.")] = None,
    action: Annotated[str | None, Query(max_length=128, description="Such as `session.create`.")] = None,
    object_id: _Word = None,
    since: Annotated[_Moment, Query(description="From this instant on, with its zone.")] = None,
    until: Annotated[_Moment, Query(description="And before this one.")] = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Response:
    """The audit log, newest first. For admins. An export has everything that fits, and takes no cursor."""
    _admins_only(principal)
    which = abc.AuditFilter(user_id=user, principal=who, action=action, object_id=object_id, since=since, until=until)
    if services.edges.audit is not None:
        await services.edges.audit.flush()  # whoever looks sees what was done before he looked
    wanted = request.headers.get("accept", "")
    if _NDJSON in wanted:
        return _export(_lines(services, which), _NDJSON, "audit.ndjson")
    if _CSV in wanted:
        return _export(_rows(services, which), f"{_CSV}; charset=utf-8", "audit.csv")
    page = await services.store.read(lambda tx: tx.audit.page(which, cursor=cursor, limit=limit))
    return answer({"data": [vars(record) for record in page.items], "next_cursor": page.next_cursor})


def _admins_only(principal: Principal) -> None:
    if not principal.is_admin:
        raise MissingScope(Scope.ADMIN)


def _export(parts: AsyncIterator[bytes], media_type: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(parts, media_type=media_type, headers=headers)


async def _pages(services: Services, which: abc.AuditFilter) -> AsyncIterator[list[abc.AuditRecord]]:
    cursor: str | None = None
    while True:
        page = await services.store.read(lambda tx, c=cursor: tx.audit.page(which, cursor=c, limit=_PAGE))  # type: ignore[misc]
        yield list(page.items)
        cursor = page.next_cursor
        if cursor is None:
            return


async def _lines(services: Services, which: abc.AuditFilter) -> AsyncIterator[bytes]:
    async for records in _pages(services, which):
        yield b"".join(to_json(vars(record)) + b"\n" for record in records)


async def _rows(services: Services, which: abc.AuditFilter) -> AsyncIterator[bytes]:
    yield (",".join(_COLUMNS) + "\r\n").encode()
    async for records in _pages(services, which):
        text = io.StringIO()
        csv.writer(text).writerows([_cell(getattr(record, name)) for name in _COLUMNS] for record in records)
        yield text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value.isoformat() if isinstance(value, datetime) else value
    text = text if isinstance(text, str) else to_json(text).decode()
    # A spreadsheet would run what begins like this, and a path may be called anything.
    return f"'{text}" if text.startswith(_FORMULA) else text
