"""Brings trees of files to what they were when a snapshot was made, by as little writing as that takes.

Everything here blocks, and runs in a thread. No agent should be at work in the trees; where one is, it cannot lead
anything out of them, and what it does may be overwritten or remain.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from carrel.errors import FileNotFound, NotAFile, ObjectDamaged, PathConflict
from carrel.workspaces.descriptors import (
    CREATE,
    hand_over,
    lstat,
    open_regular,
    remove_tree,
    translated,
)
from carrel.workspaces.manifests import Entry
from carrel.workspaces.paths import parse, unspell
from carrel.workspaces.scanning import BLOCK, ContentHash, Scan, Tree

__all__ = ["Plan", "Restoring"]


@dataclass
class Plan:
    """What has to be done."""

    remove: list[str] = field(default_factory=list)
    """What is not in the snapshot, deepest first."""
    clear: list[str] = field(default_factory=list)
    """What stands where something of another kind belongs; a folder with all that is in it."""
    write: list[Entry] = field(default_factory=list)
    """Files, in the order of the archive."""
    link: list[Entry] = field(default_factory=list)
    make: list[Entry] = field(default_factory=list)
    """Folders, upper ones first."""
    touch: list[Entry] = field(default_factory=list)
    """Files whose mode or time alone is another."""
    settle: list[Entry] = field(default_factory=list)
    """Every folder, deepest first."""
    folders_differ: bool = False
    """Whether one of them has another mode or time."""

    @classmethod
    def of(cls, wanted: Mapping[str, Entry], seen: Scan) -> Plan:
        """What turns what was seen (with its hashes) into what is wanted."""
        plan = cls()
        gone: list[str] = []
        for path, entry in seen.entries.items():
            want = wanted.get(path)
            if want is None:
                plan.remove.append(path)
            elif (want.type == "directory") != (entry.type == "directory"):
                gone.append(path)
        plan.clear = gone
        plan.remove = [path for path in reversed(plan.remove) if not any(path.startswith(up + "/") for up in gone)]
        for path, want in wanted.items():
            was = seen.entries.get(path)
            if want.type == "directory":
                plan.settle.insert(0, want)
                if was is None or was.type != "directory":
                    plan.make.append(want)
                elif (was.mode, was.mtime_ns) != (want.mode, want.mtime_ns):
                    plan.folders_differ = True
            elif want.type == "file":
                if was is None or was.type != "file" or (was.size, was.sha256) != (want.size, want.sha256):
                    plan.write.append(want)
                elif (was.mode, was.mtime_ns) != (want.mode, want.mtime_ns):
                    plan.touch.append(want)
            elif (
                was is None
                or (was.type, was.target) != (want.type, want.target)
                or (want.type == "symlink" and was.mtime_ns != want.mtime_ns)
            ):
                plan.link.append(want)
        # A first name that is written anew is another file than its further names then are.
        fresh = {entry.path for entry in plan.write}
        plan.link += [
            want
            for path, want in wanted.items()
            if want.type == "hardlink" and want.target in fresh and want not in plan.link
        ]
        plan.write.sort(key=lambda entry: entry.at)
        return plan

    @property
    def empty(self) -> bool:
        """Whether all is as it should be."""
        return not (
            self.remove or self.clear or self.write or self.link or self.make or self.touch or self.folders_differ
        )


class Restoring:
    """A plan being carried out: `prepare`, `feed` with the pieces of the archive in their order, `finish`."""

    def __init__(self, trees: Sequence[Tree], plan: Plan) -> None:
        self._trees = {tree.name: tree for tree in trees}
        self._plan = plan
        self._starts = [entry.at for entry in plan.write]
        self._file: _File | None = None
        self._next = 0
        self._folder: tuple[str, int] | None = None
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Leave nothing open, and no file half written."""
        if self._file is not None:
            self._file.discard()
            self._file = None
        self._leave()

    def prepare(self) -> None:
        """Remove what is not wanted, and make the folders."""
        for tree in self._trees.values():
            with tree.files.opened((), "", create=True):
                pass
        for path in self._plan.clear:
            self._remove(path, whole=True)
        for path in self._plan.remove:
            self._remove(path, whole=False)
        for entry in self._plan.make:
            tree, names, path = self._split(entry.path)
            with tree.files.opened(names, path, create=True):
                pass
        for entry in self._plan.settle:  # their own bits may forbid us to write in them
            self._make_writable(entry)
        for entry in self._plan.write:
            if not entry.stored:
                self._begin(entry).end()

    def feed(self, offset: int, data: bytes) -> None:
        """A piece of the archive: all that is wanted of it is written. Raises ObjectDamaged."""
        end = offset + len(data)
        view = memoryview(data)
        while self._next < len(self._plan.write):
            entry = self._plan.write[self._next]
            if not entry.stored:
                self._next += 1
                continue
            if entry.at >= end:
                return
            if self._file is None:
                if entry.at < offset:
                    raise ObjectDamaged(operator_detail="the manifest does not fit the archive")
                self._file = self._begin(entry)
            start = max(entry.at, offset)
            stop = min(entry.at + entry.stored, end)
            self._file.add(start - entry.at, view[start - offset : stop - offset])
            if entry.at + entry.stored > end:
                return
            self._file.end()
            self._file = None
            self._next += 1

    def finish(self) -> None:
        """Make the links, and give everything its mode and time. Raises ObjectDamaged where content is missing."""
        if any(entry.stored for entry in self._plan.write[self._next :]):
            raise ObjectDamaged(operator_detail="the archive ends before the last file")
        self._leave()
        for entry in self._plan.touch:
            with contextlib.suppress(FileNotFound, NotAFile, PathConflict):  # an agent is at work: what it does remains
                self._touch(entry)
        for entry in self._plan.link:
            if entry.type == "symlink":
                self._symlink(entry)
            else:
                self._hardlink(entry)
        for entry in self._plan.settle:
            with contextlib.suppress(FileNotFound, PathConflict):
                tree, names, path = self._split(entry.path)
                with tree.files.opened(names, path) as directory, translated(path):
                    _settle(directory, entry, tree)

    def _split(self, path: str) -> tuple[Tree, tuple[bytes, ...], str]:
        name, _, rest = path.partition("/")
        return self._trees[name], parse(rest), rest

    @contextlib.contextmanager
    def _parent(self, path: str) -> Iterator[tuple[Tree, int, bytes]]:
        tree, names, rest = self._split(path)
        with tree.files.opened(names[:-1], rest, create=True) as directory, translated(rest):
            yield tree, directory, names[-1]

    def _remove(self, path: str, *, whole: bool) -> None:
        with contextlib.suppress(FileNotFound), self._parent(path) as (_, directory, name):
            if not stat.S_ISDIR(lstat(name, directory).st_mode):
                os.unlink(name, dir_fd=directory)
            elif whole:
                remove_tree(directory, name)
            else:
                try:
                    os.rmdir(name, dir_fd=directory)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # what is ignored stays, and its folder
                        raise

    def _make_writable(self, entry: Entry) -> None:
        tree, names, path = self._split(entry.path)
        with contextlib.suppress(FileNotFound), tree.files.opened(names, path) as directory:
            found = os.fstat(directory)
            if found.st_uid == os.geteuid() and found.st_mode & 0o700 != 0o700:
                os.fchmod(directory, 0o700)

    def _begin(self, entry: Entry) -> _File:
        # Files of one folder follow each other in the archive.
        above = entry.path.rpartition("/")[0]
        if self._folder is None or self._folder[0] != above:
            self._leave()
            _, directory, _ = self._stack.enter_context(self._parent(entry.path))
            self._folder = (above, directory)
        tree, names, _ = self._split(entry.path)
        return _File(self._folder[1], names[-1], entry, tree)

    def _leave(self) -> None:
        self._folder = None
        self._stack.pop_all().close()

    def _symlink(self, entry: Entry) -> None:
        with self._parent(entry.path) as (tree, directory, name):
            temporary = _temporary()
            os.symlink(unspell(entry.target), temporary, dir_fd=directory)
            try:
                if tree.files.owner and os.geteuid() == 0:
                    os.chown(temporary, *tree.files.owner, dir_fd=directory, follow_symlinks=False)
                os.utime(temporary, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=directory, follow_symlinks=False)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                _unlink(temporary, directory)
                raise

    def _hardlink(self, entry: Entry) -> None:
        with (
            self._parent(entry.path) as (_, directory, name),
            self._parent(entry.target) as (_, from_directory, from_name),
        ):
            if not stat.S_ISREG(lstat(from_name, from_directory).st_mode):
                raise PathConflict(entry.path, "it changed while it was being used")
            temporary = _temporary()
            os.link(from_name, temporary, src_dir_fd=from_directory, dst_dir_fd=directory, follow_symlinks=False)
            try:
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            finally:
                _unlink(temporary, directory)  # a rename of one name of a file to another does nothing

    def _touch(self, entry: Entry) -> None:
        with self._parent(entry.path) as (tree, directory, name):
            if tree.files.owner is None or os.geteuid() != 0:
                # One of our own that its mode keeps us from opening.
                _make_readable(name, directory)
            fd = open_regular(directory, name, tree.files.linkable_uid())
            try:
                _settle(fd, entry, tree)
            finally:
                os.close(fd)


