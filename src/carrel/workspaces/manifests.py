"""What a tree of files was at one moment: a line for each entry, enough to see later what has changed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import zstandard

from carrel.errors import ObjectDamaged

__all__ = ["Change", "Entry", "EntryType", "Manifest", "differences"]

EntryType = Literal["file", "directory", "symlink", "hardlink"]

_VERSION = 1
_MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a tree. What only a file has is empty for all else."""

    path: str
    """The tree's name, and the path in it, spelled as `paths.py` says."""
    type: EntryType
    mode: int
    mtime_ns: int
    size: int = 0
    inode: int = 0
    ctime_ns: int = 0
    """With the inode: as long as both are the same, so is the content. 0 where that cannot be relied on."""
    sha256: str = ""
    """Of a file's content; of a sparse one, of its blocks that are not zeros, each with its place before it."""
    at: int = 0
    """Where the content begins in the archive, unpacked."""
    extents: tuple[tuple[int, int], ...] | None = None
    """Of a sparse file: place and length of each piece that is in the archive; the rest is zeros."""
    target: str = ""
    """Where a symbolic link points; of a further name of a file, the path of the first one."""

    @property
    def sparse(self) -> bool:
        """Whether it is stored without its holes."""
        return self.extents is not None

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Place and length in the file of all that is in the archive."""
        if self.type != "file":
            return ()
        return ((0, self.size),) if self.extents is None else self.extents

    @property
    def stored(self) -> int:
        """How many bytes of it are in the archive."""
        return sum(length for _, length in self.pieces)

    def untouched_since(self, earlier: Entry) -> bool:
        """Whether the content is surely the same, without looking at it."""
        return (
            self.ctime_ns != 0
            and (self.inode, self.ctime_ns) == (earlier.inode, earlier.ctime_ns)
            and (self.size, self.mtime_ns) == (earlier.size, earlier.mtime_ns)
        )

    def as_seen(self, seen: Entry) -> Entry:
        """The same content, where it is seen to be now."""
        return replace(self, mode=seen.mode, mtime_ns=seen.mtime_ns, inode=seen.inode, ctime_ns=seen.ctime_ns)


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between an earlier and a later state of a tree."""

    path: str
    kind: Literal["added", "changed", "removed"]
    type: EntryType
    """What it is now; of what was removed, what it was."""
    size_before: int | None
    size_after: int | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole snapshot but for the files' content. Entries are sorted so that a folder comes before what is in it."""

    key: str
    """Of the snapshot: its objects are `<key>.tar.zst` and `<key>.manifest`."""
    created_at: datetime
    trees: Mapping[str, tuple[str, ...] | None]
    """The name of each tree, and the parts of it that were saved where it is not the whole."""
    entries: Mapping[str, Entry]
    frames: Sequence[int] = field(repr=False)
    """How many bytes each compressed frame has; each but the last holds `frame_bytes` of the archive."""
    frame_bytes: int
    left_out: int = 0
    """Entries that could not be read, and sockets, pipes and devices."""
    unsettled: Sequence[str] = ()
    """Files that were being written while they were read: they may hold something of before and after."""

    @property
    def size(self) -> int:
        """Bytes of content."""
        return sum(entry.stored for entry in self.entries.values())

    @property
    def stored(self) -> int:
        """Bytes of the archive as it is stored."""
        return sum(self.frames)

    def dump(self) -> bytes:
        """The form in which it is stored."""
        out = io.BytesIO()
        head = {
            "version": _VERSION,
            "key": self.key,
            "created_at": self.created_at.isoformat(),
            "trees": {name: parts if parts is None else list(parts) for name, parts in self.trees.items()},
            "frames": list(self.frames),
            "frame_bytes": self.frame_bytes,
            "left_out": self.left_out,
            "unsettled": list(self.unsettled),
        }
        with zstandard.ZstdCompressor(level=3).stream_writer(out, closefd=False) as writer:
            writer.write(json.dumps(head).encode() + b"\n")
            for each in self.entries.values():
                writer.write(json.dumps(_line(each), separators=(",", ":")).encode() + b"\n")
        return out.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Manifest:
        """Read what `dump` wrote. Raises ObjectDamaged where it is nothing of the kind."""
        try:
            lines = _lines(data)
            head = json.loads(next(lines))
            if head["version"] != _VERSION:
                raise ObjectDamaged(operator_detail="the manifest is of a newer release")
            entries = {entry.path: entry for entry in (_entry(json.loads(line)) for line in lines)}
            return cls(
                key=str(head["key"]),
                created_at=datetime.fromisoformat(head["created_at"]),
                trees={name: parts if parts is None else tuple(parts) for name, parts in head["trees"].items()},
                entries=entries,
                frames=tuple(map(int, head["frames"])),
                frame_bytes=int(head["frame_bytes"]),
                left_out=int(head["left_out"]),
                unsettled=tuple(head["unsettled"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, zstandard.ZstdError) as error:
            raise ObjectDamaged(operator_detail=f"no manifest: {type(error).__name__}") from error


def differences(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Iterator[Change]:
    """What is added, changed and removed, sorted by path. Times alone are no change; modes of files are.

    Both sides must have the SHA-256 of every file.
    """
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old is None and new is not None:
            yield Change(path, "added", new.type, None, new.size)
        elif new is None and old is not None:
            yield Change(path, "removed", old.type, old.size, None)
        elif old is not None and new is not None and _content(old) != _content(new):
            yield Change(path, "changed", new.type, old.size, new.size)


def _content(entry: Entry) -> tuple[Any, ...]:
    # Of a symbolic link the mode says nothing; that of a second name is told with the first.
    mode = entry.mode if entry.type in ("file", "directory") else 0
    return entry.type, mode, entry.size, entry.sha256, entry.target


def _line(entry: Entry) -> list[Any]:
    extents = None if entry.extents is None else [list(extent) for extent in entry.extents]
    return [
        entry.path,
        entry.type,
        entry.mode,
        entry.mtime_ns,
        entry.size,
        entry.inode,
        entry.ctime_ns,
        entry.sha256,
        entry.at,
        extents,
        entry.target,
    ]


def _entry(line: list[Any]) -> Entry:
    path, kind, mode, mtime_ns, size, inode, ctime_ns, sha256, at, extents, target = line
    if kind not in ("file", "directory", "symlink", "hardlink"):
        raise ValueError(kind)
    return Entry(
        path=str(path),
        type=kind,
        mode=int(mode),
        mtime_ns=int(mtime_ns),
        size=int(size),
        inode=int(inode),
        ctime_ns=int(ctime_ns),
        sha256=str(sha256),
        at=int(at),
        extents=None if extents is None else tuple((int(start), int(length)) for start, length in extents),
        target=str(target),
    )


def _lines(data: bytes) -> Iterator[bytes]:
    with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as reader:
        yield from _bounded(io.BufferedReader(reader))


def _bounded(lines: Iterable[bytes]) -> Iterator[bytes]:
    total = 0
    for line in lines:
        total += len(line)
        if total > _MOST_BYTES:
            raise ValueError("too long")
        yield line
