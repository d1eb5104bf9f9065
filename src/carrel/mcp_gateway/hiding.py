"""Takes secrets out of what comes back: a server that repeats what it was sent must not tell an agent its credential."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

__all__ = ["HIDDEN", "Hider"]

HIDDEN: Final = b"[hidden by Carrel]"
_SHORTEST = 8
"""What is shorter stands in too many texts by chance."""


class Hider:
    """Takes secrets out of bytes that come piece by piece, wherever the pieces end."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """Hide these, also as they are written in JSON."""
        forms = {form for secret in secrets if len(secret) >= _SHORTEST for form in (secret, *_in_json(secret))}
        self._secrets = sorted((form.encode() for form in forms), key=len, reverse=True)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on by now; the beginning of what may become a secret is held back."""
        data = self._held + data
        data = self._without(data)
        held = max((_overlap(data, secret) for secret in self._secrets), default=0)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]

    def rest(self) -> bytes:
        """What was still held back, at the end."""
        held, self._held = self._held, b""
        return held

    def whole(self, text: str) -> str:
        """A text that is not part of the stream, such as a header."""
        return self._without(text.encode()).decode(errors="replace")

    def _without(self, data: bytes) -> bytes:
        for secret in self._secrets:
            data = data.replace(secret, HIDDEN)
        return data


def _in_json(secret: str) -> tuple[str, str]:
    return json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]


def _overlap(data: bytes, secret: bytes) -> int:
    """How much of the end of `data` is the beginning of the secret."""
    return next((n for n in range(min(len(secret) - 1, len(data)), 0, -1) if data.endswith(secret[:n])), 0)
