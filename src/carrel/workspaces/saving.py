"""Makes the archive of a snapshot: a tar of the trees, compressed in frames that can each be read alone.

The same trees give the same bytes. Everything here blocks, and runs in a thread.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace

import zstandard

from carrel.errors import SnapshotTooLarge
from carrel.workspaces.descriptors import AGENTS_DOING, RefusedError, open_regular
from carrel.workspaces.manifests import Entry
from carrel.workspaces.paths import unspell
from carrel.workspaces.scanning import (
    ContentHash,
    Ignored,
    Scan,
    Tree,
    Visit,
    extents_of,
    of_file,
    sha256_of_open,
    walk,
)

__all__ = ["FRAME_BYTES", "Saving"]

FRAME_BYTES = 4 * 2**20
_LEVEL = 3
_COPY_BYTES = 1 << 20
_WHOLE_UP_TO = 1 << 20
_ATTEMPTS = 3
_TYPES = {
    "directory": tarfile.DIRTYPE,
    "file": tarfile.REGTYPE,
    "hardlink": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
}


class Saving:
    """One archive being made. `frames` gives it; the other attributes are complete when that has ended."""

    def __init__(
        self,
        trees: Sequence[Tree],
        ignored: Ignored,
        *,
        max_entries: int,
        max_bytes: int,
        with_names: bool = True,
    ) -> None:
        """Prepare to save.

        Args:
            trees: what is saved.
            ignored: what of it is not.
            max_entries: how many there may be.
            max_bytes: how much content; the holes of sparse files do not count.
            with_names: whether the name of its tree stands before each path in the archive.
        """
        self._with_names = with_names
        self._trees = trees
        self._ignored = ignored
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._content_bytes = 0
        self._extents = 0
        self._offset = 0
        self.result = Scan({})
        self.frames: list[int] = []
        self.unsettled: list[str] = []

    def archive(self) -> Generator[bytes, None, None]:
        """The compressed frames.

        Raises:
            SnapshotTooLarge: there is more than may be saved.
            PathConflict: folders are moved about faster than one can follow.
        """
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        pending = bytearray()
        for piece in self.tar():
            pending += piece
            while len(pending) >= FRAME_BYTES:
                yield self._frame(compressor, bytes(pending[:FRAME_BYTES]))
                del pending[:FRAME_BYTES]
        yield self._frame(compressor, bytes(pending))

    def _frame(self, compressor: zstandard.ZstdCompressor, data: bytes) -> bytes:
        frame = compressor.compress(data)
        self.frames.append(len(frame))
        return frame

    def tar(self) -> Iterator[bytes]:
        """The same, uncompressed. Raises as `archive` does."""
        for piece in self._members():
            self._offset += len(piece)
            yield piece
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _members(self) -> Iterator[bytes]:
        for tree, visit, entry in walk(self._trees, self._ignored, self._max_entries, self.result):
            if entry is None:
                continue
            if entry.type == "file":
                yield from self._file(tree, visit, entry)
                continue
            if entry.type == "hardlink" and entry.target not in self.result.entries:
                continue  # the first name went away while it was read
            self.result.entries[entry.path] = entry
            yield self._header(entry, 0)

    def _file(self, tree: Tree, visit: Visit, entry: Entry) -> Iterator[bytes]:
        settled_before = time.time_ns() - 50_000_000
        try:
            fd = open_regular(visit.directory, visit.name, tree.files.linkable_uid())
        except (OSError, RefusedError) as error:
            if isinstance(error, OSError) and error.errno not in AGENTS_DOING:
                raise
            self.result.left_out += not isinstance(error, FileNotFoundError)
            return
        with contextlib.closing(_Descriptor(fd)):
            found = os.fstat(fd)
            entry = of_file(entry.path, found, settled_before)
            extents = extents_of(fd, found, self._max_entries)
            if extents is not None:
                self._extents += len(extents)
                if self._extents > self._max_entries:
                    raise SnapshotTooLarge("pieces of sparse files", self._max_entries)
                yield from self._large(replace(entry, extents=extents), fd, found)
            elif found.st_size > _WHOLE_UP_TO:
                yield from self._large(entry, fd, found)
            else:
                yield from self._small(entry, fd, found, settled_before)

    def _small(self, entry: Entry, fd: int, found: os.stat_result, settled_before: int) -> Iterator[bytes]:
        for _ in range(_ATTEMPTS):
            data = _read(fd, 0, found.st_size)
            after = os.fstat(fd)
            # The clock of files stands still for a moment, so of what has just changed one look is not enough.
            settled = (
                _unchanged(found, after)
                and len(data) == found.st_size
                and (entry.ctime_ns != 0 or _read(fd, 0, found.st_size) == data)
            )
            if settled or after.st_size > _WHOLE_UP_TO:
                break
            found = after
            entry = of_file(entry.path, found, settled_before)
        content = ContentHash(sparse=False)
        data = data.ljust(found.st_size, b"\0")
        content.add(0, data)
        yield from self._member(entry, [data], content, lambda: settled)

    def _large(self, entry: Entry, fd: int, found: os.stat_result) -> Iterator[bytes]:
        content = ContentHash(entry.sparse)

        def pieces() -> Iterator[bytes]:
            for start, length in entry.pieces:
                for at in range(start, start + length, _COPY_BYTES):
                    count = min(_COPY_BYTES, start + length - at)
                    data = _read(fd, at, count).ljust(count, b"\0")
                    content.add(at, data)
                    yield data

        def settled() -> bool:
            if entry.ctime_ns == 0 and sha256_of_open(fd, entry) != content.hexdigest():
                return False
            return _unchanged(found, os.fstat(fd))

        yield from self._member(entry, pieces(), content, settled)

    def _member(
        self, entry: Entry, pieces: Iterable[bytes], content: ContentHash, settled: Callable[[], bool]
    ) -> Iterator[bytes]:
        self._content_bytes += entry.stored
        if self._content_bytes > self._max_bytes:
            raise SnapshotTooLarge("bytes", self._max_bytes)
        before = _sparse_map(entry)
        head = self._header(entry, len(before) + entry.stored) + before
        at = self._offset + len(head)
        yield head
        yield from pieces
        if rest := entry.stored % tarfile.BLOCKSIZE:
            yield bytes(tarfile.BLOCKSIZE - rest)
        if not settled():
            self.unsettled.append(entry.path)
            entry = replace(entry, ctime_ns=0)
        self.result.entries[entry.path] = replace(entry, at=at, sha256=content.hexdigest())

    def _header(self, entry: Entry, size: int) -> bytes:
        info = tarfile.TarInfo(self._named(entry.path))
        info.type = _TYPES[entry.type]
        info.mode = entry.mode
        info.size = size
        seconds, nanoseconds = divmod(abs(entry.mtime_ns), 10**9)
        info.mtime = max(0, entry.mtime_ns // 10**9)
        info.pax_headers = {"mtime": f"{'-' if entry.mtime_ns < 0 else ''}{seconds}.{nanoseconds:09d}"}
        if entry.target:
            info.linkname = self._named(entry.target) if entry.type == "hardlink" else _raw(entry.target)
        if entry.sparse:
            info.pax_headers |= {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": info.name,
                "GNU.sparse.realsize": str(entry.size),
            }
            info.name = "GNUSparseFile.0/" + info.name
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")

    def _named(self, path: str) -> str:
        return _raw(path if self._with_names else path.partition("/")[2])


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


def _read(fd: int, at: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.pread(fd, count - len(data), at + len(data))
        if not piece:
            break
        data = data + piece if data else piece
    return data


def _unchanged(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )


def _sparse_map(entry: Entry) -> bytes:
    """What stands before the content of a sparse file in version 1.0 of GNU's form."""
    if entry.extents is None:
        return b""
    # GNU tar wants a last, empty piece where the file ends in a hole.
    extents = [*entry.extents]
    if not extents or sum(extents[-1]) < entry.size:
        extents.append((entry.size, 0))
    text = "\n".join(str(number) for number in [len(extents), *(n for extent in extents for n in extent)]) + "\n"
    return text.encode().ljust(-(-len(text) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, b"\0")


def _raw(spelled: str) -> str:
    """A path or a link's target as `tarfile` takes it: bytes that are no UTF-8 as lone surrogates."""
    return os.fsdecode(unspell(spelled))
