"""The format of a backup: a tar archive, compressed, whose last member says what every other one must be.

`manifest.json` has the SHA-256 and the size of every file and the target of every symbolic link. An archive is read
from end to end and held against it before a byte is written anywhere. Members are files, folders and symbolic links;
a link is kept as a link, and nothing may lie beneath one.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from carrel.errors import BackupInvalid, TargetNotEmpty

__all__ = ["ArchiveWriter", "Manifest", "extract", "verify"]

_MANIFEST = "manifest.json"
_FORMAT = 1
_PIECE_BYTES = 1 << 20
_IN_MEMORY_BYTES = 16 << 20
_LARGEST_MANIFEST_BYTES = 1 << 30
_PRIVATE_FOLDER, _PRIVATE_FILE = 0o700, 0o600
# It has gone, or has become something else since it was listed, or is another user's: what an agent can bring about.
_AGENTS_DOING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO})
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass
class Manifest:
    """What an archive holds."""

    facts: dict[str, Any]
    """Whatever the command wants to know again: the version, the revision of the schema."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    def encode(self) -> bytes:
        """As JSON. File names are bytes to Linux; those that are no text are told as lone surrogates."""
        value = {
            "format": _FORMAT,
            "facts": self.facts,
            "files": self.files,
            "links": self.links,
            "folders": self.folders,
        }
        return json.dumps(value, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read one. Raises BackupInvalid."""
        try:
            value = json.loads(data)
            if value["format"] != _FORMAT:
                raise BackupInvalid("The archive was made by another release of Carrel; restore it with that one.")
            return cls(dict(value["facts"]), dict(value["files"]), dict(value["links"]), list(value["folders"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BackupInvalid(operator_detail=f"manifest: {error!r}") from error


# -------------------------------------------------------------------------------------------------------------- writing


class ArchiveWriter:
    """Writes an archive. What an agent changes meanwhile is taken as it is found; it cannot lead out of its folder."""

    def __init__(self, tar: tarfile.TarFile, facts: dict[str, Any]) -> None:
        """Use `ArchiveWriter.create`."""
        self._tar = tar
        self.manifest = Manifest(facts)
        self.skipped: list[str] = []
        """What is neither file, folder nor link, was gone when its turn came, or may not be read."""

    @classmethod
    @contextmanager
    def create(cls, path: Path, facts: dict[str, Any]) -> Iterator[ArchiveWriter]:
        """Write an archive that nobody else can read. It has its name once it is whole.

        Raises:
            TargetNotEmpty: there is something of that name.
        """
        if os.path.lexists(path):
            raise TargetNotEmpty(f"There is a {path} already; nothing is overwritten.")
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE_FILE)
        try:
            with os.fdopen(fd, "wb") as file:
                with (
                    gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6) as packed,
                    tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
                ):
                    writer = cls(tar, facts)
                    yield writer
                    writer._finish()
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # unlike a rename, this overwrites nothing
        finally:
            draft.unlink(missing_ok=True)

    def _finish(self) -> None:
        data = self.manifest.encode()
        entry = self._entry(_MANIFEST)
        entry.size = len(data)
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
            file.write(data)
            file.seek(0)
            self._tar.addfile(entry, file)

    def add_file(self, name: str, source: BinaryIO | IO[bytes], like: os.stat_result | None = None) -> None:
        """Add a file's content, from where it stands to its end."""
        # Copied first: its size stands before it in the archive, and it may change while it is read.
        digest = hashlib.sha256()
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as copy:
            while piece := source.read(_PIECE_BYTES):
                digest.update(piece)
                copy.write(piece)
            entry = self._entry(name, like)
            entry.size = copy.tell()
            copy.seek(0)
            self._tar.addfile(entry, copy)
        self.manifest.files[name] = {"sha256": digest.hexdigest(), "size": entry.size}

    def add_path(self, name: str, path: Path) -> bool:
        """Add one file of ours. Answers False where it is not there."""
        try:
            with path.open("rb") as file:
                self.add_file(name, file, os.fstat(file.fileno()))
        except FileNotFoundError:
            return False
        return True

    def add_tree(self, name: str, folder: Path) -> bool:
        """Add a folder and all that is in it, never following a link. Answers False where it is not there."""
        try:
            fd = os.open(folder, _FOLDER_FLAGS)
        except FileNotFoundError:
            return False
        try:
            self._add_folder(name, fd)
        finally:
            os.close(fd)
        return True

    def _add_folder(self, name: str, fd: int) -> None:
        entry = self._entry(name, os.fstat(fd))
        entry.type = tarfile.DIRTYPE
        self._tar.addfile(entry)
        self.manifest.folders.append(name)
        for child in sorted(os.listdir(fd)):
            try:
                self._add_child(f"{name}/{child}", child, fd)
            except OSError as error:
                if error.errno not in _AGENTS_DOING:
                    raise
                self.skipped.append(f"{name}/{child}")

    def _add_child(self, name: str, child: str, parent: int) -> None:
        found = os.stat(child, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            entry = self._entry(name, found)
            entry.type = tarfile.SYMTYPE
            entry.linkname = os.readlink(child, dir_fd=parent)
            self._tar.addfile(entry)
            self.manifest.links[name] = entry.linkname
            return
        if stat.S_ISDIR(found.st_mode):
            fd = os.open(child, _FOLDER_FLAGS, dir_fd=parent)
            try:
                self._add_folder(name, fd)
            finally:
                os.close(fd)
            return
        if not stat.S_ISREG(found.st_mode):
            self.skipped.append(name)
            return
        fd = os.open(child, _FILE_FLAGS, dir_fd=parent)
        with os.fdopen(fd, "rb") as file:
            opened = os.fstat(file.fileno())
            if not stat.S_ISREG(opened.st_mode):  # something else took its place
                self.skipped.append(name)
                return
            self.add_file(name, file, opened)

    def _entry(self, name: str, like: os.stat_result | None = None) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(name)
        entry.mode = _PRIVATE_FILE if like is None else stat.S_IMODE(like.st_mode) & 0o777
        if like is not None:
            entry.uid, entry.gid, entry.mtime = like.st_uid, like.st_gid, like.st_mtime
        return entry


# -------------------------------------------------------------------------------------------------------------- reading


def verify(file: BinaryIO) -> Manifest:
    """Read an archive from end to end, and hold it against its manifest.

    Raises:
        BackupInvalid: it is damaged, or not one of ours, or holds what a backup never does.
    """
    files: dict[str, dict[str, Any]] = {}
    links: dict[str, str] = {}
    folders: set[str] = set()
    manifest: Manifest | None = None
    for entry, content in _members(file):
        if manifest is not None:
            raise BackupInvalid(operator_detail=f"{entry.name!r} stands behind the manifest")
        if entry.name == _MANIFEST and content is not None:
            if entry.size > _LARGEST_MANIFEST_BYTES:
                raise BackupInvalid(operator_detail="the manifest is too large")
            manifest = Manifest.decode(content.read())
            continue
        _check_name(entry.name, files, links, folders)
        if entry.isdir():
            folders.add(entry.name)
        elif entry.issym():
            links[entry.name] = entry.linkname
        elif content is not None:
            files[entry.name] = _digest(content)
        else:
            raise BackupInvalid(operator_detail=f"{entry.name!r} is neither file, folder nor symbolic link")
    if manifest is None:
        raise BackupInvalid(operator_detail="there is no manifest")
    if (manifest.files, manifest.links, set(manifest.folders)) != (files, links, folders):
        raise BackupInvalid(operator_detail=f"not as the manifest says: {_difference(manifest, files, links, folders)}")
    return manifest


def _difference(manifest: Manifest, files: dict[str, Any], links: dict[str, str], folders: set[str]) -> str:
    told: dict[str, Any] = {**manifest.files, **manifest.links, **dict.fromkeys(manifest.folders, "folder")}
    found: dict[str, Any] = {**files, **links, **dict.fromkeys(folders, "folder")}
    return ", ".join(repr(name) for name in sorted(told.keys() | found.keys()) if told.get(name) != found.get(name))[
        :500
    ]


def extract(file: BinaryIO, manifest: Manifest, place: Callable[[str], Path | None]) -> None:
    """Write out an archive that `verify` has read, into folders of our own that nobody else writes in.

    Args:
        file: the archive, from its beginning.
        manifest: what `verify` answered; what is written is held against it once more.
        place: where a member goes, its parent being there; None leaves it out.

    Raises:
        BackupInvalid: the archive has changed since it was verified.
    """
    folders: list[tuple[Path, tarfile.TarInfo]] = []
    links: list[tuple[Path, tarfile.TarInfo]] = []
    known = set(manifest.folders)
    for entry, content in _members(file):
        if entry.name == _MANIFEST:
            continue
        path = place(entry.name)
        if entry.isdir() and entry.name in known:
            if path is not None:
                path.mkdir(mode=_PRIVATE_FOLDER)
                folders.append((path, entry))
        elif entry.issym() and manifest.links.get(entry.name) == entry.linkname:
            if path is not None:
                links.append((path, entry))
        elif content is not None and entry.name in manifest.files:
            if path is not None:
                _write(path, entry, content, manifest.files[entry.name])
        else:
            raise BackupInvalid(operator_detail=f"{entry.name!r} has changed since it was verified")
    # Links come last, so that nothing is ever written by way of one; and a folder's mode after what is in it.
    for path, entry in links:
        os.symlink(entry.linkname, path)
        _own(path, entry)
    for path, entry in reversed(folders):
        _own(path, entry)
        path.chmod(entry.mode & 0o777)
        os.utime(path, (entry.mtime, entry.mtime))


def _write(path: Path, entry: tarfile.TarInfo, content: IO[bytes], told: dict[str, Any]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    digest = hashlib.sha256()
    size = 0
    with os.fdopen(os.open(path, flags, _PRIVATE_FILE), "wb") as file:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
            file.write(piece)
        if {"sha256": digest.hexdigest(), "size": size} != told:
            raise BackupInvalid(operator_detail=f"{entry.name!r} has changed since it was verified")
        file.flush()  # or its time would be that of the last write
        _own(path, entry)
        os.fchmod(file.fileno(), entry.mode & 0o777)
        os.utime(file.fileno(), (entry.mtime, entry.mtime))


def _own(path: Path, entry: tarfile.TarInfo) -> None:
    """To whom it belonged; only root can give things away, and for others there is only one owner."""
    if os.geteuid() == 0:
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    file.seek(0)
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as packed:
            with tarfile.open(fileobj=packed, mode="r|") as tar:
                for entry in tar:
                    yield entry, tar.extractfile(entry) if entry.isreg() else None
            while packed.read(_PIECE_BYTES):  # to the check sum at its very end
                pass
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's doing, not the archive's
        raise BackupInvalid(operator_detail=repr(error)) from error


def _digest(content: IO[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    try:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise BackupInvalid(operator_detail=repr(error)) from error
    return {"sha256": digest.hexdigest(), "size": size}


def _check_name(name: str, files: Mapping[str, Any], links: Mapping[str, str], folders: set[str]) -> None:
    """Refuse a name that leads out, comes twice, or lies beneath anything but a folder of the archive's own."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise BackupInvalid(operator_detail=f"{name!r} is no name of a backup's")
    if name in files or name in links or name in folders:
        raise BackupInvalid(operator_detail=f"{name!r} is there twice")
    if len(parts) > 1 and name.rpartition("/")[0] not in folders:
        raise BackupInvalid(operator_detail=f"{name!r} is in no folder")
