"""Archives, for callers: a workspace, or a folder of it, as one; and one from outside unpacked into it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from carrel import abc
from carrel.errors import ArchiveTooLarge, FileTooLarge, SessionNotFound, WorkspaceOverQuota
from carrel.model import Principal, Session
from carrel.protocol.events import WorkspaceUnpacked
from carrel.sessions import transitions
from carrel.sessions.keeper import Keeper
from carrel.sessions.kept import check_at_rest
from carrel.sessions.workspaces import NamedWorkspaces, check_quota
from carrel.workspaces.archives import ArchiveFormat, ArchiveLimits, Unpacked, pack, unpack
from carrel.workspaces.files import WorkspaceFiles
from carrel.workspaces.folders import Folders
from carrel.workspaces.threads import in_thread, stepwise

__all__ = ["ArchiveBounds", "Archives"]


@dataclass(frozen=True, kw_only=True)
class ArchiveBounds:
    """How large archives may be."""

    upload_bytes: int
    """One as it comes."""
    unpacked_bytes: int
    """What it holds, and what a workspace that is fetched as one may hold."""


class Archives:
    """Workspaces as archives."""

    def __init__(
        self,
        store: abc.Store,
        keeper: Keeper,
        folders: Folders,
        workspaces: NamedWorkspaces,
        *,
        run_blocking: Callable[..., Any],
        bounds: ArchiveBounds,
    ) -> None:
        """Make it over the parts that do the work."""
        self._store = store
        self._keeper = keeper
        self._folders = folders
        self._workspaces = workspaces
        self._run_blocking = run_blocking
        self._bounds = bounds

    async def unpack(
        self,
        principal: Principal,
        session_id: str,
        content: AsyncIterator[bytes],
        *,
        path: str = "",
        leave_out_links: bool = False,
    ) -> Unpacked:
        """Unpack an archive into the session's workspace, once it is here whole; turns wait meanwhile.

        What stands there already is replaced file by file, and the rest stays. When it fails, what was unpacked so far remains.

        Args:
            principal: who asks.
            session_id: the session.
            content: a tar (plain, gzip, zstd) or a zip.
            path: the folder of the workspace it is unpacked into, made if it is not there.
            leave_out_links: whether links that lead out of that folder are left out rather than refused.

        Raises:
            TurnAtWork: a turn of the session waits or is at work.
            FileTooLarge, ArchiveTooLarge, WorkspaceOverQuota: there is too much of it.
            ArchiveInvalid, InvalidPath, PathConflict: it cannot be unpacked there.
            Unavailable: the session's files are lost here, and the object store is away.
        """
        session = await self._store.read(lambda tx: _at_rest(tx, principal, session_id))
        spool: BinaryIO = await self._run_blocking(self._folders.spool, session)
        with spool:
            await self._receive(spool, content)
            async with self._keeper.filling(session):
                room = await self._workspaces.room(session)
                most = self._bounds.unpacked_bytes if room is None else min(room, self._bounds.unpacked_bytes)
                files: WorkspaceFiles = await self._run_blocking(self._folders.files, session)
                try:
                    # Cancelled, it waits for the thread: no turn may begin before that has ended.
                    done = await in_thread(
                        lambda: unpack(
                            spool, files, ArchiveLimits(max_bytes=most), path=path, leave_out_links=leave_out_links
                        )
                    )
                except ArchiveTooLarge as error:
                    if room is None or error.context["limit"] != room:
                        raise
                    raise WorkspaceOverQuota(room_bytes=room) from None
                finally:
                    await self._workspaces.measure(session)
                told = WorkspaceUnpacked(path=path, members=done.members, bytes=done.bytes)
                await self._store.write(lambda tx: _tell(tx, session_id, told))
        return done

    async def _receive(self, spool: BinaryIO, content: AsyncIterator[bytes]) -> None:
        size = 0
        async for chunk in content:
            size += len(chunk)
            if size > self._bounds.upload_bytes:
                raise FileTooLarge(self._bounds.upload_bytes)
            await self._run_blocking(spool.write, chunk)
        await self._run_blocking(spool.seek, 0)

    async def pack(
        self, principal: Principal, session_id: str, form: ArchiveFormat, *, path: str = ""
    ) -> AsyncIterator[bytes]:
        """The session's workspace, or one entry of it, as an archive. The agent may be at work.

        Raises:
            ArchiveTooLarge: the workspace holds more than may be fetched at once.
            FileNotFound, InvalidPath, PathConflict: there is no such entry.
            Unavailable: as `unpack`.
        """
        session = await self._store.read(lambda tx: _session(tx, principal, session_id))
        await self._keeper.ensure(session)
        files: WorkspaceFiles = await self._run_blocking(self._folders.files, session)
        limits = ArchiveLimits(max_bytes=self._bounds.unpacked_bytes, max_members=1_000_000)
        if not path and await self._run_blocking(files.size) > limits.max_bytes:
            raise ArchiveTooLarge("bytes", limits.max_bytes)
        if path:
            await self._run_blocking(files.stat, path)
        return stepwise(pack(files, form, limits, path=path))


def _session(tx: abc.Transaction, principal: Principal, session_id: str) -> Session:
    session = tx.sessions.get(session_id)
    if session is None or not principal.may_see(session):
        raise SessionNotFound
    return session


def _at_rest(tx: abc.Transaction, principal: Principal, session_id: str) -> Session:
    """The session, if its files may be filled: told before the archive is sent, and looked at again after."""
    session = _session(tx, principal, session_id)
    check_at_rest(tx, session)
    check_quota(tx, session)
    return session


def _tell(tx: abc.Transaction, session_id: str, told: WorkspaceUnpacked) -> None:
    if tx.sessions.get(session_id) is not None:
        transitions.emit(tx, session_id, told)
