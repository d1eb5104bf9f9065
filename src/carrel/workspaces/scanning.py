"""Looking at a tree of files while an agent may be changing it: what is there, in an order that is always the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from carrel.errors import FileNotFound, PathConflict, SnapshotTooLarge
from carrel.workspaces.descriptors import AGENTS_DOING, Cursor, RefusedError, lstat, open_regular, scan, translated
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.manifests import Entry
from carrel.workspaces.paths import parse, spell

__all__ = [
    "ALWAYS_IGNORED",
    "BLOCK",
    "HOME_PARTS",
    "ContentHash",
    "Ignored",
    "Scan",
    "Tree",
    "Visit",
    "extents_of",
    "hashed",
    "look",
    "of_file",
    "sha256_of",
    "sha256_of_open",
    "walk",
]

ALWAYS_IGNORED = (".carrel-*.tmp",)
"""What we are just writing ourselves."""

HOME_PARTS = (
    ".claude/plans",
    ".claude/projects/-workspace/memory",
    ".claude/tasks",
    ".claude/todos",
    ".config/git",
    ".gitconfig",
)
"""What of an agent's home follows its session. The rest is made anew where an agent starts: the transcript (out of the
store), what the user has set up, caches, and credentials, of which none is ever saved."""

BLOCK = 4096
_COPY_BYTES = 1 << 20
_SPARSE_FROM = 1 << 20
_CLOCK_TICK_NS = 50_000_000
"""The kernel stamps changes by a clock that stands still for so long at most; two changes within may bear one time."""


@dataclass(frozen=True)
class Tree:
    """One folder of a snapshot."""

    name: str
    files: WorkspaceFiles
    parts: tuple[str, ...] | None = None
    """The paths in it that belong to the snapshot; None for all."""


class Ignored:
    """Patterns of what is neither saved nor touched: `*.pyc`, `node_modules` for a name at any depth, `build/cache` or
    `docs/*.html` for a path from the tree's root (a `*` ends at no `/`)."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        """Take the patterns; those of what is always ignored are added."""
        every = [pattern.strip().strip("/") for pattern in (*ALWAYS_IGNORED, *patterns)]
        self._names = _any_of(pattern for pattern in every if pattern and "/" not in pattern)
        self._paths = _any_of(pattern for pattern in every if "/" in pattern)

    def __call__(self, path: str) -> bool:
        """Whether this path in a tree is ignored, if the folder above it is not."""
        return bool(self._names.fullmatch(path.rpartition("/")[2]) or self._paths.fullmatch(path))


@dataclass(frozen=True, slots=True)
class Visit:
    """An entry come upon: what it was, and the descriptor of its folder, which is open as long as we are there."""

    path: str
    name: bytes
    found: os.stat_result
    directory: int


@dataclass
class Scan:
    """What a look at trees found."""

    entries: dict[str, Entry]
    left_out: int = 0


