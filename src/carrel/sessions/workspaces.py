"""Persistent workspaces, for callers: made, opened, bounded, deleted by their own call alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import structlog

from carrel import abc
from carrel.errors import WorkspaceExists, WorkspaceInUse, WorkspaceNotFound, WorkspaceOverQuota
from carrel.model import NamedWorkspace, Principal, RuleScope, Session, WorkspaceMode, new_id, utc_now
from carrel.workspaces.folders import Folders

__all__ = ["NamedWorkspaces", "check_quota", "objects_of_workspace", "open_workspace"]

log = structlog.get_logger(__name__)


class NamedWorkspaces:
    """Persistent workspaces."""

    def __init__(self, store: abc.Store, folders: Folders, *, run_blocking: Callable[..., Any]) -> None:
        """Look after the rows in `store` and the files in `folders`."""
        self._store = store
        self._folders = folders
        self._run_blocking = run_blocking

    async def create(
        self, principal: Principal, name: str, *, mode: WorkspaceMode, quota_mb: int | None
    ) -> NamedWorkspace:
        """Make a workspace. Raises WorkspaceExists."""

        def work(tx: abc.Transaction) -> NamedWorkspace:
            made = _make(tx, principal.user, name, utc_now(), mode=mode, quota_mb=quota_mb)
            if made is None:
                raise WorkspaceExists
            return made

        return await self._store.write(work)

    async def get(self, principal: Principal, workspace_id: str) -> NamedWorkspace:
        """The workspace. Raises WorkspaceNotFound, also for one of somebody else's."""
        return await self._store.read(lambda tx: _workspace(tx, principal, workspace_id))

    async def page(self, principal: Principal, *, cursor: str | None, limit: int) -> abc.Page[NamedWorkspace]:
        """The caller's workspaces (an admin's: everybody's), newest first. Raises InvalidCursor."""
        owner = None if principal.is_admin else principal.user
        return await self._store.read(lambda tx: tx.workspaces.page(owner, cursor=cursor, limit=limit))

    async def update(self, principal: Principal, workspace_id: str, **changes: Any) -> NamedWorkspace:
        """Change its mode or its quota.

        Raises:
            WorkspaceInUse: only one session is to work in it at once, and several do.
        """

        def work(tx: abc.Transaction) -> NamedWorkspace:
            workspace = _workspace(tx, principal, workspace_id)
            if changes.get("mode") is WorkspaceMode.LOCK and len(tx.sandboxes.in_workspace(workspace_id)) > 1:
                raise WorkspaceInUse("Several sessions are at work in it; let all but one come to rest first.")
            return tx.workspaces.update(workspace_id, **changes) if changes else workspace

        return await self._store.write(work)

    async def delete(self, principal: Principal, workspace_id: str) -> None:
        """Delete a workspace for good, with its files and snapshots.

        Raises:
            WorkspaceInUse: sessions have it.
        """

        def work(tx: abc.Transaction) -> None:
            _workspace(tx, principal, workspace_id)
            sessions = tx.workspaces.sessions(workspace_id)
            if sessions:
                raise WorkspaceInUse(sessions=list(sessions[:100]))
            tx.workspaces.update(workspace_id, deleting=True)

        await self._store.write(work)
        await self._remove(workspace_id)

    async def finish_deletions(self) -> None:
        """Remove what is left of workspaces whose deletion was begun and broke off."""
        for workspace_id in await self._store.read(lambda tx: list(tx.workspaces.deleting())):
            await self._remove(workspace_id)

    async def _remove(self, workspace_id: str) -> None:
        await self._run_blocking(self._folders.remove_workspace, workspace_id)

        def work(tx: abc.Transaction) -> None:
            tx.snapshots.remove([each.id for each in tx.snapshots.of_files(workspace_id=workspace_id)])
            tx.doomed.add(objects_of_workspace(workspace_id))
            tx.rules.forget(RuleScope.WORKSPACE, workspace_id)
            tx.workspaces.remove(workspace_id)

        await self._store.write(work)

    async def room(self, session: Session) -> int | None:
        """How many bytes its persistent workspace may still take; None: no limit. Looks at the files."""
        workspace = await self.measure(session)
        if workspace is None or workspace.quota_mb is None:
            return None
        return max(0, workspace.quota_mb * 2**20 - (workspace.size_bytes or 0))

    async def measure(self, session: Session) -> NamedWorkspace | None:
        """Look at what its persistent workspace takes now, if it has one with a quota."""
        workspace_id = session.workspace_id
        if workspace_id is None:
            return None
        workspace = await self._store.read(lambda tx: tx.workspaces.get(workspace_id))
        if workspace is None or workspace.quota_mb is None:
            return workspace
        size: int = await self._run_blocking(self._folders.size, session)
        return await self._store.write(lambda tx: tx.workspaces.update(workspace_id, size_bytes=size))


def objects_of_workspace(workspace_id: str) -> str:
    """What the keys of all its objects begin with."""
    return f"workspaces/{workspace_id}/"


def open_workspace(tx: abc.Transaction, owner: str, name: str, now: datetime) -> NamedWorkspace:
    """The user's workspace of this name, made now where there is none.

    Raises:
        WorkspaceInUse: one of this name is being deleted at this moment.
    """
    found = tx.workspaces.named(owner, name)
    if found is not None:
        return tx.workspaces.update(found.id, last_used_at=now)
    made = _make(tx, owner, name, now) or tx.workspaces.named(owner, name)
    if made is None:
        raise WorkspaceInUse("A workspace of this name is being deleted; try again.")
    return made


def check_quota(tx: abc.Transaction, session: Session) -> None:
    """Go on only if the session's workspace held no more than it may when it was last looked at."""
    workspace = tx.workspaces.get(session.workspace_id) if session.workspace_id is not None else None
    if workspace is not None and workspace.over_quota:
        raise WorkspaceOverQuota(size_bytes=workspace.size_bytes, quota_mb=workspace.quota_mb)


def _make(
    tx: abc.Transaction,
    owner: str,
    name: str,
    now: datetime,
    *,
    mode: WorkspaceMode = WorkspaceMode.LOCK,
    quota_mb: int | None = None,
) -> NamedWorkspace | None:
    workspace = NamedWorkspace(
        id=new_id(),
        owner=owner,
        name=name,
        mode=mode,
        quota_mb=quota_mb,
        number=tx.sessions.next_number(),
        created_at=now,
        last_used_at=now,
    )
    return workspace if tx.workspaces.add(workspace) else None


def _workspace(tx: abc.Transaction, principal: Principal, workspace_id: str) -> NamedWorkspace:
    workspace = tx.workspaces.get(workspace_id)
    if workspace is None or not (principal.is_admin or workspace.owner == principal.user):
        raise WorkspaceNotFound
    return workspace
