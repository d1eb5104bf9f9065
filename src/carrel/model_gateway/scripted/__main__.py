"""Serves the scripted model by itself: `python -m carrel.model_gateway.scripted --port N | --uds PATH`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import uvicorn

from carrel.model_gateway.scripted.app import create_app
from carrel.model_gateway.scripted.script import BUILTIN, ScriptError, load_script


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to end; 2 for a script that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        script = load_script(options.script) if options.script else BUILTIN
    except ScriptError as error:
        print(error, file=sys.stderr)
        return 2
    where = {"uds": options.uds} if options.uds else {"host": "127.0.0.1", "port": options.port}
    uvicorn.run(create_app(script, api_key=options.api_key), log_level="warning", timeout_graceful_shutdown=1, **where)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="carrel.model_gateway.scripted", description="The scripted model.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="listen on 127.0.0.1:PORT")
    where.add_argument("--uds", metavar="PATH", help="listen on a unix socket")
    parser.add_argument("--script", metavar="FILE", help="a YAML script; without it, the built-in one")
    parser.add_argument("--api-key", metavar="KEY", help="refuse every other key")
    return parser


if __name__ == "__main__":
    sys.exit(main())
