"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Principal:
    """Somebody or something that calls."""

    name: str


ADMIN = Principal("admin")
"""The holder of the admin key, and everyone where authentication is off."""
