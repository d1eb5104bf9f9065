"""How the gateway's road to MCP servers comes by secrets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

from carrel.protocol.environments import EnvironmentSpec

__all__ = ["OpenSecrets"]

OpenSecrets = Callable[[EnvironmentSpec, Collection[str]], Awaitable[Mapping[str, str]]]
"""From an environment and names of its secrets to their values. Raises SecretMissing."""
