"""From where a request comes: the peer, or whom a trusted proxy speaks for."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.types import Scope

from carrel.errors import InvalidSettings

__all__ = ["Proxies"]

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Proxies:
    """The proxies whose X-Forwarded-For is believed."""

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        """Trust these addresses or networks, such as `10.0.0.5` or `10.0.0.0/8`.

        Raises:
            InvalidSettings: one of them is neither.
        """
        self._networks: list[_Network] = []
        for text in trusted:
            try:
                self._networks.append(ipaddress.ip_network(text.strip(), strict=False))
            except ValueError as error:
                raise InvalidSettings(f"trusted_proxies: {text!r} is neither an address nor a network.") from error

    def address(self, scope: Scope) -> str | None:
        """The caller's address, without a port; None where the peer has none (a unix socket).

        The header counts only when the peer itself is trusted, and then from the right: each trusted proxy has added
        whom it heard from, and what stands left of the first untrusted entry may be anybody's invention.
        """
        peer = scope.get("client")
        if not peer:
            return None
        found = _parse(peer[0])
        if found is None or not self._trusts(found):
            return str(found or peer[0])
        for entry in reversed(_forwarded(scope)):
            hop = _parse(entry)
            if hop is None:
                break
            found = hop
            if not self._trusts(hop):
                break
        return str(found)

    def _trusts(self, address: _Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def _forwarded(scope: Scope) -> list[str]:
    values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return [entry for entry in ",".join(values).split(",") if entry.strip()]


def _parse(text: str) -> _Address | None:
    text = text.strip()
    if text.startswith("["):  # [::1]:4711
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # 192.0.2.1:4711
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
