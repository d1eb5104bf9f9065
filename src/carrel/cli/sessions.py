"""`carrel sessions`: look at sessions, and end them."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from carrel.cli.context import context_of
from carrel.cli.output import budget_words, clean, print_json, print_table, when
from carrel.client import Session
from carrel.model import SessionStatus

__all__ = ["app"]

app = typer.Typer(help="Look at sessions, and end them.", no_args_is_help=True)

_LARGEST_PAGE = 1000

SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")]
SessionIds = Annotated[list[str], typer.Argument(metavar="SESSION...", help="The ids of the sessions.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list")
def list_sessions(
    context: typer.Context,
    status: Annotated[SessionStatus | None, typer.Option(help="Only those with this status.")] = None,
    search: Annotated[str | None, typer.Option(help="Only those with this in their title or conversation.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List sessions, newest first."""
    with context_of(context).connect() as carrel:
        pages = carrel.sessions.list(status=status, q=search, page_size=min(limit, _LARGEST_PAGE))
        found = list(islice(pages, limit))
    if as_json:
        print_json(found)
        return
    rows = [
        [s.id, s.status, str(s.turn_count), _cost(s.cost_usd), when(s.last_active_at), s.title or ""] for s in found
    ]
    print_table(["session", "status", "turns", "cost", "last active", "title"], rows)


@app.command("show")
def show_session(context: typer.Context, session_id: SessionId, as_json: AsJson = False) -> None:
    """Show a session and its latest turns."""
    with context_of(context).connect() as carrel:
        session = carrel.sessions.get(session_id)
        if as_json:
            print_json(session)
            return
        turns = list(islice(carrel.turns.list(session_id, page_size=5), 5))
    for name, value in _facts(session):
        sys.stdout.write(f"{name + ':':<14}{clean(value)}\n")
    if turns:
        sys.stdout.write("\n")
        rows = [
            [
                turn.id,
                turn.status,
                turn.stop_reason or "",
                _cost(turn.cost_usd),
                "" if turn.created_at is None else when(turn.created_at),
                turn.error.message if turn.error else "",
            ]
            for turn in turns
        ]
        print_table(["turn", "status", "stop reason", "cost", "asked", "error"], rows)


def _facts(session: Session) -> list[tuple[str, str]]:
    facts: list[tuple[str, Any]] = [
        ("session", session.id),
        ("title", session.title),
        ("status", session.status),
        ("stop reason", session.stop_reason),
        ("error", session.error.message if session.error else None),
        ("turns", session.turn_count),
        ("cost", _cost(session.cost_usd)),
        ("budget", budget_words(session.budget) if session.budget is not None else None),
        ("created", when(session.created_at)),
        ("last active", when(session.last_active_at)),
        ("forked from", session.forked_from),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


@app.command("messages")
def show_messages(
    context: typer.Context,
    session_id: SessionId,
    search: Annotated[str | None, typer.Option(help="Only those in which this was said.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a session's conversation: what was said, which tools were called, what they answered."""
    with context_of(context).connect() as carrel:
        messages = carrel.sessions.messages(session_id, q=search)
        if as_json:
            print_json(list(messages))
            return
        for message in messages:
            who = f"{message.role} (sub-agent)" if message.parent_tool_use_id else message.role
            sys.stdout.write(f"── {who}, {when(message.at)}\n")
            for block in message.content:
                sys.stdout.write(f"{clean(_words(block))}\n")


def _words(block: dict[str, Any]) -> str:
    match block.get("type"):
        case "text":
            return str(block.get("text", ""))
        case "tool_use":
            return f"[{block.get('name')} {json.dumps(block.get('input'), ensure_ascii=False)}]"
        case "tool_result":
            content = block.get("content")
            return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"[{block.get('type')}]"


@app.command("stop")
def stop_sessions(context: typer.Context, session_ids: SessionIds) -> None:
    """Stop sessions: their turns are interrupted, their processes end, and they take no prompt until they resume."""
    with context_of(context).connect() as carrel:
        for session_id in session_ids:
            session = carrel.sessions.stop(session_id)
            sys.stdout.write(f"{session.id}  {session.status}\n")


@app.command("delete")
def delete_sessions(
    context: typer.Context,
    session_ids: SessionIds,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete sessions for good, with their conversations and files."""
    if not yes and sys.stdin.isatty():
        many = f"{len(session_ids)} sessions" if len(session_ids) > 1 else f"session {session_ids[0]}"
        typer.confirm(f"Delete {many} for good?", abort=True)
    with context_of(context).connect() as carrel:
        for session_id in session_ids:
            carrel.sessions.delete(session_id)
            sys.stdout.write(f"{session_id}  deleted\n")


@app.command("export")
def export_session(
    context: typer.Context,
    session_id: SessionId,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file. (default: standard output)")] = None,
) -> None:
    """Write everything of a session, a JSON text a line: the session, its turns, its events, its transcript."""
    with context_of(context).connect() as carrel:
        chunks = carrel.sessions.export(session_id)
        if output is None:
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        # Under its own name only when it is whole: a half export looks like a whole one.
        part = output.with_name(f"{output.name}.part")
        try:
            with part.open("wb") as file:
                file.writelines(chunks)
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)


def _cost(cost_usd: float | None) -> str:
    return "" if cost_usd is None else f"${cost_usd:.4f}"
