"""The asynchronous client's calls for files: workspaces, archives, snapshots, artifacts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import TYPE_CHECKING, Any

from carrel.client import calls
from carrel.client.types import (
    Artifact,
    Diff,
    FileEntry,
    NamedWorkspace,
    Patch,
    Session,
    Snapshot,
    UnpackedArchive,
)

if TYPE_CHECKING:
    from carrel.client.asynchronous import _Wire

__all__ = ["AsyncArtifacts", "AsyncFiles", "AsyncSnapshots", "AsyncWorkspaces"]


class AsyncFiles:
    """The files of a session's workspace, by their path relative to it."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def list(
        self, session_id: str, path: str = "", *, recursive: bool = True, page_size: int | None = None
    ) -> AsyncIterator[FileEntry]:
        """Everything in the workspace, or below the folder `path`, sorted by path."""
        return self._wire.items(calls.list_files(session_id, path, recursive, page_size))

    async def read(self, session_id: str, path: str) -> bytes:
        """A file's content."""
        return await self._wire.send(calls.read_file(session_id, path))

    async def write(self, session_id: str, path: str, content: bytes | str) -> FileEntry:
        """Write a file whole, making the folders it needs."""
        data = content.encode() if isinstance(content, str) else content
        return await self._wire.send(calls.write_file(session_id, path, data))

    async def delete(self, session_id: str, path: str) -> None:
        """Delete a file, or a folder with all that is in it."""
        await self._wire.send(calls.delete_file(session_id, path))

    async def unpack(
        self, session_id: str, content: bytes | AsyncIterable[bytes], *, path: str = "", links: str = "refuse"
    ) -> UnpackedArchive:
        """Unpack a tar (plain, gzip, zstd) or a zip into the workspace, or into the folder `path` of it.

        Args:
            session_id: the session; no turn of it may wait or be at work.
            content: the archive, whole or in pieces.
            path: a folder of the workspace, made if it is not there.
            links: `refuse` an archive with links that lead out of the folder, or `leave-out` such links.

        Raises:
            TurnAtWork: a turn waits or is at work.
            ArchiveInvalid, ArchiveTooLarge, WorkspaceOverQuota: it may not be unpacked.
        """
        return await self._wire.send(calls.upload_archive(session_id, content, path, links))

    def pack(self, session_id: str, *, path: str = "", format: str = "tar.gz") -> AsyncGenerator[bytes, None]:
        """The workspace, or one entry of it, as an archive, in pieces; `format`: tar, tar.gz, tar.zst or zip."""
        return self._wire.chunks(calls.download_archive(session_id, path, format))

    async def diff(self, session_id: str, *, snapshot_id: str | None = None) -> Diff:
        """What has changed since a snapshot, by default the last one, by path and size."""
        return await self._wire.send(calls.diff(session_id, snapshot_id))

    async def patch(self, session_id: str) -> Patch:
        """What has changed since git's last commit, new files included. Raises NotARepository."""
        return await self._wire.send(calls.patch(session_id))


class AsyncSnapshots:
    """What is kept of the files of sessions."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def list(self, session_id: str, *, page_size: int | None = None) -> AsyncIterator[Snapshot]:
        """Every snapshot of the session, newest first."""
        return self._wire.items(calls.list_snapshots(session_id, page_size))

    async def take(self, session_id: str) -> Snapshot:
        """Take one now."""
        return await self._wire.send(calls.take_snapshot(session_id))

    async def restore(self, session_id: str, snapshot_id: str) -> Session:
        """Put the session's files back to a snapshot; its conversation stays."""
        return await self._wire.send(calls.restore_snapshot(session_id, snapshot_id))


class AsyncArtifacts:
    """Files that sessions publish: kept as they are at that moment."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    async def publish(self, session_id: str, path: str, *, idempotency_key: str | None = None) -> Artifact:
        """Keep a file of the workspace as it is now."""
        return await self._wire.send(calls.create_artifact(session_id, path, idempotency_key))

    def list(self, session_id: str, *, page_size: int | None = None) -> AsyncIterator[Artifact]:
        """Every artifact of the session, newest first."""
        return self._wire.items(calls.list_artifacts(session_id, page_size))

    async def read(self, session_id: str, artifact_id: str) -> bytes:
        """An artifact's content."""
        return await self._wire.send(calls.read_artifact(session_id, artifact_id))

    async def delete(self, session_id: str, artifact_id: str) -> None:
        """Delete it for good."""
        await self._wire.send(calls.delete_artifact(session_id, artifact_id))


class AsyncWorkspaces:
    """Persistent workspaces: files that sessions open by a name, and that outlive them."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    async def create(self, name: str, *, idempotency_key: str | None = None, **options: Any) -> NamedWorkspace:
        """Make a workspace. `options`: mode (`lock` or `share`), quota_mb."""
        return await self._wire.send(calls.create_workspace(name, options, idempotency_key))

    async def get(self, workspace_id: str) -> NamedWorkspace:
        """The workspace as it is now."""
        return await self._wire.send(calls.get_workspace(workspace_id))

    def list(self, *, page_size: int | None = None) -> AsyncIterator[NamedWorkspace]:
        """Every workspace of the caller, newest first."""
        return self._wire.items(calls.list_workspaces(page_size))

    async def update(self, workspace_id: str, **changes: Any) -> NamedWorkspace:
        """Change mode or quota_mb."""
        return await self._wire.send(calls.update_workspace(workspace_id, changes))

    async def delete(self, workspace_id: str) -> None:
        """Delete it for good, with its files. Raises WorkspaceInUse while sessions have it."""
        await self._wire.send(calls.delete_workspace(workspace_id))