class _File:
    """One file being written under a name of ours, until it is whole."""

    def __init__(self, directory: int, name: bytes, entry: Entry, tree: Tree) -> None:
        self._directory = directory
        self._name = name
        self._entry = entry
        self._tree = tree
        self._temporary = _temporary()
        with translated(entry.path):
            self._fd = os.open(self._temporary, CREATE, 0o600, dir_fd=directory)
        self._hash = ContentHash(entry.sparse)
        self._carry = b""
        self._ends = {start + length for start, length in entry.pieces}
        # Where each piece begins among those that are stored.
        self._pieces = entry.pieces
        self._begins = [0]
        for _, length in self._pieces:
            self._begins.append(self._begins[-1] + length)

    def add(self, at: int, data: memoryview) -> None:
        """What is stored from byte `at` on of what is stored of this file."""
        while data:
            index = bisect_right(self._begins, at) - 1
            start, length = self._pieces[index]
            inside = at - self._begins[index]
            count = min(len(data), length - inside)
            piece = bytes(data[:count])
            self._put(start + inside, piece)
            at += count
            data = data[count:]

    def _put(self, at: int, data: bytes) -> None:
        if self._entry.sparse:
            self._hash_blocks(at, data)
        else:
            self._hash.add(at, data)
        while data:
            written = os.pwrite(self._fd, data, at)
            at, data = at + written, data[written:]

    def _hash_blocks(self, at: int, data: bytes) -> None:
        # Frames end where they like, and a sparse file is hashed by blocks.
        at, data = at - len(self._carry), self._carry + data
        whole = len(data) if at + len(data) in self._ends else len(data) // BLOCK * BLOCK
        self._hash.add(at, data[:whole])
        self._carry = data[whole:]

    def end(self) -> None:
        """It is whole: give it its place. Raises ObjectDamaged where it is not what was saved."""
        if self._hash.hexdigest() != self._entry.sha256:
            self.discard()
            raise ObjectDamaged(operator_detail="a file of the snapshot is not what was saved")
        try:
            with translated(self._entry.path):
                os.ftruncate(self._fd, self._entry.size)
                _settle(self._fd, self._entry, self._tree)
                os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            self.discard()
            raise
        os.close(self._fd)

    def discard(self) -> None:
        """Leave nothing of it."""
        _unlink(self._temporary, self._directory)
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _settle(fd: int, entry: Entry, tree: Tree) -> None:
    owner = tree.files.owner
    if owner and os.geteuid() == 0:
        hand_over(fd, entry.mode, owner)
    else:
        os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _make_readable(name: bytes, directory: int) -> None:
    with contextlib.suppress(OSError, NotImplementedError):
        if lstat(name, directory).st_mode & 0o400 == 0:
            os.chmod(name, 0o600, dir_fd=directory, follow_symlinks=False)


def _temporary() -> bytes:
    return b".carrel-%s.tmp" % secrets.token_hex(8).encode()


def _unlink(name: bytes, directory: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)
