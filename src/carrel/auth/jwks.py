"""The public keys of whoever signs the tokens: fetched, kept, and fetched anew when they change."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import jwt
import structlog
from pydantic_core import from_json

from carrel.errors import UnsafeConfiguration

__all__ = ["ALGORITHMS", "Jwks"]

log = structlog.get_logger(__name__)

ALGORITHMS: Final = frozenset({"RS256", "ES256"})

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_LARGEST_BYTES = 1024 * 1024
_TIMEOUT_SECONDS = 5.0


class Jwks:
    """A set of keys at an address, or at the one an OpenID issuer names."""

    def __init__(
        self,
        *,
        url: str | None,
        issuer: str | None,
        client: httpx.AsyncClient,
        allow_insecure: bool = False,
        refetch_seconds: float = 10.0,
        refresh_seconds: float = 3600.0,
    ) -> None:
        """Make it; nothing is fetched before `start`.

        Args:
            url: where the keys are; None: where `<issuer>/.well-known/openid-configuration` says.
            issuer: the OpenID issuer; needed without `url`.
            client: asks for them. It must not follow redirects.
            allow_insecure: permits addresses off this host without TLS.
            refetch_seconds: unknown keys make us ask at most this often, and so does a failure.
            refresh_seconds: so often they are asked for anyway, so that a key that was withdrawn is forgotten.

        Raises:
            UnsafeConfiguration: the address is not one that can be trusted.
        """
        self._url = url
        self._issuer = issuer
        self._client = client
        self._allow_insecure = allow_insecure
        self._refetch_seconds = refetch_seconds
        self._refresh_seconds = refresh_seconds
        self._keys: dict[str | None, list[jwt.PyJWK]] = {}
        self._lock = asyncio.Lock()
        self._asked_at: float | None = None
        self._answers = 0
        self._well = False
        given = url or issuer or ""
        if not self._safe(given):
            raise UnsafeConfiguration(
                f"The keys that tokens are checked with would come from {given!r}, which anybody on the way could "
                "change. Use an https address, or set allow_insecure: true."
            )

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Fetch the keys in the background and keep them fresh; closing is registered with `exit_stack`."""
        task = asyncio.create_task(self._repeat(), name="jwks")

        async def close() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        exit_stack.push_async_callback(close)

    async def key(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key of this name and algorithm; without a name, the only one there is. None where there is none.

        An unknown name has the keys fetched again: they may have been rotated.
        """
        found = self._find(kid, algorithm)
        if found is None and await self._refresh():
            found = self._find(kid, algorithm)
        return found

    def _find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        named = self._keys.get(kid, []) if kid is not None else [key for keys in self._keys.values() for key in keys]
        fitting = [key for key in named if key.algorithm_name == algorithm]
        return fitting[0] if len(fitting) == 1 else None

    async def _repeat(self) -> None:
        while True:
            well = await self._refresh()
            await asyncio.sleep(self._refresh_seconds if well and self._keys else self._refetch_seconds)

    async def _refresh(self) -> bool:
        """Ask for the keys, unless that was done a moment ago. False when that failed; then the old ones stay."""
        before = self._answers
        async with self._lock:
            if self._answers != before:
                return self._well  # somebody else was asking while we waited
            now = asyncio.get_running_loop().time()
            if self._asked_at is not None and now - self._asked_at < self._refetch_seconds:
                return False
            self._asked_at = now
            self._well = await self._ask()
            self._answers += 1
            return self._well

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                self._keys = _usable(await self._fetch())
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
            log.warning("jwks.not_fetched", error=type(error).__name__, keys_kept=len(self._keys))
            return False
        log.info("jwks.fetched", keys=len(self._keys))
        return True

    async def _fetch(self) -> Any:
        url = self._url
        if url is None:
            found = await self._get(f"{(self._issuer or '').rstrip('/')}/.well-known/openid-configuration")
            url = found.get("jwks_uri") if isinstance(found, dict) else None
            if not isinstance(url, str) or found.get("issuer") != self._issuer or not self._safe(url):
                raise ValueError("the issuer's configuration is not what it should be")
        return await self._get(url)

    async def _get(self, url: str) -> Any:
        body = bytearray()
        async with self._client.stream("GET", url, headers={"Accept": "application/json"}) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}")
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _LARGEST_BYTES:
                    raise ValueError("too large")
        return from_json(bytes(body))

    def _safe(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError:  # no address at all
            return False
        if not host:
            return False
        return parts.scheme == "https" or (parts.scheme == "http" and (self._allow_insecure or host in _LOOPBACK))


def _usable(document: Any) -> dict[str | None, list[jwt.PyJWK]]:
    """The public keys that can check a signature of ours, by their names.

    Raises:
        ValueError: it is not a set of keys, or none of them is of use.
    """
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("not a set of keys")
    found: dict[str | None, list[jwt.PyJWK]] = {}
    for value in listed:
        if not isinstance(value, dict) or value.get("use", "sig") != "sig" or value.get("kty") not in ("RSA", "EC"):
            continue
        algorithm = "RS256" if value["kty"] == "RSA" else "ES256"
        if value.get("alg", algorithm) != algorithm or (algorithm == "ES256" and value.get("crv") != "P-256"):
            continue
        # A private key that was published by mistake is no key to trust.
        if "d" in value:
            continue
        try:
            key = jwt.PyJWK(value, algorithm)
        except jwt.PyJWTError:
            continue
        kid = value.get("kid")
        found.setdefault(kid if isinstance(kid, str) else None, []).append(key)
    if not found:
        raise ValueError("no usable key")
    return found
