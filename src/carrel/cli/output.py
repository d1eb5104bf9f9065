"""How commands write to the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic_core import to_json

from carrel.model import Budget

__all__ = ["budget_words", "clean", "one_line", "print_json", "print_table", "when"]

# What an agent writes is not trusted with the terminal: escape sequences could move, hide and answer things.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """The text without control characters, lines and tabs aside."""
    return _CONTROL.sub("", text)


def one_line(text: str) -> str:
    """The text in one line, without control characters."""
    return clean(" ".join(text.split()))


def print_json(value: Any) -> None:
    """The value as JSON, for programs."""
    sys.stdout.write(to_json(value, indent=2).decode() + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be, the last one open; the same on a terminal and in a pipe."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    for row in [[name.upper() for name in header], *cells]:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def when(moment: datetime) -> str:
    """A time, to the second, where the reader is."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def budget_words(budget: Budget) -> str:
    """How large a budget is."""
    sizes = [] if budget.max_usd is None else [f"${budget.max_usd:.2f}"]
    sizes += [] if budget.max_tokens is None else [f"{budget.max_tokens:,} tokens"]
    return ", ".join(sizes) or "no limit"
