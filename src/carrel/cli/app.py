"""The command itself: its global options, its subcommands, and how it ends."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from carrel import __version__
from carrel.cli import (
    audit,
    backup,
    chat,
    demo,
    doctor,
    env,
    importing,
    keys,
    migrate,
    serve,
    sessions,
    settings,
    socket_proxy,
    token,
    usage,
    users,
)
from carrel.cli.context import Context
from carrel.cli.output import one_line
from carrel.errors import CarrelError, OperatorError

__all__ = ["app", "main", "run"]

INTERRUPTED = 130

app = typer.Typer(
    name="carrel",
    help="Carrel runs Claude Code as a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("chat")(chat.chat)
app.add_typer(sessions.app, name="sessions")
app.command("audit")(audit.audit)
app.add_typer(env.app, name="env")
app.add_typer(importing.app, name="import")
app.add_typer(keys.app, name="keys")
app.add_typer(users.app, name="users")
app.add_typer(token.app, name="token")
app.command("usage")(usage.usage)
app.command("settings")(settings.settings)
app.command("socket-proxy")(socket_proxy.socket_proxy)
app.command("doctor")(doctor.doctor)
app.command("migrate")(migrate.migrate)
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carrel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    typer_context: typer.Context,
    url: Annotated[str | None, typer.Option(help="The server. (default: the one that runs on the data folder)")] = None,
    key: Annotated[str | None, typer.Option(help="The API key. (default: the data folder's admin key)")] = None,
    data: Annotated[Path | None, typer.Option(help="The data folder. (default: CARREL_DATA or ./carrel-data)")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error came from.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Carrel runs Claude Code as a service."""
    context: Context = typer_context.obj
    context.url, context.key, context.data, context.debug = url, key, data, debug


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and answer its exit code: 0, 1, or 2 where the command itself was wrong."""
    context = Context()
    try:
        result = app(args=arguments, prog_name="carrel", standalone_mode=False, obj=context)
        return result if isinstance(result, int) else 0
    except typer.Exit as leaving:
        return leaving.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except typer.TyperException as error:
        _complain(error.format_message(), context)
        return error.exit_code
    except CarrelError as error:
        _complain(error.message, context)
        return 2 if isinstance(error, OperatorError) else 1
    except BrokenPipeError:
        _forget_output()
        return 1
    except OSError as error:
        _complain(": ".join(str(part) for part in (error.strerror, error.filename) if part) or repr(error), context)
        return 1
    except Exception as error:  # the last door: nobody should have to read a traceback who did not ask for one
        _complain(f"internal error, {type(error).__name__}; run it again with `carrel --debug …`", context)
        return 1


def main() -> None:
    """The entry point of the command `carrel`."""
    sys.exit(run())


def _complain(message: str, context: Context) -> None:
    print(f"carrel: {one_line(message)}", file=sys.stderr)
    if context.debug:
        traceback.print_exc()


def _forget_output() -> None:
    # Whoever read our output has gone; without this Python complains of it once more while it exits.
    sys.stdout = None
