"""The blocking client's calls for files: workspaces, archives, snapshots, artifacts."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
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
    from carrel.client.blocking import _Wire

__all__ = ["Artifacts", "Files", "Snapshots", "Workspaces"]


class Files:
    """The files of a session's workspace, by their path relative to it."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def list(
        self, session_id: str, path: str = "", *, recursive: bool = True, page_size: int | None = None
    ) -> Iterator[FileEntry]:
        """Everything in the workspace, or below the folder `path`, sorted by path."""
        return self._wire.items(calls.list_files(session_id, path, recursive, page_size))

    def read(self, session_id: str, path: str) -> bytes:
        """A file's content."""
        return self._wire.send(calls.read_file(session_id, path))

    def write(self, session_id: str, path: str, content: bytes | str) -> FileEntry:
        """Write a file whole, making the folders it needs."""
        data = content.encode() if isinstance(content, str) else content
        return self._wire.send(calls.write_file(session_id, path, data))

    def delete(self, session_id: str, path: str) -> None:
        """Delete a file, or a folder with all that is in it."""
        self._wire.send(calls.delete_file(session_id, path))

    def unpack(
        self, session_id: str, content: bytes | Iterable[bytes], *, path: str = "", links: str = "refuse"
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
        return self._wire.send(calls.upload_archive(session_id, content, path, links))

    def pack(self, session_id: str, *, path: str = "", format: str = "tar.gz") -> Generator[bytes, None, None]:
        """The workspace, or one entry of it, as an archive, in pieces; `format`: tar, tar.gz, tar.zst or zip."""
        return self._wire.chunks(calls.download_archive(session_id, path, format))

    def diff(self, session_id: str, *, snapshot_id: str | None = None) -> Diff:
        """What has changed since a snapshot, by default the last one, by path and size."""
        return self._wire.send(calls.diff(session_id, snapshot_id))

    def patch(self, session_id: str) -> Patch:
        """What has changed since git's last commit, new files included. Raises NotARepository."""
        return self._wire.send(calls.patch(session_id))


class Snapshots:
    """What is kept of the files of sessions."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def list(self, session_id: str, *, page_size: int | None = None) -> Iterator[Snapshot]:
        """Every snapshot of the session, newest first."""
        return self._wire.items(calls.list_snapshots(session_id, page_size))

    def take(self, session_id: str) -> Snapshot:
        """Take one now."""
        return self._wire.send(calls.take_snapshot(session_id))

    def restore(self, session_id: str, snapshot_id: str) -> Session:
        """Put the session's files back to a snapshot; its conversation stays."""
        return self._wire.send(calls.restore_snapshot(session_id, snapshot_id))


class Artifacts:
    """Files that sessions publish: kept as they are at that moment."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def publish(self, session_id: str, path: str, *, idempotency_key: str | None = None) -> Artifact:
        """Keep a file of the workspace as it is now."""
        return self._wire.send(calls.create_artifact(session_id, path, idempotency_key))

    def list(self, session_id: str, *, page_size: int | None = None) -> Iterator[Artifact]:
        """Every artifact of the session, newest first."""
        return self._wire.items(calls.list_artifacts(session_id, page_size))

    def read(self, session_id: str, artifact_id: str) -> bytes:
        """An artifact's content."""
        return self._wire.send(calls.read_artifact(session_id, artifact_id))

    def delete(self, session_id: str, artifact_id: str) -> None:
        """Delete it for good."""
        self._wire.send(calls.delete_artifact(session_id, artifact_id))


class Workspaces:
    """Persistent workspaces: files that sessions open by a name, and that outlive them."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def create(self, name: str, *, idempotency_key: str | None = None, **options: Any) -> NamedWorkspace:
        """Make a workspace. `options`: mode (`lock` or `share`), quota_mb."""
        return self._wire.send(calls.create_workspace(name, options, idempotency_key))

    def get(self, workspace_id: str) -> NamedWorkspace:
        """The workspace as it is now."""
        return self._wire.send(calls.get_workspace(workspace_id))

    def list(self, *, page_size: int | None = None) -> Iterator[NamedWorkspace]:
        """Every workspace of the caller, newest first."""
        return self._wire.items(calls.list_workspaces(page_size))

    def update(self, workspace_id: str, **changes: Any) -> NamedWorkspace:
        """Change mode or quota_mb."""
        return self._wire.send(calls.update_workspace(workspace_id, changes))

    def delete(self, workspace_id: str) -> None:
        """Delete it for good, with its files. Raises WorkspaceInUse while sessions have it."""
        self._wire.send(calls.delete_workspace(workspace_id))
