"""`carrel audit`: who did what."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

import typer
from pydantic_core import from_json

from carrel.cli.context import context_of
from carrel.cli.output import print_table, when
from carrel.errors import InvalidRequest

__all__ = ["audit"]


def audit(
    context: typer.Context,
    user: Annotated[str | None, typer.Option(help="Only what this user did.")] = None,
    principal: Annotated[str | None, typer.Option(help="Only what this key, token or user did.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, such as session.create.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only what was done to the object.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="From then on, such as 2026-11-21.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="And before then.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most; --json and --csv take them all.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Everything that fits, a JSON text a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Everything that fits, as CSV.")] = False,
) -> None:
    """Show the audit log, newest first. Needs an admin's key."""
    if as_json and as_csv:
        raise InvalidRequest("Choose one of --json and --csv.")
    filters = {
        "user": user,
        "principal": principal,
        "action": action,
        "object_id": object_id,
        "since": _moment(since),
        "until": _moment(until),
    }
    with context_of(context).connect() as carrel, closing(carrel.audit(as_csv=as_csv, **filters)) as chunks:
        if as_json or as_csv:
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        rows = [_row(record) for record in islice(_records(chunks), limit)]
    print_table(["when", "who", "action", "object", "outcome", "from"], rows)


def _moment(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is not a time; write one such as 2026-11-21 or 2026-11-21T09:30.") from error
    return (moment if moment.tzinfo is not None else moment.astimezone()).isoformat()


def _records(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield from_json(line)


def _row(record: dict[str, Any]) -> list[str]:
    what = " ".join(str(part) for part in (record["object_type"], record["object_id"]) if part)
    times = record["details"].get("times")
    outcome = str(record["outcome"]) + (f" ×{times}" if times else "")
    return [
        when(datetime.fromisoformat(record["at"])),
        record["principal"],
        record["action"],
        what,
        outcome,
        record["address"] or "",
    ]
