"""Keeps the files of sessions by the snapshots of `workspaces`, in an object store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from carrel import abc
from carrel.errors import CarrelError, Unavailable
from carrel.model import Session
from carrel.sessions.kept import Saved
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.folders import Folders
from carrel.workspaces.manifests import Change, Manifest
from carrel.workspaces.scanning import Tree
from carrel.workspaces.snapshots import Snapshots

__all__ = ["SnapshotVault"]

_TREE = "workspace"
_KNOWN = 32
_KNOWN_ENTRIES = 50_000


class SnapshotVault:
    """Snapshots of workspaces. Of those it has last seen it remembers the manifests, so that nothing new is cheap."""

    def __init__(self, objects: abc.ObjectStore, snapshots: Snapshots, folders: Folders) -> None:
        """Keep what is in `folders` in `objects`, by `snapshots`."""
        self._objects = objects
        self._snapshots = snapshots
        self._folders = folders
        self._known: OrderedDict[str, Manifest] = OrderedDict()

    async def save(self, session: Session, key: str, *, since: str | None) -> Saved | None:
        """Keep the session's workspace under a key. None where nothing has changed since the object `since`."""
        earlier = await self._earlier(since) if since is not None else None
        saved = await self._snapshots.save(_object(key), [self._tree(session)], since=earlier)
        manifest = saved.manifest
        if not saved.changed and since is not None:
            self._remember(since, manifest)
            return None
        self._remember(key, manifest)
        return Saved(size_bytes=manifest.size, stored_bytes=manifest.stored, files=len(manifest.entries))

    async def restore(self, session: Session, key: str, target: Path) -> None:
        """Put what was kept into a folder that is not there yet, and give it to the session's owner."""
        manifest = await self._snapshots.load(_object(key))
        files = WorkspaceFiles(target, owner=self._folders.owner(session), within=target.parent)
        files.make()
        await self._snapshots.restore(manifest, [Tree(_TREE, files)])

    async def changes(self, session: Session, key: str) -> list[Change]:
        """What is otherwise in the session's workspace than it was kept under the key; paths within the workspace."""
        manifest = await self._manifest(key)
        found = await self._snapshots.changes(manifest, [self._tree(session)])
        inside = f"{_TREE}/"
        return [replace(each, path=each.path[len(inside) :]) for each in found if each.path.startswith(inside)]

    async def read(self, key: str, path: str) -> AsyncIterator[bytes]:
        """The content of one file as it was kept. Raises FileNotFound, NotAFile."""
        manifest = await self._manifest(key)
        async for piece in self._snapshots.read(manifest, f"{_TREE}/{path}"):
            yield piece

    async def delete(self, prefix: str) -> None:
        """Delete every object in this folder, or the one of this name."""
        self._known.pop(prefix, None)
        name = prefix.rstrip("/")
        async for found in self._objects.list(name):
            await self._objects.delete(found.key)
        await self._objects.delete(name)

    def _tree(self, session: Session) -> Tree:
        workspace = self._folders.workspace(session)
        within = self._folders.within(session)
        return Tree(_TREE, WorkspaceFiles(workspace, owner=self._folders.owner(session), within=within))

    async def _earlier(self, key: str) -> Manifest | None:
        """The manifest to compare with; where it cannot be read, everything is kept anew."""
        try:
            return await self._manifest(key)
        except Unavailable:
            raise
        except CarrelError:
            return None

    async def _manifest(self, key: str) -> Manifest:
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        manifest = await self._snapshots.load(_object(key))
        self._remember(key, manifest)
        return manifest

    def _remember(self, key: str, manifest: Manifest) -> None:
        if len(manifest.entries) > _KNOWN_ENTRIES:
            self._known.pop(key, None)
            return
        self._known[key] = manifest
        self._known.move_to_end(key)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)


def _object(key: str) -> str:
    # A folder of its own, so that whatever belongs to it goes with it.
    return f"{key}/files"
