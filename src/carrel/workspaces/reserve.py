"""Room on the data folder's disk that is given back when agents have filled it, so that the server can still write."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_LARGEST_SHARE = 8


class Reserve:
    """A file that takes room while there is plenty, and is gone while there is none."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Keep `path` as the reserve: of so many bytes, or of an eighth of a small disk. Nothing is done before `start`."""
        self._path = path
        disk = os.statvfs(path.parent)
        self.size_bytes = min(most_bytes, disk.f_blocks * disk.f_frsize // _LARGEST_SHARE)

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Take the room, and look after it each second from now on."""
        exit_stack.callback(self._path.unlink, missing_ok=True)
        await asyncio.to_thread(self.look)
        task = asyncio.create_task(self._repeat(), name="reserve")
        exit_stack.callback(task.cancel)

    def look(self) -> None:
        """Give the room back where the disk is full; take it again where there is plenty. Blocks."""
        disk = os.statvfs(self._path.parent)
        free = disk.f_bavail * disk.f_frsize
        if self._path.exists():
            if free < self.size_bytes // 2:
                log.error("disk.full", folder=str(self._path.parent), why="the reserve is given back; free some room")
                self._path.unlink()
        elif free > 2 * self.size_bytes:
            self._take()

    def _take(self) -> None:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self.size_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            # Another was quicker to fill the disk: half a reserve would keep room from everyone and save nobody.
            log.warning("disk.no_reserve", error=repr(error))
            self._path.unlink(missing_ok=True)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.to_thread(self.look)
