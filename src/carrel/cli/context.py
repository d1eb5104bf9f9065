"""What every command is given: the global options, and with them the way to the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from carrel.client import AsyncCarrel, Carrel
from carrel.errors import ServerUnreachable
from carrel.settings import Settings, load_settings

__all__ = ["Context", "context_of", "running_server"]


@dataclass
class Context:
    """The global options."""

    url: str | None = None
    key: str | None = None
    data: Path | None = None
    debug: bool = False

    def settings(
        self, config: Path | None = None, overrides: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
    ) -> Settings:
        """The settings, as the command line changes them."""
        return load_settings(config, {"data": self.data} | dict(overrides or {}), assignments)

    def server(self) -> tuple[str, str | None]:
        """The server's address, and the key for it.

        Raises:
            ServerUnreachable: no address is given, and no server runs on the data folder.
        """
        if self.url is not None and self.key is not None:
            return self.url, self.key
        data = self.settings().data
        running = running_server(data)
        url = self.url or running
        if url is None:
            raise ServerUnreachable(
                f"No server runs on {data}; start one with `carrel serve`, or say where it is with --data or --url."
            )
        if self.key is not None:
            return url, self.key
        # The admin key is for our own server alone: another address might be anybody's.
        ours = running is not None and url.rstrip("/") == running.rstrip("/")
        return url, _key_of(data) if ours else None

    def connect(self) -> Carrel:
        """A blocking client of the server."""
        url, key = self.server()
        return Carrel(url, key)

    def connect_async(self) -> AsyncCarrel:
        """An asynchronous client of the server."""
        url, key = self.server()
        return AsyncCarrel(url, key)


def context_of(typer_context: typer.Context) -> Context:
    """The context that a command was started with."""
    found: Context = typer_context.obj
    return found


def running_server(data: Path) -> str | None:
    """The address that the server of a data folder has left there, if one runs or died without a word."""
    try:
        value = json.loads((data / "server.json").read_text())
    except (OSError, ValueError):  # not there, not ours to read, or half written: no address is known
        return None
    url = value.get("url") if isinstance(value, dict) else None
    return url if isinstance(url, str) else None


def _key_of(data: Path) -> str | None:
    try:
        return (data / "admin.key").read_text().strip() or None
    except FileNotFoundError:  # a server without authentication
        return None