class _Walk:
    def __init__(self, ignored: Ignored, max_entries: int, must_exist: bool) -> None:
        self._must_exist = must_exist
        self.left_out = 0
        self.seen = 0
        self._ignored = ignored
        self._max_entries = max_entries

    def tree(self, tree: Tree) -> Iterator[Visit]:
        for path, names in ((part, parse(part)) for part in sorted(tree.parts)) if tree.parts else (("", ()),):
            try:
                with tree.files.opened(names[:-1], path) as directory, translated(path), Cursor(directory) as cursor:
                    yield from self._below(cursor, path.rpartition("/")[0], list(names[-1:]) or None)
            except FileNotFound:
                if self._must_exist and tree.parts is None:
                    raise

    def _below(self, cursor: Cursor, above: str, only: list[bytes] | None) -> Iterator[Visit]:
        prefixes = [above + "/" if above else ""]
        levels = [iter(only) if only else self._names(cursor.fd, prefixes[-1])]
        while levels:
            name = next(levels[-1], None)
            if name is None:
                levels.pop()
                prefixes.pop()
                if levels:
                    cursor.leave()
                continue
            path = prefixes[-1] + spell(name)
            try:
                found = lstat(name, cursor.fd)
            except OSError as error:
                self.leave_out(error)
                continue
            yield Visit(path, name, found, cursor.fd)
            if not stat.S_ISDIR(found.st_mode):
                continue
            try:
                cursor.enter(name)
            except OSError as error:
                self.leave_out(error)
                continue
            prefixes.append(path + "/")
            levels.append(self._names(cursor.fd, prefixes[-1]))

    def _names(self, directory: int, prefix: str) -> Iterator[bytes]:
        names = []
        try:
            for name, _ in scan(directory):
                if not self._ignored(prefix + spell(name)):
                    self.count()
                    names.append(name)
        except OSError as error:
            self.leave_out(error)
        return iter(sorted(names))

    def count(self) -> None:
        self.seen += 1
        if self.seen > self._max_entries:
            raise SnapshotTooLarge("entries", self._max_entries)

    def leave_out(self, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return  # gone meanwhile, so not there
        if error.errno not in AGENTS_DOING:
            raise error
        self.left_out += 1


def walk(
    trees: Sequence[Tree], ignored: Ignored, max_entries: int, result: Scan, *, must_exist: bool = True
) -> Iterator[tuple[Tree, Visit, Entry | None]]:
    """Every entry of the trees, folders before what is in them, sorted by the bytes of their names.

    With each comes what it is without its content, or None for what has no place in a snapshot (counted in the
    result, as is what cannot be read). The caller puts entries into the result.

    Raises:
        SnapshotTooLarge: there are more entries than that.
        FileNotFound: a tree is not there, and each must exist.
        PathConflict: folders are moved about faster than one can follow.
    """
    walking = _Walk(ignored, max_entries, must_exist)
    # Of what changed just now a second change may bear the same time.
    settled_before = time.time_ns() - _CLOCK_TICK_NS
    for tree in trees:
        first_names: dict[tuple[int, int], str] = {}
        for visit in walking.tree(tree):
            path = f"{tree.name}/{visit.path}"
            entry = _entry(path, visit, first_names, tree.files.linkable_uid(), settled_before)
            if entry is None:
                walking.left_out += 1
            yield tree, visit, entry
    result.left_out += walking.left_out


def look(trees: Sequence[Tree], ignored: Ignored, max_entries: int) -> Scan:
    """What is in the trees, without the content of files; one that is not there is empty. Raises as `walk` does."""
    result = Scan({})
    for _, _, entry in walk(trees, ignored, max_entries, result, must_exist=False):
        if entry is not None:
            result.entries[entry.path] = entry
    return result


def _entry(
    path: str, visit: Visit, first_names: dict[tuple[int, int], str], linkable_uid: int | None, settled_before: int
) -> Entry | None:
    found = visit.found
    mode, mtime_ns = stat.S_IMODE(found.st_mode) & 0o1777, found.st_mtime_ns
    if stat.S_ISDIR(found.st_mode):
        return Entry(path, "directory", mode, mtime_ns)
    if stat.S_ISLNK(found.st_mode):
        with contextlib.suppress(OSError):
            target = os.readlink(visit.name, dir_fd=visit.directory)
            return Entry(path, "symlink", 0o777, mtime_ns, target=spell(target))
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    if found.st_nlink > 1:
        if linkable_uid is not None and found.st_uid != linkable_uid:
            return None
        first = first_names.setdefault((found.st_dev, found.st_ino), path)
        if first != path:
            return Entry(path, "hardlink", mode, mtime_ns, target=first)
    return of_file(path, found, settled_before)


def of_file(path: str, found: os.stat_result, settled_before: int) -> Entry:
    """The entry of a regular file."""
    ctime_ns = found.st_ctime_ns if found.st_ctime_ns < settled_before else 0
    mode = stat.S_IMODE(found.st_mode) & 0o1777
    return Entry(path, "file", mode, found.st_mtime_ns, found.st_size, found.st_ino, ctime_ns)


def extents_of(fd: int, found: os.stat_result, most: int) -> tuple[tuple[int, int], ...] | None:
    """The pieces of a sparse file that hold something, or None where it is not worth it. Raises SnapshotTooLarge."""
    if found.st_size < _SPARSE_FROM or found.st_blocks * 512 >= found.st_size - _SPARSE_FROM // 16:
        return None
    extents: list[tuple[int, int]] = []
    position = 0
    while position < found.st_size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), found.st_size)
        except OSError:  # nothing but a hole up to the end
            break
        start = start // BLOCK * BLOCK
        if end > start:
            extents.append((start, end - start))
        if len(extents) > most:
            raise SnapshotTooLarge("pieces of sparse files", most)
        position = max(end, position + 1)
    return tuple(extents)


