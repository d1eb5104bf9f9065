"""A vault without an object store: copies of folders in a folder, which can be away, broken, or slow."""

from __future__ import annotations

import asyncio
import shutil
from hashlib import sha256
from pathlib import Path

from carrel.errors import CarrelError, Unavailable
from carrel.model import Session
from carrel.sessions.kept import Saved
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.folders import Folders

__all__ = ["FolderVault"]


class FolderVault:
    """Keeps copies under one folder."""

    folders: Folders
    """Whose files are kept; the gateway says."""

    def __init__(self, root: Path) -> None:
        """Keep copies under `root`."""
        self.root = root
        self.away = False
        """Whether the object store is away."""
        self.broken: set[str] = set()
        """Keys that cannot be read any more."""
        self.reading = asyncio.Event()
        """Clear it to have whoever saves wait before reading."""
        self.reading.set()
        self.tried = 0

    def keys(self) -> list[str]:
        """What is kept, in order."""
        return sorted(str(path.parent.relative_to(self.root)) for path in self.root.rglob(".digest"))

    async def save(self, session: Session, key: str, *, since: str | None) -> Saved | None:
        """Keep the session's workspace under a key. None where nothing has changed since the object `since`."""
        self.tried += 1
        await self.reading.wait()
        self._check()
        place = self.root / key
        files = WorkspaceFiles(self.folders.workspace(session), owner=self.folders.owner(session))
        digest = _digest(files)
        before = self.root / since / ".digest" if since is not None else None
        if before is not None and before.is_file() and before.read_text() == digest:
            return None
        place.mkdir(parents=True)
        files.copy_to(place / "files")
        (place / ".digest").write_text(digest)
        return Saved(size_bytes=files.size(), stored_bytes=len(digest), files=len(files.tree(limit=10_000)))

    async def restore(self, session: Session, key: str, target: Path) -> None:
        """Put what was kept into a folder that is not there yet."""
        self._check()
        if key in self.broken or not (self.root / key / ".digest").is_file():
            raise CarrelError("It cannot be read.")
        shutil.copytree(self.root / key / "files", target, symlinks=True)

    async def delete(self, prefix: str) -> None:
        """Delete every object whose key begins so."""
        self._check()
        shutil.rmtree(self.root / prefix, ignore_errors=True)

    def _check(self) -> None:
        if self.away:
            raise Unavailable("The object store is away.")


def _digest(files: WorkspaceFiles) -> str:
    found = sha256()
    for entry in files.tree(limit=10_000):
        found.update(f"{entry.path}\0{entry.type}\0{entry.mode}\0".encode())
        if entry.type == "file":
            with files.open_read(entry.path) as file:
                found.update(file.read())
    return found.hexdigest()
