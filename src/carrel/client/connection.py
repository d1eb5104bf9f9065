"""How a client is connected: addresses, headers, limits. What both clients share of httpx."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

import httpx

from carrel import __version__
from carrel.errors import InvalidSettings

__all__ = ["Connection"]


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the server is, and how long to wait for it.

    Raises:
        InvalidSettings: the address is none.
    """

    base_url: str
    api_key: str | None
    timeout_seconds: float
    silence_seconds: float
    reconnect_seconds: float

    def __post_init__(self) -> None:
        try:
            there = httpx.URL(self.base_url)
        except httpx.InvalidURL:
            there = httpx.URL("")
        if there.scheme not in ("http", "https") or not there.host:
            raise InvalidSettings(f"{self.base_url!r} is not an address; it begins with http:// or https://.")

    def __repr__(self) -> str:
        return f"Connection({self.base_url!r})"

    def arguments(self) -> dict[str, Any]:
        """The arguments of `httpx.Client` and `httpx.AsyncClient`."""
        headers = {"User-Agent": f"carrel-python/{__version__}", "Accept": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return {
            "base_url": self.base_url,
            "headers": headers,
            "timeout": httpx.Timeout(self.timeout_seconds, connect=10),
            # A proxy is for the world outside; it would look for its own loopback.
            "trust_env": not _is_loopback(httpx.URL(self.base_url).host),
            # Every stream is a connection that stays, and a client may hold many.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
        }

    def stream_timeout(self) -> httpx.Timeout:
        """A stream that says nothing for so long, not even a heartbeat, is broken."""
        return httpx.Timeout(self.timeout_seconds, connect=10, read=self.silence_seconds)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