class ContentHash:
    """The SHA-256 of a file's content as an entry has it; the same for a sparse file wherever its holes are."""

    def __init__(self, sparse: bool) -> None:
        self._sparse = sparse
        self._hash = hashlib.sha256()

    def add(self, at: int, data: bytes) -> None:
        """A piece of the content; of a sparse file one that begins at the beginning of a block."""
        if not self._sparse:
            self._hash.update(data)
            return
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if block.strip(b"\0"):
                self._hash.update((at + start).to_bytes(8, "big") + block.ljust(BLOCK, b"\0"))

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._hash.hexdigest()


def sha256_of(tree: Tree, entry: Entry, like: Entry, most_extents: int) -> str:
    """The hash of a file as it is now, made as that of `like` was; empty where it cannot be read."""
    path = entry.path.removeprefix(tree.name + "/")
    names = parse(path)
    try:
        with tree.files.opened(names[:-1], path) as directory, translated(path):
            fd = open_regular(directory, names[-1], tree.files.linkable_uid())
    except (FileNotFound, PathConflict, RefusedError):
        return ""
    try:
        now = entry
        if like.sparse:
            found = os.fstat(fd)
            extents = extents_of(fd, found, most_extents)
            now = replace(entry, extents=((0, found.st_size),) if extents is None else extents)
        return sha256_of_open(fd, now)
    finally:
        os.close(fd)


def sha256_of_open(fd: int, entry: Entry) -> str:
    """The hash of the pieces of an open file that the entry names."""
    content = ContentHash(entry.sparse)
    for start, length in entry.pieces:
        for at in range(start, start + length, _COPY_BYTES):
            content.add(at, os.pread(fd, min(_COPY_BYTES, start + length - at), at))
    return content.hexdigest()


def hashed(trees: Mapping[str, Tree], seen: Scan, earlier: Mapping[str, Entry], most_extents: int) -> Scan:
    """The same with the hash of every file that `earlier` has too, of those it lacks with none; looked at is only what
    may have changed. A file that is as it was keeps what is known of it."""
    entries = {}
    for path, entry in seen.entries.items():
        was = earlier.get(path)
        if entry.type != "file" or was is None or was.type != "file" or entry.size != was.size:
            entries[path] = entry
            continue
        if entry.untouched_since(was) or sha256_of(_tree(trees, path), entry, was, most_extents) == was.sha256:
            entries[path] = was.as_seen(entry)
        else:
            entries[path] = replace(entry, sha256="changed")
    return Scan(entries, seen.left_out)


def _tree(trees: Mapping[str, Tree], path: str) -> Tree:
    return trees[path.partition("/")[0]]


def _any_of(patterns: Iterator[str]) -> re.Pattern[str]:
    expressions = [_expression(pattern) for pattern in patterns]
    return re.compile("|".join(expressions) if expressions else r"(?!)", re.DOTALL)


def _expression(pattern: str) -> str:
    wild = {"*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(char) or re.escape(char) for char in pattern)
