"""`carrel users`: list users, lock them out, let them in again."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from carrel.cli.keys import AsJson, DataFolder, with_data
from carrel.cli.output import clean, print_json, print_table, when
from carrel.cli.registry import registry
from carrel.model import Budget

__all__ = ["app"]

app = typer.Typer(help="List users, lock them out, let them in again.", no_args_is_help=True)

UserIds = Annotated[list[str], typer.Argument(metavar="USER...", help="The names of the users.")]


@app.command("list")
def list_users(context: typer.Context, data: DataFolder = None, as_json: AsJson = False) -> None:
    """List users."""
    with registry(with_data(context, data)) as found:
        users = found.users()
    if as_json:
        print_json(users)
        return
    rows = [
        [
            user.id,
            "disabled" if user.disabled else "",
            "" if user.max_sessions is None else str(user.max_sessions),
            _budget(user.budget),
            _budget(user.daily_budget),
            when(user.created_at),
        ]
        for user in users
    ]
    print_table(["user", "state", "max sessions", "budget", "daily budget", "created"], rows)


def _budget(budget: Budget | None) -> str:
    if budget is None:
        return ""
    usd = None if budget.max_usd is None else f"${budget.max_usd:g}"
    tokens = None if budget.max_tokens is None else f"{budget.max_tokens} tokens"
    return ", ".join(filter(None, (usd, tokens)))


@app.command("disable")
def disable_users(context: typer.Context, user_ids: UserIds, data: DataFolder = None) -> None:
    """Lock users out: their keys and tokens open nothing. Their sessions stay."""
    _set(context, user_ids, data, disabled=True)


@app.command("enable")
def enable_users(context: typer.Context, user_ids: UserIds, data: DataFolder = None) -> None:
    """Let users in again."""
    _set(context, user_ids, data, disabled=False)


def _set(context: typer.Context, user_ids: list[str], data: DataFolder, *, disabled: bool) -> None:
    with registry(with_data(context, data)) as found:
        for user_id in user_ids:
            user = found.set_disabled(user_id, disabled)
            sys.stdout.write(f"{clean(user.id)}  {'disabled' if user.disabled else 'enabled'}\n")
