"""Keeps every numbered frame until the gateway says it is stored: in memory to a bound, then on disk to another."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from carrel.errors import DiskFull, SpoolFull

_MOVE_BYTES = 1 << 20


class Outbox:
    """Frames by number, oldest first. Numbers count from 1 and have no gaps."""

    def __init__(self, spool_path: Path, *, memory_bytes: int, disk_bytes: int) -> None:
        """Make an empty outbox.

        Args:
            spool_path: where a file is made when memory is full; it has no name there while it is used.
            memory_bytes: how much is kept in memory.
            disk_bytes: how much more is kept on disk.
        """
        self._spool_path = spool_path
        self._memory_bound = memory_bytes
        self._disk_bound = disk_bytes
        self._memory: deque[tuple[int, bytes]] = deque()
        self._memory_size = 0
        self._spooled: deque[tuple[int, int, int]] = deque()
        # Positions in the spool count on; the file holds those from `_spool_start`.
        self._spool_start = 0
        self._spool_end = 0
        self._spool_fd: int | None = None
        self._kept: dict[int, bytes] = {}
        self._last = 0
        self.last_acked = 0

    def __len__(self) -> int:
        return len(self._memory) + len(self._spooled)

    @property
    def next_number(self) -> int:
        """The number the next frame will have."""
        return self._last + 1

    def put(self, frame: bytes, *, last_words: bool = False) -> None:
        """Keep a frame whose number is `next_number`. Last words are kept although there is no room.

        Raises:
            SpoolFull: there is no room left; the frame is not kept.
            DiskFull: there is none on the disk; the frame is not kept.
        """
        fits = not self._spooled and (self._memory_size + len(frame) <= self._memory_bound or not self._memory)
        if fits:
            self._memory.append((self._last + 1, frame))
            self._memory_size += len(frame)
        else:
            try:
                self._spool(frame, beyond=last_words)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not last_words:
                    raise DiskFull(operator_detail=repr(error)) from error
                self._kept[self._last + 1] = frame
                self._spooled.append((self._last + 1, self._spool_end, 0))
        self._last += 1

    def _spool(self, frame: bytes, *, beyond: bool) -> None:
        first = self._spooled[0][1] if self._spooled else self._spool_end
        if self._spool_end - first + len(frame) > self._disk_bound and not beyond:
            raise SpoolFull
        if self._spool_fd is None:
            self._spool_fd = _open_nameless(self._spool_path)
        if first - self._spool_start > self._disk_bound // 2:
            self._move_to_the_front(self._spool_fd, first)
        self._write(self._spool_fd, frame, self._spool_end - self._spool_start)
        self._spooled.append((self._last + 1, self._spool_end, len(frame)))
        self._spool_end += len(frame)

    def _move_to_the_front(self, fd: int, first: int) -> None:
        """Give the room of acknowledged frames back: without this a file that is never empty would fill up."""
        position = first - self._spool_start
        moved = 0
        while piece := os.pread(fd, _MOVE_BYTES, position + moved):
            self._write(fd, piece, moved)
            moved += len(piece)
        os.ftruncate(fd, moved)
        self._spool_start = first

    @staticmethod
    def _write(fd: int, data: bytes, position: int) -> None:
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], position + written)

    def ack(self, n: int) -> None:
        """Forget every frame up to number `n`."""
        self.last_acked = max(self.last_acked, n)
        while self._memory and self._memory[0][0] <= n:
            self._memory_size -= len(self._memory.popleft()[1])
        while self._spooled and self._spooled[0][0] <= n:
            self._kept.pop(self._spooled.popleft()[0], None)
        if self._spool_fd is not None and not self._spooled:
            self.close()

    def after(self, n: int) -> Iterator[tuple[int, bytes]]:
        """Every kept frame with a higher number than `n`, oldest first. The outbox may grow meanwhile."""
        yield from [item for item in self._memory if item[0] > n]
        for number, offset, size in list(self._spooled):
            # What was acknowledged meanwhile is gone from the file, which may hold other frames by now.
            if number <= max(n, self.last_acked):
                continue
            if number in self._kept:
                yield number, self._kept[number]
            elif self._spool_fd is not None:
                yield number, os.pread(self._spool_fd, size, offset - self._spool_start)

    def close(self) -> None:
        """Remove the file on disk, if there is one."""
        if self._spool_fd is not None:
            os.close(self._spool_fd)
        self._spool_fd = None
        self._spool_start = self._spool_end
        self._spooled.clear()


def _open_nameless(path: Path) -> int:
    """A file of no name: in a container it stands where the agent may write, and is to be read by nobody but us."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd
