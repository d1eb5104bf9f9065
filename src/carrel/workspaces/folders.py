"""The folders of each session: its workspace and its agent's home."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from carrel.errors import FileNotFound, WorkspaceMissing
from carrel.model import Session
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.user_config import has_user_config, show_user_config


class Folders:
    """A folder per session under one root, a directory per user under another, persistent workspaces under a third."""

    def __init__(
        self,
        root: Path,
        *,
        users: Path,
        workspaces: Path,
        first_uid: int | None,
        make_user_directories: bool = True,
        environments: Path | None = None,
    ) -> None:
        """Look after the folders under `root`, `users` and `workspaces`.

        Args:
            root: made when it is not there; private to us.
            users: the same, for the directories of users.
            workspaces: the same, for persistent workspaces.
            first_uid: where each session has a user of its own, the first of their ids; None where all are ours.
            make_user_directories: whether a user's directory that is not there is made.
            environments: where what is set up for environments lies, by their names; it need not be there.
        """
        self._root = root
        self._users = users
        self._workspaces = workspaces
        self._first_uid = first_uid
        self._make_user_directories = make_user_directories
        self._environments = environments

    def workspace(self, session: Session) -> Path:
        """Where the session's files are."""
        if session.workspace.type == "user":
            return self._users / session.owner / (session.workspace.subdir or "")
        if session.workspace_id is not None:
            return self._workspaces / session.workspace_id / "files"
        return self._root / (session.files_of or session.id) / "workspace"

    def within(self, session: Session) -> Path | None:
        """The last folder above the workspace that no agent can change; None where that is the workspace itself."""
        return self._users if session.workspace.type == "user" else None

    def home(self, session: Session) -> Path:
        """The agent's home."""
        return self._root / session.id / "home"

    def owner(self, session: Session) -> tuple[int, int] | None:
        """The user and group that the files of this session belong to; None for our own."""
        if self._first_uid is None:
            return None
        uid = self._first_uid + (session.uid_number or session.number)
        return uid, uid

    def make(self, session: Session) -> None:
        """Make both, if they are not there, and show the agent what is set up for its user and its environment.

        No agent of the session may be at work.

        Raises:
            WorkspaceMissing: the user's directory is not there, and none is made.
        """
        self._make_both(session)
        sources: dict[str, WorkspaceFiles] = {}
        if session.reserved is None:  # else nobody's yet: what a user has set up is shown to sessions of theirs alone
            sources["user"] = WorkspaceFiles(self._users / session.owner, within=self._users)
        if self._environments is not None:
            sources[f"environment {session.environment}"] = WorkspaceFiles(self._environments / session.environment)
        show_user_config(
            sources,
            WorkspaceFiles(self.home(session), owner=self.owner(session)),
            self._root / session.id / "user-config.json",
        )

    def shows(self, user: str) -> bool:
        """Whether the user has set up anything that each agent of theirs is shown."""
        return has_user_config(WorkspaceFiles(self._users / user, within=self._users))

    def _make_both(self, session: Session) -> None:
        (self._root / session.id).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make(self.home(session), self.owner(session))
        if session.workspace.type == "user":
            self.check(session)
        elif session.files_of is None or not self.workspace(session).is_dir():
            self.workspace(session).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make(self.workspace(session), self.owner(session))

    def check(self, session: Session) -> None:
        """Make sure that the workspace of a session that is to be made can be used. Raises WorkspaceMissing."""
        if session.workspace.type != "user":
            return
        self._users.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = self._files(session)
        if self._make_user_directories:
            files.make()
            return
        try:
            files.stat("")
        except FileNotFound as error:
            raise WorkspaceMissing from error

    def _make(self, path: Path, owner: tuple[int, int] | None) -> None:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            return
        if owner is not None:
            os.chown(path, *owner)

    def _files(self, session: Session) -> WorkspaceFiles:
        return WorkspaceFiles(self.workspace(session), owner=self.owner(session), within=self.within(session))

    def files(self, session: Session) -> WorkspaceFiles:
        """The files of the workspace; it is made if it is not there."""
        self._make_both(session)
        return self._files(session)

    def there(self, session: Session) -> bool:
        """Whether its workspace is there."""
        return self.workspace(session).is_dir()

    def staged(self, session: Session) -> Path:
        """Where files are put that are to take the place of its own workspace; out of every agent's reach."""
        return self.workspace(session).with_name("staged")

    def clear_staged(self, session: Session) -> None:
        """Remove what was left there."""
        staged = self.staged(session)
        _remove(staged)
        staged.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def adopt(self, session: Session) -> None:
        """Have what was staged take the place of its workspace, if anything was. Safe to repeat. No agent may be there."""
        staged, place = self.staged(session), self.workspace(session)
        replaced = place.with_name("replaced")
        if staged.is_dir():
            _remove(replaced)
            if place.exists():
                place.rename(replaced)
            staged.rename(place)
        _remove(replaced)

    def spool(self, session: Session) -> BinaryIO:
        """A file without a name on the same disk, out of every agent's reach; it goes when it is closed."""
        private = self._root / session.id
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=private)

    def size(self, session: Session) -> int:
        """How many bytes the files of its workspace take."""
        return self.files(session).size()

    def taken(self, session: Session) -> int:
        """How many bytes the files of its workspace and of its agent's home take. Raises where one is not there."""
        return self._files(session).size() + WorkspaceFiles(self.home(session)).size()

    def copy(self, source: Session, target: Session) -> None:
        """Copy a session's workspace, as it is now, to a session that has none yet. What outlives them is shared."""
        if target.workspace.is_own:
            (self._root / target.id).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.files(source).copy_to(self.workspace(target), owner=self.owner(target))
        self.make(target)

    def clone(self, source: Session, target: Session) -> None:
        """Copy a session's workspace to one that has none yet, and keep another copy beside it for `base`."""
        folder = self._root / target.id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.files(source).copy_to(folder / "workspace", owner=self.owner(target))
        self._files(target).copy_to(folder / "base", owner=self.owner(target))
        self.make(target)

    def base(self, session: Session) -> WorkspaceFiles | None:
        """The files of a clone as they were when it was made, out of its agent's reach; None where they are lost."""
        path = self._root / session.id / "base"
        return WorkspaceFiles(path, owner=self.owner(session)) if path.is_dir() else None

    def remove(self, session_id: str) -> None:
        """Remove what is the session's alone, and all that is in it. Whoever writes there must be gone."""
        _remove(self._root / session_id)

    def remove_workspace(self, workspace_id: str) -> None:
        """Remove a persistent workspace. Whoever writes there must be gone."""
        _remove(self._workspaces / workspace_id)


def _remove(folder: Path) -> None:
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
