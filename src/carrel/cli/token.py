"""`carrel token`: JSON Web Tokens for development."""

from __future__ import annotations

import sys
from datetime import timedelta

import typer

from carrel.auth import issue
from carrel.cli.authentication import jwt_options
from carrel.cli.keys import AsJson, DataFolder, Expires, Scopes, UserName, with_data
from carrel.cli.output import print_json

__all__ = ["app"]

app = typer.Typer(help="JSON Web Tokens for development.", no_args_is_help=True)

_AN_HOUR_SECONDS = 3600


@app.callback()
def group() -> None:
    """JSON Web Tokens for development."""


@app.command("create")
def create_token(
    context: typer.Context,
    user: UserName,
    scope: Scopes = None,
    expires: Expires = None,
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Sign a token with the configured jwt.secret. It is good for an hour, or as long as --expires says.

    For development: in production your identity provider makes them.
    """
    options = jwt_options(with_data(context, data).settings())
    seconds = expires or _AN_HOUR_SECONDS
    token = issue(options, user, scopes=frozenset(scope) if scope else None, lifetime=timedelta(seconds=seconds))
    if as_json:
        print_json({"token": token, "user": user, "expires_in_seconds": seconds})
        return
    sys.stdout.write(token + "\n")
