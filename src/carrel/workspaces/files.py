"""Safe access to the files of one workspace.

The gateway may be root, and the agent that writes in the workspace is not trusted and does not stand still. So
every path is walked one component at a time from the workspace's root, each directory opened relative to the one
before with `O_NOFOLLOW`: a symbolic link is shown, copied and removed as a link, and never followed. Nothing is
checked by name and then used by name where the difference could lead out; what counts is what was opened.

The workspace's root, and every folder above it, must be out of the agent's reach (inside its sandbox the root is a
mount, which cannot be renamed).

How paths are spelled stands in `paths.py`; how one moves about in such a folder in `descriptors.py`.
"""

import contextlib
import errno
import heapq
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from carrel import errors
from carrel.workspaces.descriptors import (
    AGENTS_DOING,
    CREATE,
    DIRECTORY,
    NOT_A_DIRECTORY,
    Cursor,
    Owner,
    RefusedError,
    hand_over,
    is_link,
    left_to_the_agent,
    lstat,
    open_regular,
    remove_tree,
    scan,
    translated,
)
from carrel.workspaces.paths import MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_PATH_DEPTH, length, parse, parse_new, spell

__all__ = ["FileEntry", "FileType", "WorkspaceFiles"]

FileType = Literal["file", "directory", "symlink", "other"]

_COPY_BYTES = 1 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What is known of one entry of a workspace; `size` is that of a file's content and 0 for everything else."""

    path: str
    type: FileType
    size: int
    modified_at: datetime
    mode: int


