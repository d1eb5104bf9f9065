"""The folders of each session: its workspace and its agent's home."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from carrel.workspaces.files import WorkspaceFiles


class Folders:
    """A folder per session under one root."""

    def __init__(self, root: Path, *, first_uid: int | None) -> None:
        """Look after the folders under `root`.

        Args:
            root: made when it is not there; private to us.
            first_uid: where each session has a user of its own, the first of their ids; None where all are ours.
        """
        self._root = root
        self._first_uid = first_uid

    def paths(self, session_id: str) -> tuple[str, str]:
        """The workspace and the home."""
        folder = self._root / session_id
        return str(folder / "workspace"), str(folder / "home")

    def owner(self, number: int) -> tuple[int, int] | None:
        """The user and group that the files of this session belong to; None for our own."""
        if self._first_uid is None:
            return None
        return self._first_uid + number, self._first_uid + number

    def make(self, session_id: str, number: int) -> None:
        """Make both, if they are not there."""
        owner = self.owner(number)
        (self._root / session_id).mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.paths(session_id):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                continue
            if owner is not None:
                os.chown(path, *owner)

    def files(self, session_id: str, number: int) -> WorkspaceFiles:
        """The files of the workspace; it is made if it is not there."""
        self.make(session_id, number)
        return WorkspaceFiles(Path(self.paths(session_id)[0]), owner=self.owner(number))

    def copy(self, source: tuple[str, int], target: tuple[str, int]) -> None:
        """Copy a session's workspace, as it is now, to a session that has none yet. Each is an id and a number."""
        files = self.files(*source)
        (self._root / target[0]).mkdir(mode=0o700, parents=True, exist_ok=True)
        files.copy_to(Path(self.paths(target[0])[0]), owner=self.owner(target[1]))
        self.make(*target)

    def remove(self, session_id: str) -> None:
        """Remove both, and all that is in them. Whoever writes there must be gone."""
        folder = self._root / session_id
        for _ in range(3):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                return
            # A folder its owner made unreadable.
            for path, names, _files in os.walk(folder):
                for name in names:
                    if not os.path.islink(os.path.join(path, name)):
                        os.chmod(os.path.join(path, name), 0o700)
        shutil.rmtree(folder)
