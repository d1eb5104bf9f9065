"""Moving about in a folder that an agent is changing at the same time, by descriptors alone.

What `files.py`, archives and snapshots are made of. Every directory is opened relative to the one before, and no
symbolic link is followed; what counts is what was opened, never what a name led to a moment ago.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from carrel import errors

__all__ = [
    "AGENTS_DOING",
    "CREATE",
    "DIRECTORY",
    "NOT_A_DIRECTORY",
    "Cursor",
    "Owner",
    "RefusedError",
    "hand_over",
    "identity",
    "is_link",
    "left_to_the_agent",
    "lstat",
    "open_regular",
    "remove_tree",
    "scan",
    "translated",
]

Owner = tuple[int, int]

_OPEN_ATTEMPTS = 8
_EMPTYING_ATTEMPTS = 100

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO without a writer, or a lease the agent holds on its file, must not hold up our thread.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
NOT_A_DIRECTORY = (errno.ENOTDIR, errno.ELOOP)
# What an agent can bring about for one entry. Anything else (too many open files, a broken disk) is no reason to
# leave an entry out.
AGENTS_DOING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EAGAIN, *NOT_A_DIRECTORY)


class RefusedError(Exception):
    """The entry is not a regular file that may be read."""


class Cursor:
    """A directory held open that moves down by name and up by `..`, with two descriptors however deep it is.

    Going up arrives where it came from or fails: it compares what it opened with what it had left. Trees as deep as
    an agent can make them need neither recursion nor a descriptor for each level.
    """

    def __init__(self, directory: int) -> None:
        self._base = os.dup(directory)
        try:
            self.fd = os.dup(directory)
        except BaseException:
            os.close(self._base)
            raise
        self._way: list[tuple[tuple[int, int], bytes]] = []

    def __enter__(self) -> "Cursor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.fd)
        os.close(self._base)

    def enter(self, name: bytes) -> None:
        """Goes into a subdirectory; on an `OSError` it stays where it is."""
        child = os.open(name, DIRECTORY, dir_fd=self.fd)
        self._way.append((identity(os.fstat(self.fd)), name))
        os.close(self.fd)
        self.fd = child

    def leave(self) -> None:
        """Goes back up; raises `OSError` where the directory it came from is nowhere to be found."""
        left, _ = self._way.pop()
        try:
            parent = os.open("..", DIRECTORY, dir_fd=self.fd)
        except OSError:  # a directory without the x bit can be read, but not left
            parent = self._descend_again()
        if identity(os.fstat(parent)) != left:  # the agent moved the directory we are in
            os.close(parent)
            parent = self._descend_again()
        if identity(os.fstat(parent)) != left:
            os.close(parent)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        os.close(self.fd)
        self.fd = parent

    def _descend_again(self) -> int:
        fd = os.dup(self._base)
        for _, name in self._way:
            try:
                child = os.open(name, DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = child
        return fd


def scan(directory: int) -> Iterator[tuple[bytes, bool]]:
    """The names in an open directory, and whether each was itself a directory (not a link to one)."""
    with os.scandir(directory) as entries:
        for entry in entries:
            is_directory = False
            with left_to_the_agent():  # file systems that do not tell the type with the name have it looked up
                is_directory = entry.is_dir(follow_symlinks=False)
            yield os.fsencode(entry.name), is_directory


def remove_tree(parent: int, name: bytes) -> None:
    with Cursor(parent) as cursor:
        attempts = _EMPTYING_ATTEMPTS
        levels = [[name]]
        while True:
            if levels[-1]:
                if _enter_to_empty(cursor, levels[-1][-1]):
                    levels.append(_remove_files(cursor.fd))
                else:
                    levels[-1].pop()
                continue
            levels.pop()
            if not levels:
                return
            cursor.leave()
            try:
                os.rmdir(levels[-1][-1], dir_fd=cursor.fd)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and attempts:
                    attempts -= 1
                    continue
                if error.errno != errno.ENOENT:
                    raise
            levels[-1].pop()


def _enter_to_empty(cursor: Cursor, name: bytes) -> bool:
    try:
        cursor.enter(name)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in NOT_A_DIRECTORY:
            raise
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=cursor.fd)
        return False
    # Tools make read-only directories (Go's module cache is one); where they are ours, that is no reason to fail.
    was = os.fstat(cursor.fd)
    if was.st_uid == os.geteuid() and was.st_mode & 0o700 != 0o700:
        os.fchmod(cursor.fd, 0o700)
    return True


def _remove_files(directory: int) -> list[bytes]:
    """Removes all but the subdirectories of a directory, and returns those."""
    directories = []
    for name, is_directory in scan(directory):
        if is_directory:
            directories.append(name)
            continue
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            continue
        except IsADirectoryError:
            directories.append(name)
    return directories


def open_regular(directory: int, name: bytes, linkable_uid: int | None) -> int:
    """Opens a regular file, or raises `OSError` or `RefusedError`.

    The file is looked at before it is opened, since opening a device can do something; and what was opened must be
    what was looked at: else the agent could hide a hard link's count by removing the link just after we opened it.
    """
    for _ in range(_OPEN_ATTEMPTS):
        seen = lstat(name, directory)
        if not stat.S_ISREG(seen.st_mode):
            raise RefusedError
        if linkable_uid is not None and seen.st_nlink > 1 and seen.st_uid != linkable_uid:
            raise RefusedError
        try:
            fd = os.open(name, _READ, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # swapped for a link or a socket: look again
                continue
            raise
        if identity(os.fstat(fd)) == identity(seen):
            return fd
        os.close(fd)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def hand_over(fd: int, mode: int, owner: Owner | None) -> None:
    if owner and os.geteuid() == 0:
        os.fchown(fd, *owner)
    os.fchmod(fd, mode)


@contextlib.contextmanager
def left_to_the_agent() -> Iterator[None]:
    """Passes over what is gone meanwhile, or is not for us to see."""
    try:
        yield
    except OSError as error:
        if error.errno not in AGENTS_DOING:
            raise


def lstat(name: bytes, directory: int) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def is_link(name: bytes, directory: int) -> bool:
    try:
        return stat.S_ISLNK(lstat(name, directory).st_mode)
    except OSError:
        return False


def identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turns what the system says about a path into our own errors, and passes on what is about the disk."""
    try:
        yield
    except RefusedError:
        raise errors.NotAFile(path) from None
    except OSError as error:
        reasons = {
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOTDIR: "not a directory",
            errno.ELOOP: "a symbolic link is on the way",
            errno.EISDIR: "there is a directory of that name",
            errno.ENOTEMPTY: "it is being written to",
            errno.EEXIST: "it is being written to",
            errno.EBUSY: "it changed while it was being used",
            errno.EAGAIN: "a process holds a lease on it",
        }
        if error.errno == errno.ENOENT:
            raise errors.FileNotFound(path) from error
        if error.errno in reasons:
            raise errors.PathConflict(path, reasons[error.errno]) from error
        raise