class WorkspaceFiles:
    """The files under one root directory. Holds nothing open between calls, and may be used by several threads.

    `owner` is the user and group that new files and directories are given where this process is root; elsewhere it
    is ignored. Every path is spelled as the module's docstring says. Every method raises `InvalidPath` for a path
    that cannot be one, `FileNotFound` for one that leads nowhere, and `PathConflict` where a symbolic link is on the
    way, permission is missing, or the agent changes things faster than they can be used. An `OSError` that is about
    the disk (full, over quota, broken) is passed on as it is.

    Where the root itself, or a folder above it, is within an agent's reach, `within` names the last folder that is
    not: from there on the way to the root is walked as every other path is.
    """

    def __init__(self, root: Path, *, owner: Owner | None = None, within: Path | None = None) -> None:
        self._within = within or root
        self._way = tuple(os.fsencode(part) for part in root.relative_to(self._within).parts)
        self._owner = owner

    def tree(self, path: str = "", *, limit: int, after: str | None = None, recursive: bool = True) -> list[FileEntry]:
        """Lists what is under the directory `path` (itself excluded), sorted by path as strings compare.

        At most `limit` entries are given, beginning behind the path `after`, which need no longer exist. Symbolic
        links are listed and not followed. Left out are the contents of directories that cannot be read, and what
        lies too deep for a path to name. What the agent changes meanwhile may or may not show; the temporary file
        (`.carrel-*.tmp`) of a `write` under way does.

        Raises `PathConflict` where `path` is not a directory.
        """
        names = parse(path)
        entries: list[FileEntry] = []
        if limit <= 0:
            return entries
        with self.opened(names, path) as directory, translated(path), Cursor(directory) as cursor:
            levels = [_Level("".join(spell(name) + "/" for name in names), len(names))]
            levels[-1].read(cursor.fd, after, limit, recursive)
            while levels and len(entries) < limit:
                level = levels[-1]
                step = next(level.steps, None)
                if step is None:
                    levels.pop()
                    if levels:
                        cursor.leave()
                    continue
                with left_to_the_agent():
                    if not step.descend:
                        entries.append(_entry(level.prefix + step.key, lstat(step.name, cursor.fd)))
                        continue
                    cursor.enter(step.name)
                    levels.append(_Level(level.prefix + step.key, level.depth + 1))
                    levels[-1].read(cursor.fd, after, limit - len(entries), recursive)
        return entries

    def stat(self, path: str) -> FileEntry:
        """Tells what `path` is, a symbolic link being itself; the empty path is the workspace's root."""
        names = parse(path)
        with self.opened(names[:-1], path) as directory, translated(path):
            return _entry(path, lstat(names[-1], directory) if names else os.fstat(directory))

    def open_read(self, path: str) -> BinaryIO:
        """Opens a regular file for reading; the caller closes it.

        Its size is `os.fstat(file.fileno()).st_size`. The agent may still shorten or lengthen the file, so a reader
        who promised that many bytes stops there and copes with fewer.

        Raises `NotAFile` for anything but a regular file, which includes a symbolic link; and, where this process is
        root, for a hard link to a file that is not the owner's, since its other name may be outside of the workspace.
        """
        names = parse(path)
        if not names:
            raise errors.NotAFile(path)
        with self.opened(names[:-1], path) as directory, translated(path):
            return os.fdopen(open_regular(directory, names[-1], self.linkable_uid()), "rb")

    def make(self) -> None:
        """Makes the root, with what is missing above it, and gives all that is in it to the owner if it is not theirs.

        Call it while no agent of the owner's is at work for the first time.
        """
        with self.opened((), "", create=True) as directory, translated(""):
            if self._owner is None or os.geteuid() != 0 or os.fstat(directory).st_uid == self._owner[0]:
                return
            for _, directories, files, fd in os.fwalk(".", dir_fd=directory, follow_symlinks=False):
                for name in (".", *directories, *files):
                    os.chown(name, *self._owner, dir_fd=fd, follow_symlinks=False)

    def write(
        self, path: str, chunks: Iterable[bytes], *, max_bytes: int | None = None, mode: int = 0o644
    ) -> FileEntry:
        """Writes a file whole: readers see the old content or the new, never a part, whatever happens on the way.

        Missing parents are made, and stay if the write fails. A regular file is replaced and its permission bits
        are kept; a new one has `mode`. What `chunks` raises is passed on and leaves the old content. The new content
        is not forced to the disk, so a power cut may lose it.

        Raises `InvalidPath` for a name with control characters or bytes that are not UTF-8, `PathConflict` where
        something other than a regular file has the name, `FileTooLarge` where `chunks` is over `max_bytes`.
        """
        names = parse_new(path)
        with self.opened(names[:-1], path, create=True) as directory:
            with translated(path):
                mode = _mode_of_replaced(directory, names[-1], path, mode)
                temporary = b".carrel-%s.tmp" % secrets.token_hex(8).encode()
                # Ours alone until it is complete: the agent may remove it, but not change what is being written.
                out = os.fdopen(os.open(temporary, CREATE, 0o600, dir_fd=directory), "wb")
            try:
                with out:
                    _pump(chunks, out, max_bytes)
                    with translated(path):
                        hand_over(out.fileno(), mode, self._owner)
                        os.rename(temporary, names[-1], src_dir_fd=directory, dst_dir_fd=directory)
                        return _entry(path, os.fstat(out.fileno()))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise

    def size(self) -> int:
        """How many bytes the files take: what they hold, less the holes in them."""
        total = 0
        with self.opened((), "") as root:
            for _, _, files, fd in os.fwalk(".", dir_fd=root, follow_symlinks=False):
                for name in files:
                    with left_to_the_agent():
                        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                        total += min(found.st_size, found.st_blocks * 512)
        return total

    def delete(self, path: str) -> None:
        """Removes a file, a symbolic link (never what it points to), or a directory with all that is in it.

        Raises `InvalidPath` for the workspace's root, and `PathConflict` where a directory could not be emptied.
        It may then be half empty; the call can be repeated.
        """
        names = parse(path)
        if not names:
            raise errors.InvalidPath(path, "the workspace itself cannot be deleted as a file")
        with self.opened(names[:-1], path) as directory, translated(path):
            if stat.S_ISDIR(lstat(names[-1], directory).st_mode):
                remove_tree(directory, names[-1])
            else:
                os.unlink(names[-1], dir_fd=directory)

    def copy_to(self, target: Path, *, owner: Owner | None = None, max_bytes: int | None = None) -> int:
        """Copies the whole workspace to `target`, which must not exist and whose parent only we can write to.

        Symbolic links are copied as they stand. Permission bits and times are kept, set-user-id and set-group-id
        are dropped, holes stay holes, and names that are hard links of each other become files of their own.
        Everything is given to `owner` (by default, that of this workspace). Sockets, FIFOs, devices, what cannot be
        read and what `open_read` refuses is left out; a directory being changed is copied as it was come upon.

        Returns how many entries were left out. Raises `PathConflict` where `target` exists, `FileTooLarge` where
        there is more to copy than `max_bytes` of content; after any failure nothing is left at `target`.
        """
        with self.opened((), "") as source:
            try:
                os.mkdir(target, 0o700)
            except FileExistsError:
                raise errors.PathConflict("", "the place to copy to already exists") from None
            parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                copy = os.open(target, DIRECTORY)
                try:
                    with translated(""), _Copy(source, copy, owner or self._owner, max_bytes) as under_way:
                        return under_way.run(self.linkable_uid())
                finally:
                    os.close(copy)
            except BaseException:
                with contextlib.suppress(OSError):
                    remove_tree(parent, os.fsencode(target.name))
                raise
            finally:
                os.close(parent)

    @contextlib.contextmanager
    def opened(self, names: tuple[bytes, ...], path: str, *, create: bool = False) -> Iterator[int]:
        """A descriptor of the directory at `names`; `path` is how an error spells it. For this package's modules.

        With `create` what is missing on the way is made and given to the owner.
        """
        with translated(path):
            fd = os.open(self._within, DIRECTORY)
        try:
            for name in self._way + names:
                with translated(path):
                    child = self._open_child(fd, name, path, create=create)
                os.close(fd)
                fd = child
            yield fd
        finally:
            os.close(fd)

    def _open_child(self, directory: int, name: bytes, path: str, *, create: bool) -> int:
        made = False
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=directory)
                made = True
        try:
            child = os.open(name, DIRECTORY, dir_fd=directory)
        except OSError as error:
            if error.errno not in NOT_A_DIRECTORY:
                raise
            if is_link(name, directory):
                raise errors.PathConflict(path, f"{spell(name)} is a symbolic link, and none is followed") from None
            raise errors.PathConflict(path, f"{spell(name)} is not a directory") from None
        # The agent may have put a directory of its own in the place of ours: that one keeps its owner and mode.
        if made and os.fstat(child).st_uid == os.geteuid():
            try:
                hand_over(child, 0o755, self._owner)
            except BaseException:
                os.close(child)
                raise
        return child

    @property
    def owner(self) -> Owner | None:
        """Whom new files are given to, where this process is root."""
        return self._owner

    def linkable_uid(self) -> int | None:
        """Whose files may have other names, or None for everyone's."""
        return self._owner[0] if self._owner and os.geteuid() == 0 else None


