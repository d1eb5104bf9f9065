"""What a dialect is told by whoever wires the server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from carrel.api.dialects.auth import DialectAuth


@dataclass(frozen=True, kw_only=True)
class DialectOptions:
    """How a dialect is served."""

    auth: DialectAuth
    users_dir: Path
    """Where users' own directories are; told to clients as part of `cwd`."""
    storage_type: str = "sqlite"
    """`memory`, `sqlite` or `postgresql`."""
    authenticated: bool = True
    """Whether there is a credential for the model."""
    allow_bypass: bool = True
    """Whether sessions may act without asking."""
    default_model: str | None = None
    """The model of sessions that name none, where it is known."""
    chosen: frozenset[str] = frozenset()
    """The defaults of sessions that the operator has chosen, by name; what the old service had counts for the others."""
