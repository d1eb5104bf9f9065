"""`carrel keys`: make, list and revoke API keys."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from carrel.cli.context import Context, context_of
from carrel.cli.durations import seconds_of
from carrel.cli.output import clean, print_json, print_table, when
from carrel.cli.registry import registry
from carrel.client import ApiKey
from carrel.model import USER_ID, Scope, utc_now

__all__ = ["AsJson", "DataFolder", "Expires", "Scopes", "UserName", "app", "with_data"]

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


def _user_name(text: str) -> str:
    if re.fullmatch(USER_ID, text) is None:
        raise typer.BadParameter("a user's name has 1 to 64 letters, digits, _ and -")
    return text


AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="The data folder. (default: as for every command)")]
UserName = Annotated[str, typer.Option("--user", parser=_user_name, metavar="NAME", help="Whose.")]
Scopes = Annotated[list[Scope] | None, typer.Option("--scope", help="What may be done; may be given several times.")]
Expires = Annotated[
    int | None, typer.Option("--expires", parser=seconds_of, metavar="90d", help="How long it is good.")
]


def with_data(context: typer.Context, data: Path | None) -> Context:
    """The context, with a data folder that is named after the command."""
    given = context_of(context)
    given.data = data or given.data
    return given


@app.command("create")
def create_key(
    context: typer.Context,
    user: UserName,
    scope: Scopes = None,
    expires: Expires = None,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make a key for a user, who is made too where there is none. Without --scope it may read and write.

    The key is shown now and never again.
    """
    with registry(with_data(context, data), make=True) as found:
        key = found.create_key(user, scope or None, name, expires)
    if as_json:
        print_json(key)
        return
    sys.stdout.write(f"The key, shown once:\n\n    {key.key}\n\n")
    for label, value in (
        ("id", key.id),
        ("user", key.user_id),
        ("scopes", ", ".join(key.scopes)),
        ("expires", when(key.expires_at) if key.expires_at else "never"),
    ):
        sys.stdout.write(f"{label + ':':<10}{clean(value)}\n")


@app.command("list")
def list_keys(
    context: typer.Context,
    user: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """List keys, newest first. The keys themselves are not kept anywhere."""
    with registry(with_data(context, data)) as found:
        keys = found.keys(user)
    if as_json:
        print_json(keys)
        return
    rows = [
        [
            key.id,
            key.user_id,
            f"{key.prefix}…",
            _state(key),
            ", ".join(key.scopes),
            when(key.last_used_at) if key.last_used_at else "never",
            key.name or "",
        ]
        for key in keys
    ]
    print_table(["key", "user", "begins", "state", "scopes", "last used", "name"], rows)


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "good"
    return "expired" if key.expires_at <= utc_now() else f"good until {when(key.expires_at)}"


@app.command("revoke")
def revoke_keys(
    context: typer.Context,
    key_ids: Annotated[list[str], typer.Argument(metavar="KEY...", help="The ids of the keys.")],
    data: DataFolder = None,
) -> None:
    """Revoke keys: from now on they open nothing."""
    with registry(with_data(context, data)) as found:
        for key_id in key_ids:
            found.revoke_key(key_id)
            sys.stdout.write(f"{clean(key_id)}  revoked\n")
