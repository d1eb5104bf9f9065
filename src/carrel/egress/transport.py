"""What the gateway itself asks on a sandbox's behalf by HTTP: it goes to the very addresses that were checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from carrel.egress.dialling import Dialler, NotDialled

__all__ = ["CheckedTransport"]


class CheckedTransport(httpx.AsyncHTTPTransport):
    """A transport for `httpx.AsyncClient` that connects to what a dialler permits, and to nothing else.

    A name that may not be connected to is `httpx.ConnectError`, whose text is the dialler's reason. No proxy of the
    environment is used: it would resolve the name anew.
    """

    def __init__(self, dialler: Dialler, *, max_connections: int) -> None:
        """Make it. `max_connections`: at once; who needs one more waits."""
        super().__init__()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=max_connections,
            keepalive_expiry=30.0,
            network_backend=_Backend(dialler),
        )


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, dialler: Dialler) -> None:
        self._dialler = dialler
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            permitted = await self._dialler.addresses(host, port)
        except NotDialled as error:
            raise httpcore.ConnectError(error.reason) from error
        for address in permitted:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the name may have another address that answers
        raise httpcore.ConnectError("unreachable")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("private_address")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)
