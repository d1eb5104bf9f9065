"""Which addresses a name may lead to: those of the public internet, and what the operator adds."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = ["Judge"]

Address = IPv4Address | IPv6Address

_METADATA = frozenset(
    map(
        ip_address,
        (
            "169.254.169.254",  # most clouds
            "169.254.170.2",  # containers' credentials
            "100.100.100.200",
            "168.63.129.16",  # public by its number, and of the host
            "192.0.0.192",
            "fd00:ec2::254",
            "fd20:ce::254",
        ),
    )
)
"""Where clouds tell a machine its own credentials. No setting opens these."""
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
_COMPATIBLE = IPv6Network("::/96")
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_SPECIAL = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/3"),
            *("2001::/23", "2001:db8::/32", "3fff::/20"),
        ),
    )
)
"""Of the registries of special addresses; releases of Python know them differently well."""


class Judge:
    """Says of an address whether a sandbox may be led there."""

    def __init__(self, private_networks: Iterable[str] = ()) -> None:
        """Permit what is public, and these networks."""
        self._private = [ip_network(text, strict=False) for text in private_networks]

    def permits(self, address: Address) -> bool:
        """Whether it may be connected to. What it carries within, as IPv6 can, is judged as well."""
        every = [address, *_within(address)]
        if any(each in _METADATA for each in every):
            return False
        if any(each in network for each in every for network in self._private if each.version == network.version):
            return True
        return all(_public(each) for each in every if not _carries_only(each)) and not _our_own(address)


def _public(address: Address) -> bool:
    if any(address in network for network in _SPECIAL if network.version == address.version):
        return False
    if address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global:
        return False
    return address.version == 4 or address in _GLOBAL_IPV6


def _carries_only(address: Address) -> bool:
    """Whether it is nothing but another address in a new dress, by which alone it is judged."""
    return isinstance(address, IPv6Address) and (address.ipv4_mapped is not None or address in _NAT64[0])


def _within(address: Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that some router or kernel may make of this one."""
    if isinstance(address, IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if any(address in network for network in _NAT64) or address in _COMPATIBLE:
        yield IPv4Address(int(address) & 0xFFFF_FFFF)
    if (int(address) >> 32) & 0xFDFF_FFFF == 0x5EFE:  # ISATAP
        yield IPv4Address(int(address) & 0xFFFF_FFFF)


def _our_own(address: Address) -> bool:
    """Whether it is this machine's, whose services may trust what comes from itself."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
