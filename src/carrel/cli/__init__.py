"""The command line: `carrel serve`, `demo`, `chat`, `sessions`, `settings`, `doctor`."""

from carrel.cli.app import main

__all__ = ["main"]
