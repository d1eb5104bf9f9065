"""What has changed in a session's workspace, for callers: since a snapshot, or since git's last commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from carrel import abc
from carrel.errors import SnapshotMissing, SnapshotNotFound
from carrel.model import Session, Snapshot
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.folders import Folders
from carrel.workspaces.git import Diff, diff
from carrel.workspaces.manifests import Change

__all__ = ["Compares", "Diffs"]


class Compares(Protocol):
    """Knows what was kept; `carrel.sessions.vault.SnapshotVault` is one."""

    async def changes(self, session: Session, key: str) -> list[Change]:
        """What is otherwise in the session's workspace than it was kept under the key; paths within the workspace."""


class Diffs:
    """Differences."""

    def __init__(
        self, store: abc.Store, vault: Compares | None, folders: Folders, *, run_blocking: Callable[..., Any]
    ) -> None:
        """Make it over the parts that do the work."""
        self._store = store
        self._vault = vault
        self._folders = folders
        self._run_blocking = run_blocking

    async def since_snapshot(self, session: Session, snapshot_id: str | None) -> tuple[Snapshot, Sequence[Change]]:
        """What is otherwise in the files than it was in a snapshot of the session, by default the last one.

        Raises:
            SnapshotNotFound: the session has no such snapshot.
            SnapshotMissing: it has none at all.
            Unavailable: the object store is away.
        """

        def find(tx: abc.Transaction) -> Snapshot | None:
            if snapshot_id is None:
                return next(iter(tx.snapshots.page(session.id, cursor=None, limit=1).items), None)
            found = tx.snapshots.get(snapshot_id)
            return found if found is not None and found.session_id == session.id else None

        snapshot = await self._store.read(find)
        if snapshot is None and snapshot_id is not None:
            raise SnapshotNotFound
        if snapshot is None or self._vault is None:
            raise SnapshotMissing("No snapshot of this session was kept yet.")
        return snapshot, await self._vault.changes(session, snapshot.key)

    async def since_commit(self, session: Session, files: WorkspaceFiles) -> Diff:
        """`git diff` against the last commit, with files that git does not know yet. Raises NotARepository."""
        found: Diff = await self._run_blocking(diff, files, self._folders.owner(session))
        return found
