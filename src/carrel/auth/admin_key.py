"""The key made on the first start."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

_PREFIX = "carrel_admin_"


class AdminKey:
    """The admin's key, kept in a file that only its owner can read."""

    def __init__(self, key: str, *, new: bool) -> None:
        self.key = key
        self.new = new

    @classmethod
    def load(cls, path: Path) -> AdminKey:
        """Read the key from its file; the first time, make both."""
        try:
            return cls(path.read_text().strip(), new=False)
        except FileNotFoundError:
            pass
        key = _PREFIX + secrets.token_urlsafe(32)
        # Written whole under another name first: a half-written key would lock the operator out.
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, path)
        return cls(key, new=True)

    def fits(self, given: str) -> bool:
        """Whether this is the key."""
        return hmac.compare_digest(given.encode(), self.key.encode())