class _Copy:
    """One copy of a tree, which nobody else can reach before it is complete."""

    def __init__(self, source: int, target: int, owner: Owner | None, max_bytes: int | None) -> None:
        self._owner = owner
        self._max_bytes = max_bytes
        self._linkable_uid: int | None = None
        self._copied = 0
        self._left_out = 0
        with contextlib.ExitStack() as stack:
            self._source = stack.enter_context(Cursor(source))
            self._target = stack.enter_context(Cursor(target))
            self._stack = stack.pop_all()

    def __enter__(self) -> "_Copy":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def run(self, linkable_uid: int | None) -> int:
        """Copies everything and returns how many entries were left out."""
        self._linkable_uid = linkable_uid
        levels = [(os.fstat(self._source.fd), self._copy_level())]
        while levels:
            was, directories = levels[-1]
            if directories:
                if self._descend(directories.pop()):
                    levels.append((os.fstat(self._source.fd), self._copy_level()))
                continue
            levels.pop()
            done = os.dup(self._target.fd)
            try:
                if levels:
                    self._source.leave()
                    self._target.leave()
                # Last, and from outside: its own bits may forbid us to write in it or to leave it.
                self._finish(done, was)
            finally:
                os.close(done)
        return self._left_out

    def _descend(self, name: bytes) -> bool:
        try:
            self._source.enter(name)
        except OSError as error:
            self._leave_out(error)
            return False
        os.mkdir(name, 0o700, dir_fd=self._target.fd)
        self._target.enter(name)
        return True

    def _leave_out(self, error: Exception, *also: int) -> None:
        if isinstance(error, OSError) and error.errno not in (*AGENTS_DOING, *also):
            raise error
        self._left_out += 1

    def _copy_level(self) -> list[bytes]:
        """Copies all but the subdirectories of where we are, and returns those."""
        directories = []
        for name, is_directory in scan(self._source.fd):
            if is_directory:
                directories.append(name)
            elif is_link(name, self._source.fd):
                self._copy_link(name)
            else:
                self._copy_file(name)
        return directories

    def _copy_link(self, name: bytes) -> None:
        try:
            was = lstat(name, self._source.fd)
            points_to = os.readlink(name, dir_fd=self._source.fd)
        except OSError as error:
            self._leave_out(error, errno.EINVAL)  # no link any more
            return
        os.symlink(points_to, name, dir_fd=self._target.fd)
        if self._owner and os.geteuid() == 0:
            os.chown(name, *self._owner, dir_fd=self._target.fd, follow_symlinks=False)
        times = (was.st_atime_ns, was.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=self._target.fd, follow_symlinks=False)

    def _copy_file(self, name: bytes) -> None:
        try:
            source = open_regular(self._source.fd, name, self._linkable_uid)
        except (OSError, RefusedError) as error:
            self._leave_out(error)
            return
        try:
            target = os.open(name, CREATE, 0o600, dir_fd=self._target.fd)
            try:
                was = os.fstat(source)
                self._copy_content(source, target, was.st_size)
                self._finish(target, was)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _copy_content(self, source: int, target: int, size: int) -> None:
        # A file of 8 EiB without content is one system call for the agent: copied byte by byte it would fill the disk.
        position = 0
        while position < size:
            try:
                position = os.lseek(source, position, os.SEEK_DATA)
                end = min(os.lseek(source, position, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            while position < end:
                data = os.pread(source, min(_COPY_BYTES, end - position), position)
                if not data:
                    return
                self._copied += len(data)
                if self._max_bytes is not None and self._copied > self._max_bytes:
                    raise errors.FileTooLarge(max_bytes=self._max_bytes)
                while data:
                    written = os.pwrite(target, data, position)
                    position += written
                    data = data[written:]
        os.ftruncate(target, size)

    def _finish(self, fd: int, was: os.stat_result) -> None:
        hand_over(fd, was.st_mode & 0o1777, self._owner)
        os.utime(fd, ns=(was.st_atime_ns, was.st_mtime_ns))


class _Step(NamedTuple):
    """Of a listing: an entry to give, or (its key then ends in `/`) a directory to list at that place."""

    key: str
    name: bytes
    descend: bool


class _Level:
    """A directory being listed: the first steps behind `after`, as many as `limit` entries can take.

    The rest costs no memory, for a directory has as many entries as the agent likes. The content of `a` sorts as
    `a/`, behind `a-b`, so a directory is two steps. Only of a name that `after` begins with can the first step be
    missing, and there are no more of those than a name has characters, four for each byte at most.
    """

    def __init__(self, prefix: str, depth: int) -> None:
        self.prefix = prefix
        self.depth = depth
        self.steps: Iterator[_Step] = iter(())

    def read(self, directory: int, after: str | None, limit: int, recursive: bool) -> None:
        steps = self._scan(directory, after, recursive)
        self.steps = iter(heapq.nsmallest(2 * limit + 4 * MAX_NAME_BYTES, steps))

    def _scan(self, directory: int, after: str | None, recursive: bool) -> Iterator[_Step]:
        if self.depth >= MAX_PATH_DEPTH:
            return
        room = MAX_PATH_BYTES - length(self.prefix)
        for name, is_directory in scan(directory):
            if len(name) > room:
                continue
            key = spell(name)
            path = self.prefix + key
            if after is None or path > after:
                yield _Step(key, name, False)
            inside = path + "/"
            if is_directory and recursive and (after is None or inside > after or after.startswith(inside)):
                yield _Step(key + "/", name, True)


def _mode_of_replaced(directory: int, name: bytes, path: str, new: int) -> int:
    try:
        replaced = lstat(name, directory)
    except FileNotFoundError:
        return new
    if not stat.S_ISREG(replaced.st_mode):
        raise errors.PathConflict(path, f"there is a {_type_of(replaced.st_mode)} of that name")
    return replaced.st_mode & 0o777


def _pump(chunks: Iterable[bytes], out: BinaryIO, max_bytes: int | None) -> None:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if max_bytes is not None and size > max_bytes:
            raise errors.FileTooLarge(max_bytes=max_bytes)
        out.write(chunk)
    out.flush()


def _entry(path: str, found: os.stat_result) -> FileEntry:
    kind = _type_of(found.st_mode)
    size = found.st_size if kind == "file" else 0
    return FileEntry(path, kind, size, _modified_at(found), stat.S_IMODE(found.st_mode))


def _type_of(mode: int) -> FileType:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(mode) else "other"


def _modified_at(found: os.stat_result) -> datetime:
    # A file's time is whatever the agent set it to, well outside of the years 1 to 9999 if it likes.
    try:
        return _EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000)
    except OverflowError:
        if found.st_mtime_ns < 0:
            return datetime.min.replace(tzinfo=UTC)
        return datetime.max.replace(tzinfo=UTC)
