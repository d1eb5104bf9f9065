"""Archives from outside, unpacked safely, and a workspace as an archive.

An archive is the word of a stranger. What it names is brought into being through the workspace's own safe access, so no
member can get out by its path, by a link, or by a link that an earlier member has made; and there are bounds for members,
bytes, depth and for how much may come out of how little. Everything here blocks and streams: no file is ever whole in
memory. Zip has its list at its end, so it is read from a file.

Kept of a member: its bytes, its time, whether it may be executed and by whom it may be read; never an owner, a
set-user-id bit or anything that is no file, folder or link.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import stat
import struct
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import zstandard

from carrel.errors import ArchiveInvalid, ArchiveTooLarge, InvalidPath, SnapshotTooLarge
from carrel.workspaces.descriptors import (
    AGENTS_DOING,
    RefusedError,
    hand_over,
    is_link,
    lstat,
    open_regular,
    translated,
)
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.manifests import Entry
from carrel.workspaces.paths import parse, spell, unspell
from carrel.workspaces.saving import Saving
from carrel.workspaces.scanning import Ignored, Scan, Tree, walk

__all__ = ["ArchiveFormat", "ArchiveLimits", "Unpacked", "pack", "unpack"]

ArchiveFormat = Literal["tar", "tar.gz", "tar.zst", "zip"]

_COPY_BYTES = 1 << 18
_HEADER_BYTES = 1 << 20
_RATIO_FROM_BYTES = 32 * 2**20
_DIRECTORY_BYTES_A_MEMBER = 1024
# What the standard library says of a damaged archive, in many words.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    UnicodeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """How much may come out of an archive."""

    max_bytes: int
    """Of content; a hole counts as if it were full."""
    max_members: int = 100_000
    max_depth: int = 64
    """Of folders in each other."""
    max_ratio: int = 200
    """Bytes that come out for each that goes in, once more than 32 MiB have come out."""


@dataclass(frozen=True)
class Unpacked:
    """What came of unpacking."""

    members: int
    bytes: int
    links_left_out: int
    """Symbolic links that lead out of the workspace, where those were to be left out."""


def unpack(
    source: BinaryIO,
    target: WorkspaceFiles,
    limits: ArchiveLimits,
    *,
    path: str = "",
    leave_out_links: bool = False,
) -> Unpacked:
    """Unpack a tar (plain, gzip or zstd) or a zip, told apart by how it begins, into a folder of the workspace.

    What is there already is replaced where it is a file and the archive has a file of that name; folders are shared. When
    it fails, what was unpacked so far remains.

    Args:
        source: the archive, read from where it stands. Only a zip must be seekable.
        target: the workspace; its owner is given all that is made.
        limits: what may come out.
        path: the folder, made if it is not there.
        leave_out_links: whether a symbolic link that leads out of the folder is left out rather than refused.

    Raises:
        ArchiveInvalid: it is damaged, none of these, or holds what may not be unpacked; the message names the member.
        ArchiveTooLarge: more would come out than may.
        InvalidPath, PathConflict: the folder cannot be used, or something of another kind has a member's name.
    """
    unpacking = _Unpacking(target, limits, path, leave_out_links)
    buffered = source if isinstance(source, io.BufferedReader) else io.BufferedReader(source)  # type: ignore[type-var]
    beginning = buffered.peek(4)[:4]
    try:
        if beginning.startswith(b"PK"):
            _unzip(buffered, unpacking)
        else:
            _untar(buffered, beginning, unpacking)
        unpacking.finish()
    except InvalidPath as error:
        raise ArchiveInvalid(str(error.message), member=unpacking.member) from None
    except _DAMAGED as error:
        raise ArchiveInvalid("it is damaged, or not a tar or zip", member=unpacking.member) from error
    finally:
        if buffered is not source:
            buffered.detach()
    return Unpacked(unpacking.members, unpacking.written, unpacking.links_left_out)


class _Unpacking:
    """What holds for members of every kind of archive."""

    def __init__(self, target: WorkspaceFiles, limits: ArchiveLimits, path: str, leave_out_links: bool) -> None:
        self._target = target
        self._limits = limits
        self._base = parse(path)
        self._leave_out_links = leave_out_links
        self._folders: dict[tuple[bytes, ...], tuple[int, float]] = {}
        self._files: set[tuple[bytes, ...]] = set()
        self.member: str | None = None
        self.members = 0
        self.written = 0
        self.links_left_out = 0
        self.consumed: Callable[[], int] = lambda: 0

    @property
    def most_members(self) -> int:
        """How many there may be."""
        return self._limits.max_members

    def begin(self, name: str) -> tuple[bytes, ...]:
        """The way to a member, checked; the empty one for the folder itself."""
        self.member = name if name.isprintable() else repr(name)
        self.members += 1
        if self.members > self._limits.max_members:
            raise ArchiveTooLarge("members", self._limits.max_members)
        if name.startswith("/") or ("\\" in name and name[1:2] == ":"):
            raise ArchiveInvalid("its path is absolute", member=self.member)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ArchiveInvalid("its path leads out of the archive", member=self.member)
        if len(parts) > self._limits.max_depth:
            raise ArchiveTooLarge("folders in each other", self._limits.max_depth)
        if any(unicodedata.category(char) == "Cc" for char in name):
            raise ArchiveInvalid("its name has control characters", member=self.member)
        names = tuple(os.fsencode(part) for part in parts)
        parse("/".join(map(spell, self._base + names)))  # too long, or not a name
        return names

    def came_out(self, count: int) -> None:
        """So many bytes more: enough is enough."""
        self.written += count
        if self.written > self._limits.max_bytes:
            raise ArchiveTooLarge("bytes", self._limits.max_bytes)
        if self.written > _RATIO_FROM_BYTES and self.written > self._limits.max_ratio * max(self.consumed(), 1):
            raise ArchiveTooLarge("bytes for each of its own", self._limits.max_ratio)

    def folder(self, names: tuple[bytes, ...], mode: int, mtime: float) -> None:
        """A folder; its mode and time come when all is in it."""
        with self._target.opened(self._base + names, self._spelled(names), create=True):
            self._folders[names] = (mode & 0o777 | 0o700, mtime)

    def file(self, names: tuple[bytes, ...], mode: int, mtime: float, pieces: Iterator[bytes]) -> None:
        """A regular file."""
        if not names:
            raise ArchiveInvalid("a file needs a name", member=self.member)
        path = self._spelled(names)

        def counted() -> Iterator[bytes]:
            for piece in pieces:
                self.came_out(len(piece))
                yield piece

        self._clear_link(names)
        self._target.write(path, counted(), mode=mode & 0o777 | 0o600)
        self._settle(names, mode & 0o777 | 0o600, mtime)
        self._files.add(names)

    def symlink(self, names: tuple[bytes, ...], points_to: str) -> None:
        """A symbolic link, as long as what it means is within the folder."""
        if not names or not points_to or "\0" in points_to or len(os.fsencode(points_to)) > 4095:
            raise ArchiveInvalid("its link has no usable target", member=self.member)
        above = "/".join(os.fsdecode(name) for name in names[:-1])
        meant = posixpath.normpath(posixpath.join("/base", above, points_to))
        if points_to.startswith("/") or not (meant == "/base" or meant.startswith("/base/")):
            if self._leave_out_links:
                self.links_left_out += 1
                return
            raise ArchiveInvalid("it is a link that leads out of the archive", member=self.member)
        self._clear_link(names)
        with self._place(names) as (directory, name):
            os.symlink(os.fsencode(points_to), name, dir_fd=directory)
            if self._target.owner and os.geteuid() == 0:
                os.chown(name, *self._target.owner, dir_fd=directory, follow_symlinks=False)

    def hardlink(self, names: tuple[bytes, ...], target: tuple[bytes, ...]) -> None:
        """Another name of a file that this archive has brought."""
        if target not in self._files or not names:
            raise ArchiveInvalid("it is a link to what the archive did not bring before it", member=self.member)
        if names == target:
            return
        self._clear_link(names)
        with self._place(target) as (from_directory, from_name), self._place(names) as (directory, name):
            if not stat.S_ISREG(lstat(from_name, from_directory).st_mode):
                raise ArchiveInvalid("what it links to is no file any more", member=self.member)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(lstat(name, directory).st_mode):
                    os.unlink(name, dir_fd=directory)
            os.link(from_name, name, src_dir_fd=from_directory, dst_dir_fd=directory, follow_symlinks=False)
        self._files.add(names)

    def refuse(self) -> None:
        """Something that is neither file, folder nor link."""
        raise ArchiveInvalid("it is a device, a pipe or another thing that is no file", member=self.member)

    def finish(self) -> None:
        """Give folders their modes and times, the deepest first."""
        self.member = None
        with self._target.opened(self._base, self._spelled(()), create=True):
            pass
        for names in sorted(self._folders, key=len, reverse=True):
            if names:
                self._settle(names, *self._folders[names])

    def _spelled(self, names: tuple[bytes, ...]) -> str:
        return "/".join(map(spell, self._base + names))

    @contextlib.contextmanager
    def _place(self, names: tuple[bytes, ...]) -> Iterator[tuple[int, bytes]]:
        path = self._spelled(names)
        with self._target.opened((self._base + names)[:-1], path, create=True) as directory, translated(path):
            yield directory, names[-1]

    def _clear_link(self, names: tuple[bytes, ...]) -> None:
        with self._place(names) as (directory, name):
            if is_link(name, directory):
                os.unlink(name, dir_fd=directory)

    def _settle(self, names: tuple[bytes, ...], mode: int, mtime: float) -> None:
        at = min(max(int(mtime * 1e9), 0), 2**62)
        path = self._spelled(names)
        with self._place(names) as (directory, name):
            if stat.S_ISDIR(lstat(name, directory).st_mode):
                with self._target.opened(self._base + names, path) as fd:
                    hand_over(fd, mode, self._target.owner)
                    os.utime(fd, ns=(at, at))
                return
            fd = open_regular(directory, name, self._target.linkable_uid())
            try:
                hand_over(fd, mode, self._target.owner)
                os.utime(fd, ns=(at, at))
            finally:
                os.close(fd)


# --------------------------------------------------------------------------------------------------------------- tar


class _Counted(io.RawIOBase):
    """What is read of an archive, counted."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


