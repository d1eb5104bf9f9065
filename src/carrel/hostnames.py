"""Names of hosts: as policies write them, as programs ask for them, and which of them a policy names.

A name has one form here: small letters, punycode for what is not ASCII, no dot at its end. What could be taken for an
address by anyone, in any of the forms that C libraries accept (`127.1`, `0x7f000001`, `2130706433`), is no name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["AddressLiteral", "HostPattern", "canonical_host", "narrowed", "permits", "within"]

DEFAULT_PORTS = (80, 443)
"""What a name without a port stands for."""

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LONGEST = 253


class AddressLiteral(ValueError):
    """It is an address, and no name."""


def canonical_host(text: str) -> str:
    """The name in its one form.

    Raises:
        AddressLiteral: it is an address.
        ValueError: it is no name of a host.
    """
    if any(mark in text for mark in ":[]%"):
        raise AddressLiteral(f"{_shown(text)} is an address; names alone can be allowed")
    name = (text if text.isascii() else _punycode(text)).lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        raise AddressLiteral(f"{_shown(text)} is an address; names alone can be allowed")
    if len(name) > _LONGEST or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{_shown(text)} is no name of a host")
    return name


def _punycode(text: str) -> str:
    try:
        name = text.encode("idna").decode("ascii")
        # Two standards disagree on a few letters. A name that does not come back as it was is one of these.
        same = name.encode("ascii").decode("idna") == text.lower()
    except UnicodeError as error:
        raise ValueError(f"{_shown(text)} is no name of a host") from error
    if not same:
        raise ValueError(f"{_shown(text)} can be read in two ways; write it in ASCII (xn--…)")
    return name


def _shown(text: str) -> str:
    return ascii(text[:100])


@dataclass(frozen=True)
class HostPattern:
    """A name that is allowed: `example.org`, `*.example.org` (all below it), `example.org:8443`."""

    name: str
    wildcard: bool = False
    port: int | None = None
    """None: the default ports."""

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def parse(cls, text: str) -> HostPattern:
        """The pattern that this says.

        Raises:
            ValueError: it says none.
        """
        host, colon, digits = text.strip().partition(":")
        wildcard = host.startswith("*.")
        if colon and not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 65536):
            raise ValueError(f"{_shown(text)} is no name with a port, such as example.org:8443")
        return cls(canonical_host(host.removeprefix("*.")), wildcard, int(digits) if colon else None)

    def __str__(self) -> str:
        return f"{'*.' if self.wildcard else ''}{self.name}{'' if self.port is None else f':{self.port}'}"

    def names(self, host: str) -> bool:
        """Whether this host, in its one form, is meant."""
        return host.endswith(f".{self.name}") if self.wildcard else host == self.name

    def matches(self, host: str, port: int) -> bool:
        """Whether this port of this host is meant."""
        return self.names(host) and (port in DEFAULT_PORTS if self.port is None else port == self.port)

    def covers(self, other: HostPattern) -> bool:
        """Whether all that `other` means is meant by this one too."""
        if self.port != other.port and not (self.port is None and other.port in DEFAULT_PORTS):
            return False
        if other.wildcard:
            return self.wildcard and (other.name == self.name or self.names(other.name))
        return self.names(other.name)


def permits(allow: Iterable[str], host: str, port: int) -> bool:
    """Whether a list of patterns means this port of this host, which is in its one form."""
    return any(HostPattern.parse(each).matches(host, port) for each in allow)


def within(narrow: Iterable[str], wide: Iterable[str]) -> bool:
    """Whether all that the narrow list means is meant by the wide one."""
    return not set(narrow) - set(narrowed(wide, narrow))


def narrowed(one: Iterable[str], other: Iterable[str]) -> tuple[str, ...]:
    """What both lists mean, those of the other first, in its order."""
    first, second = [HostPattern.parse(each) for each in one], [HostPattern.parse(each) for each in other]
    both = [each for each in second if any(wide.covers(each) for wide in first)]
    both += [each for each in first if each not in both and any(wide.covers(each) for wide in second)]
    return tuple(str(each) for each in both)
