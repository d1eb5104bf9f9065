"""Durations as people write them: `90d`, `12h`."""

from __future__ import annotations

import re

import typer

__all__ = ["seconds_of"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_LONGEST_DAYS = 3660


def seconds_of(text: str) -> int:
    """The duration in seconds. Raises typer.BadParameter."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip().lower())
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_DAYS * _UNITS["d"]:
        raise typer.BadParameter(f"{text!r} is no duration of up to ten years, such as 90d, 12h, 30m or 45s")
    return seconds