class _Gunzipped(io.RawIOBase):
    """Gzip, several of them one after the other too, never more in memory than was asked for."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._inflate = zlib.decompressobj(31)
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            data = self._inflate.unconsumed_tail or self._inflate.unused_data or self._source.read(1 << 16)
            if self._inflate.eof:
                if not data.strip(b"\0"):  # padding behind the last one
                    return 0
                self._inflate = zlib.decompressobj(31)
            elif not data:
                if self._begun:
                    raise EOFError
                return 0
            self._begun = True
            out = self._inflate.decompress(data, len(buffer))
            if out:
                buffer[: len(out)] = out
                return len(out)


class _Member(tarfile.TarInfo):
    """A member whose headers have a bound: `tarfile` would read names of any length into memory."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        """The next header; one that is damaged is told. `tarfile` takes it for the end where it is not the first."""
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if self.type in headers and self.size > _HEADER_BYTES:
            raise ValueError("a header is too long")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def _untar(source: Any, beginning: bytes, unpacking: _Unpacking) -> None:
    counted = _Counted(source)
    unpacking.consumed = lambda: counted.count
    stream: BinaryIO = io.BufferedReader(counted)
    if beginning.startswith(b"\x1f\x8b"):
        stream = io.BufferedReader(_Gunzipped(stream))
    elif beginning == b"\x28\xb5\x2f\xfd":
        unzstd = zstandard.ZstdDecompressor(max_window_size=2**27)
        stream = io.BufferedReader(unzstd.stream_reader(stream, read_across_frames=True))
    if not stream.peek(1):  # type: ignore[attr-defined]
        raise ArchiveInvalid("it is empty")
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member, errorlevel=2) as tar:
        for info in tar:
            # It keeps them all, to find the target of a link; we know those ourselves.
            tar.members = []  # type: ignore[attr-defined]
            _tar_member(tar, info, unpacking)


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo, unpacking: _Unpacking) -> None:
    names = unpacking.begin(info.name)
    if info.isdir():
        unpacking.folder(names, info.mode, info.mtime)
    elif info.isreg():
        content = tar.extractfile(info)
        assert content is not None
        unpacking.file(names, info.mode, info.mtime, iter(lambda: content.read(_COPY_BYTES), b""))
    elif info.issym():
        unpacking.symlink(names, info.linkname)
    elif info.islnk():
        unpacking.members -= 1
        unpacking.hardlink(names, unpacking.begin(info.linkname))
    else:
        unpacking.refuse()


# --------------------------------------------------------------------------------------------------------------- zip


def _unzip(source: Any, unpacking: _Unpacking) -> None:
    size = _bounded_directory(source, unpacking)
    unpacking.consumed = lambda: size
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            # A name as Windows writes it; `zipfile` has turned its backslashes only there.
            names = unpacking.begin(info.filename)
            mode, mtime = info.external_attr >> 16, _zip_time(info)
            kind = stat.S_IFMT(mode) if info.create_system == 3 else 0
            if info.is_dir():
                unpacking.folder(names, mode or 0o755, mtime)
            elif kind in (0, stat.S_IFREG):
                with archive.open(info) as content:
                    unpacking.file(names, mode or 0o644, mtime, iter(lambda c=content: c.read(_COPY_BYTES), b""))  # type: ignore[misc]
            elif kind == stat.S_IFLNK:
                with archive.open(info) as content:
                    unpacking.symlink(names, os.fsdecode(content.read(5000)))
            else:
                unpacking.refuse()


def _bounded_directory(source: Any, unpacking: _Unpacking) -> int:
    """How long the archive is, once it is known that its list of members can be held."""
    if not source.seekable():
        raise ArchiveInvalid("a zip can be unpacked only from a file")
    size = int(source.seek(0, io.SEEK_END))
    source.seek(max(0, size - 65_557))
    end = source.read()
    at = end.rfind(b"PK\5\6")
    if at < 0 or len(end) - at < 22:
        raise zipfile.BadZipFile
    length = struct.unpack_from("<L", end, at + 12)[0]
    if length == 0xFFFFFFFF:
        wide = end.rfind(b"PK\6\6", 0, at)
        if wide < 0:
            raise zipfile.BadZipFile
        length = struct.unpack_from("<Q", end, wide + 40)[0]
    if length > unpacking.most_members * _DIRECTORY_BYTES_A_MEMBER:
        raise ArchiveTooLarge("members", unpacking.most_members)
    source.seek(0)
    return size


def _zip_time(info: zipfile.ZipInfo) -> float:
    try:
        return time.mktime((*info.date_time, 0, 0, -1))
    except (ValueError, OverflowError):
        return 0.0


# ----------------------------------------------------------------------------------------------------------- packing


def pack(
    source: WorkspaceFiles,
    form: ArchiveFormat,
    limits: ArchiveLimits,
    *,
    path: str = "",
    ignored: Ignored | None = None,
) -> Generator[bytes, None, None]:
    """The workspace, or one entry of it, as an archive, in pieces, while its agent may be at work.

    Members are named from the workspace's root. A name that is no UTF-8 has replacement characters in a zip.
    Symbolic links stand in it as they are, wherever they lead. Left out is what is no file, folder or link, and what
    cannot be read. A file that shrinks while it is read is filled up with zeros.

    Raises:
        FileNotFound, InvalidPath, PathConflict: there is no such folder, or it is moved about while it is read.
        SnapshotTooLarge: there is more than the limits allow.
    """
    tree = Tree("x", source, (path,) if path else None)
    every = ignored or Ignored()
    if form == "zip":
        yield from _zip_of(tree, every, limits)
        return
    saving = Saving([tree], every, max_entries=limits.max_members, max_bytes=limits.max_bytes, with_names=False)
    if form == "tar":
        yield from saving.tar()
        return
    compressor: Any = (
        zlib.compressobj(6, zlib.DEFLATED, 31)
        if form == "tar.gz"
        else zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    )
    for piece in saving.tar():
        if packed := compressor.compress(piece):
            yield packed
    yield compressor.flush()


def _zip_of(tree: Tree, ignored: Ignored, limits: ArchiveLimits) -> Iterator[bytes]:
    out = _Out()
    left = limits.max_bytes
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for _, visit, entry in walk([tree], ignored, limits.max_members, Scan({})):
            if entry is None:
                continue
            folder = entry.type == "directory"
            info = zipfile.ZipInfo(unspell(visit.path).decode("utf-8", "replace") + "/" * folder, _zip_date(entry))
            info.create_system = 3
            kind = {"directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}.get(entry.type, stat.S_IFREG)
            info.external_attr = (kind | entry.mode) << 16 | (0x10 if folder else 0)
            info.compress_type = zipfile.ZIP_DEFLATED
            if entry.type in ("directory", "symlink"):
                archive.writestr(info, unspell(entry.target))
                yield from out.taken()
                continue
            try:
                fd = open_regular(visit.directory, visit.name, tree.files.linkable_uid())
            except (OSError, RefusedError) as error:
                if isinstance(error, OSError) and error.errno not in AGENTS_DOING:
                    raise
                continue
            with os.fdopen(fd, "rb") as content, archive.open(info, "w", force_zip64=True) as member:
                rest = os.fstat(fd).st_size
                left -= rest
                if left < 0:
                    raise SnapshotTooLarge("bytes", limits.max_bytes)
                while rest > 0 and (data := content.read(min(_COPY_BYTES, rest))):
                    rest -= len(data)
                    member.write(data)
                    yield from out.taken()
    yield from out.taken()


def _zip_date(entry: Entry) -> tuple[int, int, int, int, int, int]:
    try:
        found = time.localtime(entry.mtime_ns // 10**9)
    except (ValueError, OverflowError, OSError):
        found = time.localtime(0)
    # A zip knows the years 1980 to 2107.
    return min(max(found[:6], (1980, 1, 1, 0, 0, 0)), (2107, 12, 31, 23, 59, 58))


class _Out(io.RawIOBase):
    """Where `zipfile` writes, and from where it is taken at once."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def taken(self) -> Iterator[bytes]:
        """What was written since the last time."""
        pieces, self._pieces = self._pieces, []
        if data := b"".join(pieces):
            yield data
