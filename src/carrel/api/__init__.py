"""The HTTP API."""

from carrel.api.app import create_app
from carrel.api.dependencies import Services

__all__ = ["Services", "create_app"]
