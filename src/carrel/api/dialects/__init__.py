"""Older services' HTTP APIs, each a thin adapter over the same sessions."""

from carrel.api.dialects.auth import DialectAuth
from carrel.api.dialects.mounting import DIALECTS, Listeners, create_dialect, mount
from carrel.api.dialects.options import DialectOptions

__all__ = ["DIALECTS", "DialectAuth", "DialectOptions", "Listeners", "create_dialect", "mount"]
