"""The last belt against secrets in what operators read: whatever looks like one is hidden, wherever it stands.

Nothing should come here that needs it. The first belt is that secrets are not logged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, quote

__all__ = ["HIDDEN", "Redactor", "redacted_query"]

HIDDEN = "[redacted]"
_SHORTEST = 8
_DEEPEST = 8

_PATTERNS = re.compile(
    r"""
      (?P<scheme>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{6,}          # what stands in an Authorization header
    | \bsk-ant-[A-Za-z0-9_-]{6,}                                       # keys of the model's
    | \bcarrel_[A-Za-z0-9_-]{20,}                                        # keys of ours
    | \bcak-[A-Za-z0-9_-]{16,}                                         # agents' tokens
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*        # JSON Web Tokens
    | (?P<userinfo>://[^/\s:@]*:)[^/\s@]+(?=@)                         # the password in an address
    | (?P<parameter>[?&](?:ticket|token|access_token|api_key|key|secret|password)=)[^&\s"']+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SECRET_NAMES = re.compile(
    r"^(authorization|cookie|set-cookie|x-api-key|password|passwd|secret|token|api_?key|ticket|[a-z_]*_(token|secret|password))$",
    re.IGNORECASE,
)
_SECRET_PARAMETERS = re.compile(r"token|ticket|key|secret|password|code|signature|auth|bearer|jwt", re.IGNORECASE)


class Redactor:
    """Hides secrets in log lines, and in whatever else is about to leave the process."""

    def __init__(self, known: Iterable[str | None] = ()) -> None:
        """Hide what looks like a secret, and these values wherever they stand. Short ones would hide half of a log."""
        values = sorted({value for value in known if value and len(value) >= _SHORTEST}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, values))) if values else None

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        return _PATTERNS.sub(_hide, text)

    def value(self, value: Any, depth: int = 0) -> Any:
        """The value without secrets, however deep they stand in it."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bytes):
            return self.text(value.decode(errors="replace"))
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= _DEEPEST:
            return HIDDEN
        if isinstance(value, Mapping):
            return {
                key: HIDDEN if _SECRET_NAMES.match(str(key)) else self.value(item, depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item, depth + 1) for item in value]
        return self.text(str(value))

    def __call__(self, logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """As a processor of structlog's; it stands right before the renderer."""
        redacted: MutableMapping[str, Any] = self.value(line)
        return redacted


def _hide(match: re.Match[str]) -> str:
    for name in ("scheme", "userinfo", "parameter"):
        if (kept := match.group(name)) is not None:
            return kept + HIDDEN
    return HIDDEN


def redacted_query(query: str) -> str:
    """A query string in which the values of whatever might be a secret are hidden."""
    pairs = parse_qsl(query, keep_blank_values=True)
    return "&".join(
        f"{quote(name)}={HIDDEN if _SECRET_PARAMETERS.search(name) else quote(value)}" for name, value in pairs
    )
