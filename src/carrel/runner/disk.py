"""Whether the disk that a session's files are on has any room left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

_SIGNS = ("no space left on device", "enospc", "disk quota exceeded", "disk full")
_LEAST_BYTES = 1024 * 1024


class Disk:
    """The disks that an agent writes its files to."""

    def __init__(self, places: Sequence[str], *, reserve_bytes: int) -> None:
        """Look after the disks of these folders; one with less room than the reserve counts as full."""
        self._places = places
        self._least_bytes = max(reserve_bytes, _LEAST_BYTES)

    @staticmethod
    def blamed(said: object) -> bool:
        """Whether these words of a tool's or of the agent's tell of a full disk."""
        text = str(said).lower()
        return any(sign in text for sign in _SIGNS)

    @property
    def full(self) -> bool:
        """Whether there is no room on any of them, for data or for one more file."""
        for place in self._places:
            with contextlib.suppress(OSError):
                disk = os.statvfs(place)
                least = min(self._least_bytes, disk.f_blocks * disk.f_frsize // 8)
                if disk.f_bavail * disk.f_frsize < least or (disk.f_files > 0 and disk.f_favail == 0):
                    return True
        return False
