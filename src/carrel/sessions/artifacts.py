"""Artifacts, for callers: files that a session publishes, kept as they are at that moment, beside its workspace."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, BinaryIO

from carrel import abc
from carrel.errors import ArtifactNotFound, FileTooLarge, SessionNotFound
from carrel.model import Artifact, Principal, Session, new_id, utc_now
from carrel.sessions.keeper import Keeper
from carrel.sessions.kept import objects_of_session
from carrel.workspaces.files import WorkspaceFiles

__all__ = ["Artifacts"]

_CHUNK_BYTES = 1 << 20


class Artifacts:
    """What sessions have published."""

    def __init__(
        self,
        store: abc.Store,
        objects: abc.ObjectStore,
        keeper: Keeper,
        *,
        run_blocking: Callable[..., Any],
        max_bytes: int,
    ) -> None:
        """Make it over the parts that do the work; `max_bytes` bounds one artifact."""
        self._store = store
        self._objects = objects
        self._keeper = keeper
        self._run_blocking = run_blocking
        self._max_bytes = max_bytes

    async def publish(self, session: Session, files: WorkspaceFiles, path: str) -> Artifact:
        """Keep a file of the session's workspace as it is now.

        Raises:
            FileNotFound, NotAFile, InvalidPath, PathConflict: as reading the file does.
            FileTooLarge: it is larger than one artifact may be.
            ObjectStoreUnavailable: the object store is away.
        """
        artifact_id = new_id()
        key = f"{objects_of_session(session.id)}artifacts/{artifact_id}"
        file: BinaryIO = await self._run_blocking(files.open_read, path)
        try:
            size = os.fstat(file.fileno()).st_size
            if size > self._max_bytes:
                raise FileTooLarge(self._max_bytes)
            stored = await self._objects.put(key, self._chunks(file, size))
        finally:
            file.close()

        def work(tx: abc.Transaction) -> Artifact:
            if tx.sessions.get(session.id) is None:
                tx.doomed.add(key)
                return artifact
            tx.artifacts.add(artifact)
            return artifact

        artifact = Artifact(
            id=artifact_id,
            session_id=session.id,
            path=path,
            size=stored.size,
            sha256=stored.sha256 or "",
            key=key,
            created_at=utc_now(),
        )
        return await self._store.write(work)

    async def _chunks(self, file: BinaryIO, size: int) -> AsyncIterator[bytes]:
        """At most so many bytes: the agent may be changing the file at this moment."""
        left = size
        while left > 0:
            data = await asyncio.to_thread(file.read, min(left, _CHUNK_BYTES))
            if not data:
                return
            left -= len(data)
            yield data

    async def page(
        self, principal: Principal, session_id: str, *, cursor: str | None, limit: int
    ) -> abc.Page[Artifact]:
        """A session's artifacts, newest first. Raises InvalidCursor."""

        def work(tx: abc.Transaction) -> abc.Page[Artifact]:
            _session(tx, principal, session_id)
            return tx.artifacts.page(session_id, cursor=cursor, limit=limit)

        return await self._store.read(work)

    async def open(
        self, principal: Principal, session_id: str, artifact_id: str
    ) -> tuple[Artifact, AsyncIterator[bytes]]:
        """An artifact and its content, which is checked as it is read.

        Raises:
            ArtifactNotFound: there is none.
            ObjectStoreUnavailable, ObjectDamaged: it cannot be had; what was given out before is true.
        """
        artifact = await self._store.read(lambda tx: _artifact(tx, principal, session_id, artifact_id))
        await self._objects.stat(artifact.key)  # an error is told while there is still a status to tell it with
        return artifact, self._objects.get(artifact.key)

    async def delete(self, principal: Principal, session_id: str, artifact_id: str) -> None:
        """Delete an artifact; its object goes soon."""

        def work(tx: abc.Transaction) -> None:
            artifact = _artifact(tx, principal, session_id, artifact_id)
            tx.artifacts.remove(artifact.id)
            tx.doomed.add(artifact.key)

        await self._store.write(work)
        self._keeper.doomed()


def _session(tx: abc.Transaction, principal: Principal, session_id: str) -> Session:
    session = tx.sessions.get(session_id)
    if session is None or not principal.may_see(session):
        raise SessionNotFound
    return session


def _artifact(tx: abc.Transaction, principal: Principal, session_id: str, artifact_id: str) -> Artifact:
    _session(tx, principal, session_id)
    artifact = tx.artifacts.get(artifact_id)
    if artifact is None or artifact.session_id != session_id:
        raise ArtifactNotFound
    return artifact
