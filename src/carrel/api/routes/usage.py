"""What was spent, by whom, where and when, and what is left."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from carrel import abc
from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import EXAMPLE_SESSION, answer, example, sought
from carrel.budgets import Account, BudgetKind
from carrel.errors import Forbidden, InvalidCursor, SessionNotFound, ValidationFailed
from carrel.model import Budget, Usage
from carrel.sessions.spending import GROUPS

router = APIRouter(prefix="/usage", tags=["usage"])

_SUMS = ("requests", *Usage.model_fields, "cost_usd")
_CSV = "text/csv"
# What a spreadsheet would take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

Id = Annotated[str | None, Query(max_length=200)]


class UsageRow(BaseModel):
    """What a group of model requests took. Only what is grouped by has a name here."""

    user: str | None = Field(default=None, description="With `group_by=user`.")
    session: str | None = Field(default=None, description="With `group_by=session`.")
    turn: str | None = Field(default=None, description="With `group_by=turn`; null for requests outside of any turn.")
    model: str | None = Field(default=None, description="With `group_by=model`.")
    day: str | None = Field(default=None, description="With `group_by=day`: a day in UTC, such as `2026-11-21`.")
    requests: int
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cost_usd: float | None = Field(description="Null where the price of any of the requests is not known.")


class UsageReport(BaseModel):
    """Sums of usage."""

    data: list[UsageRow]
    total: UsageRow = Field(description="Of everything that was asked for, on other pages too.")
    next_cursor: str | None = Field(description="Asks for the next part; null at the end.")


class BudgetState(BaseModel):
    """A budget, and what is left of it."""

    kind: BudgetKind
    id: str = Field(description="The turn, session or user it belongs to.")
    budget: Budget
    spent_usd: float = Field(description="Requests whose price is not known are not in it.")
    spent_tokens: int
    reserved_usd: float = Field(description="Held for requests that are under way.")
    reserved_tokens: int
    left_usd: float | None = Field(description="Neither spent nor held; null without a limit.")
    left_tokens: int | None = Field(description="Neither spent nor held; null without a limit.")
    resets_at: datetime | None = Field(description="When what is spent counts from nothing again.")


class BudgetStates(BaseModel):
    """Every budget that holds; the smallest remainder counts."""

    data: list[BudgetState]


_EXAMPLE_SUMS = {
    "requests": 14,
    "input_tokens": 812,
    "output_tokens": 9600,
    "cache_creation_input_tokens": 21000,
    "cache_read_input_tokens": 150000,
    "cost_usd": 0.3302,
}
_EXAMPLE_CSV = "user,day," + ",".join(_SUMS) + "\r\nalice,2026-11-21,14,812,9600,21000,150000,0.3302\r\n"


@router.get(
    "",
    response_model=UsageReport,
    response_model_exclude_unset=True,
    responses=responses(ValidationFailed, InvalidCursor)
    | {
        200: {
            "description": "The sums; with `Accept: text/csv` or `format=csv`, all of them as CSV.",
            "model": UsageReport,
            "content": {
                "application/json": {
                    "example": {
                        "data": [{"user": "alice", "day": "2026-11-21", **_EXAMPLE_SUMS}],
                        "total": _EXAMPLE_SUMS,
                        "next_cursor": None,
                    }
                },
                _CSV: {"example": _EXAMPLE_CSV},
            },
        }
    },
)
async def get_usage(
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    group_by: Annotated[
        str | None,
        Query(max_length=200, description=f"Any of {', '.join(GROUPS)}, separated by commas.", examples=["user,day"]),
    ] = None,
    user: Id = None,
    session_id: Id = None,
    turn_id: Id = None,
    model: Id = None,
    since: Annotated[
        str | None, Query(max_length=64, description="From this day or time on (ISO 8601; without a zone: UTC).")
    ] = None,
    until: Annotated[str | None, Query(max_length=64, description="And before this one.")] = None,
    format: Annotated[Literal["json", "csv"] | None, Query(description="Wins over the header Accept.")] = None,
    cursor: Annotated[str | None, Query(max_length=20, description="`next_cursor` of the part before.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many groups at most.")] = 1000,
) -> Response:
    """What your model requests took (an administrator's: everybody's), summed by what you name."""
    groups = _groups(group_by)
    which = abc.UsageFilter(
        user_id=sought(user),
        session_id=sought(session_id),
        turn_id=sought(turn_id),
        model=sought(model),
        since=_moment(since, "since"),
        until=_moment(until, "until"),
    )
    start = _start(cursor)
    report = await services.spending.usage(principal, which, groups)
    if format == "csv" or (format is None and _CSV in request.headers.get("accept", "")):
        headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
        return StreamingResponse(_lines(groups, report.rows), media_type=_CSV, headers=headers)
    page = report.rows[start : start + limit]
    following = str(start + limit) if len(report.rows) > start + limit else None
    return answer({"data": [_row(row) for row in page], "total": _row(report.total), "next_cursor": following})


@router.get(
    "/budgets",
    response_model=BudgetStates,
    responses=responses(Forbidden, SessionNotFound, ValidationFailed)
    | {
        200: example(
            {
                "data": [
                    {
                        "kind": "session",
                        "id": EXAMPLE_SESSION["id"],
                        "budget": {"max_usd": 5.0, "max_tokens": None},
                        "spent_usd": 0.3302,
                        "spent_tokens": 181412,
                        "reserved_usd": 0.0,
                        "reserved_tokens": 0,
                        "left_usd": 4.6698,
                        "left_tokens": None,
                        "resets_at": None,
                    }
                ]
            }
        )
    },
)
async def get_budgets(
    services: ServicesDep,
    principal: PrincipalDep,
    user: Annotated[str | None, Query(max_length=200, description="Another user, for an administrator.")] = None,
    session_id: Annotated[str | None, Query(max_length=64, description="Also of this session, and its turn.")] = None,
) -> Response:
    """What is left of your budgets: in all, today (UTC), and of a session and its turn at work."""
    accounts = await services.spending.budgets(principal, user_id=sought(user), session_id=sought(session_id))
    return answer({"data": [_state(account) for account in accounts]})


def _state(account: Account) -> dict[str, Any]:
    return {
        "kind": account.kind,
        "id": account.of,
        "budget": account.budget,
        "spent_usd": account.spent_usd,
        "spent_tokens": account.spent_tokens,
        "reserved_usd": account.reserved_usd,
        "reserved_tokens": account.reserved_tokens,
        "left_usd": account.left_usd,
        "left_tokens": account.left_tokens,
        "resets_at": account.resets_at,
    }


def _row(found: abc.UsageSum) -> dict[str, Any]:
    group = {name: value or None for name, value in found.group.items()}
    return {**group, "requests": found.requests, **found.usage.model_dump(), "cost_usd": found.cost_usd}


def _lines(groups: Sequence[str], rows: Sequence[abc.UsageSum]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([*groups, *_SUMS])
    for row in rows:
        told = _row(row)
        names = [_harmless(told[name] or "") for name in groups]
        writer.writerow([*names, *("" if told[name] is None else told[name] for name in _SUMS)])
        if buffer.tell() > 65_536:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def _harmless(text: str) -> str:
    """The text, with an apostrophe before what a spreadsheet would run."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _groups(given: str | None) -> list[str]:
    found = [name.strip() for name in given.split(",")] if given else []
    for name in found:
        if name not in GROUPS:
            raise ValidationFailed(f"group_by: must be among {', '.join(GROUPS)}, separated by commas")
    return list(dict.fromkeys(found))


def _moment(given: str | None, name: str) -> datetime | None:
    if given is None:
        return None
    # A plus sign that nobody has escaped arrives as a space.
    text = given.strip().replace(" ", "+") if "T" in given else given.strip()
    try:
        if len(text) == len("2026-11-21"):
            return datetime.combine(date.fromisoformat(text), time(), UTC)
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValidationFailed(f"{name}: must be a day or a time, such as 2026-11-21T09:30:00Z") from error


def _start(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not cursor.isascii() or not cursor.isdigit():
        raise InvalidCursor
    return int(cursor)
