"""Keeps the files of sessions outside of the host that has them, and puts them back where they are lost.

What is to be done stands in the rows: a session whose files are still to be kept says so (`snapshot_due`), and so do
objects that are still to be deleted. So a restart, and an object store that is away, only make it later.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from carrel import abc
from carrel.errors import CarrelError, SessionNotFound, SnapshotMissing, StoreUnavailable, TurnAtWork, Unavailable
from carrel.killpoints import reached
from carrel.model import NamedWorkspace, Session, Snapshot, SnapshotReason, new_id, utc_now
from carrel.protocol import events
from carrel.protocol.events import StoredEvent
from carrel.sessions import steps, transitions
from carrel.sessions.cloning import Cloner, CloneRules
from carrel.sessions.kept import (
    Vault,
    begin_filling,
    kept_of,
    newest_of,
    no_longer_due,
    objects_of_files,
    prune,
    remove_snapshots,
    snapshot_of,
    tell,
)
from carrel.workspaces.folders import Folders
from carrel.workspaces.pruning import KeepRules

__all__ = ["Keeper"]

log = structlog.get_logger(__name__)

RELEASE = SnapshotReason.RELEASE.value
FORK = SnapshotReason.FORK.value
UPLOAD = SnapshotReason.UPLOAD.value

_AT_ONCE = 2
_HOLD_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_SWEEP_SECONDS = 30.0
_BATCH = 100
_OLD_SECONDS = 600.0


class Keeper:
    """Takes snapshots in the background, puts them back, and deletes what nothing refers to."""

    def __init__(
        self,
        store: abc.Store,
        folders: Folders,
        vault: Vault | None,
        poke: Callable[[str], None],
        *,
        run_blocking: Callable[..., Any],
        rules: KeepRules = KeepRules(),
        cloner: Cloner | None = None,
    ) -> None:
        """Make the keeper; nothing runs before `start`.

        Args:
            store: the rows.
            folders: the files.
            vault: where they are kept; None: nowhere.
            poke: told the session's id whenever its next turn need not wait any more.
            run_blocking: runs a function that waits for the disk in another thread.
            cloner: fetches what workspaces begin with; None: every one begins empty.
            rules: which snapshots go in the course of time.
        """
        self._store = store
        self._folders = folders
        self._vault = vault
        self._poke = poke
        self._run_blocking = run_blocking
        self._rules = rules
        self._swept_at = -math.inf
        self.cloner = cloner or Cloner(store, folders, CloneRules())
        self._ensuring: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._work: dict[str, asyncio.Task[None]] = {}
        self._reading: dict[str, float] = {}
        self._filling: set[str] = set()
        self._told: set[str] = set()
        self._locks: dict[str, _Lock] = defaultdict(_Lock)
        self._doomed = asyncio.Event()
        self._deleting: asyncio.Task[None] | None = None
        self._closed = True

    async def start(self, exit_stack: AsyncExitStack) -> None:
        """Take up what is still to be done, and go on; closing is registered with `exit_stack`."""
        self._closed = False
        exit_stack.push_async_callback(self._close)
        await self.sweep()
        if self._vault is not None:
            self._deleting = asyncio.create_task(self._delete_doomed(self._vault), name="doomed objects")

    @property
    def keeps(self) -> bool:
        """Whether files are kept at all."""
        return self._vault is not None

    async def sweep(self) -> None:
        """Look after every session whose files are still to be kept."""
        for session_id in await self._store.read(lambda tx: list(tx.snapshots.due())):
            self.wake(session_id)

    def heard(self, stored: Sequence[StoredEvent]) -> None:
        """Events were committed: after the end of a turn its files are kept."""
        for event in stored:
            if event.type == "turn.completed":
                if self._vault is not None and not self._closed and event.session_id not in self._told:
                    self._reading[event.session_id] = time.monotonic()
                self.wake(event.session_id)
            elif event.type == "child.ended":
                self.wake(event.session_id)  # they may work on the same files

    def holds(self, session_id: str) -> bool:
        """Whether the next turn should wait: while the files are brought in, or read, the latter for a while and no more."""
        if session_id in self._filling:
            return True
        since = self._reading.get(session_id)
        return since is not None and time.monotonic() - since < _HOLD_SECONDS

    def wake(self, session_id: str) -> None:
        """Have the session's files kept soon, if they are still to be."""
        if self._closed or session_id in self._work:
            return
        self._work[session_id] = asyncio.create_task(self._keep(session_id), name=f"snapshot {session_id}")

    async def settled(self, session_id: str, seconds: float) -> bool:
        """Wait until nothing of the session is still to be kept. False where that takes too long, or cannot be now."""
        self.wake(session_id)
        task = self._work.get(session_id)
        if task is not None and session_id not in self._told:
            await asyncio.wait([task], timeout=seconds)
        session = await self._store.read(lambda tx: tx.sessions.get(session_id))
        return session is None or session.snapshot_due is None

    async def all_settled(self, seconds: float) -> None:
        """Give what is under way some time to finish."""
        if self._work:
            await asyncio.wait(self._work.values(), timeout=seconds)

    async def forget(self, session_id: str) -> None:
        """Stop all work for a session that is being deleted."""
        for work in (self._work, self._ensuring):
            task = work.pop(session_id, None)
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._told.discard(session_id)

    # ------------------------------------------------------------------------------------------------------- keeping

    async def _keep(self, session_id: str) -> None:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(session_id=session_id)
        pause = _FIRST_PAUSE_SECONDS
        try:
            while True:
                try:
                    async with self._places:
                        if not await self._keep_once(session_id):
                            return
                except Unavailable as error:
                    await self._failed(session_id, error)
                except (CarrelError, OSError) as error:
                    log.warning("snapshot.failed", error=repr(error))
                    told = error if isinstance(error, CarrelError) else CarrelError("The files could not be read.")
                    await self._failed(session_id, told)
                else:
                    pause = _FIRST_PAUSE_SECONDS
                    continue
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        finally:
            self._read(session_id)
            if self._work.get(session_id) is asyncio.current_task():
                del self._work[session_id]

    def _read(self, session_id: str) -> None:
        if self._reading.pop(session_id, None) is not None:
            self._poke(session_id)

    async def _keep_once(self, session_id: str) -> bool:
        """Keep the files once, if they are still to be. Whether to look again."""
        session = await self._store.read(lambda tx: tx.sessions.get(session_id))
        if session is None or session.snapshot_due is None:
            return False
        due = session.snapshot_due
        await self._hold_to_quota(session, due)
        if self._vault is None or session.workspace.type == "user" or session.files_of is not None:
            await self._store.write(lambda tx: no_longer_due(tx, session_id, due))
            return True
        with contextlib.suppress(SnapshotMissing):  # they come back before the next turn
            await self.take(session, due)
        return True

    async def take(self, session: Session, due: str) -> Snapshot:
        """Take a snapshot now, for what it is due for: the id of a turn, or another reason.

        Raises:
            Unavailable: the object store is away, or there is none.
            SnapshotMissing: the files are not there.
        """
        if self._vault is None:
            raise Unavailable("This server keeps no snapshots.")
        busy, newest = await self._store.read(lambda tx: (tx.turns.live(session.id), newest_of(tx, session)))
        key = f"{objects_of_files(session)}snapshots/{new_id()}"
        since = newest.key if newest is not None else None
        try:
            async with self.changing(session):
                if not await self._run_blocking(self._folders.there, session):
                    # Nothing would take the place of what was kept before.
                    await self._store.write(lambda tx: no_longer_due(tx, session.id, due))
                    raise SnapshotMissing("The files of the session are not there.")
                saved = await self._vault.save(session, key, since=since)
        finally:
            self._read(session.id)

        def work(tx: abc.Transaction) -> Snapshot:
            now = tx.sessions.get(session.id)
            if now is None:
                tx.doomed.add(key)
                raise _Gone
            exact = busy is None and tx.turns.live(session.id) is None and now.snapshot_due in (due, None)
            snapshot = snapshot_of(tx, now, due, key, saved, newest, exact=exact)
            if saved is None and newest is not None and due == RELEASE:
                snapshot = newest  # nothing has changed, and nobody will ask for this one
            else:
                tx.snapshots.add(snapshot)
            no_longer_due(tx, session.id, due)
            prune(tx, now, self._rules)
            return snapshot

        try:
            snapshot = await self._store.write(work)
        except _Gone:
            raise CarrelError("The session is gone.") from None
        self._told.discard(session.id)
        self._doomed.set()
        return snapshot

    async def _failed(self, session_id: str, error: CarrelError) -> None:
        """Say once that the files cannot be kept; turns go on all the same."""
        self._read(session_id)
        if session_id in self._told or isinstance(error, StoreUnavailable):
            return
        self._told.add(session_id)
        log.warning("snapshot.failed", code=error.code, detail=error.operator_detail)
        failed = events.WorkspaceSnapshotFailed(code=error.code, message=error.message)
        with contextlib.suppress(CarrelError):  # deleted meanwhile, or the store is away too
            await self._store.write(lambda tx: transitions.emit(tx, session_id, failed))

    async def _hold_to_quota(self, session: Session, due: str) -> None:
        workspace_id = session.workspace_id
        workspace = await self._store.read(lambda tx: tx.workspaces.get(workspace_id)) if workspace_id else None
        if workspace is None or workspace.quota_mb is None:
            return
        size: int = await self._run_blocking(self._folders.size, session)

        def work(tx: abc.Transaction) -> NamedWorkspace:
            changed = tx.workspaces.update(workspace.id, size_bytes=size)
            if changed.over_quota and changed.quota_mb is not None and tx.turns.get(due) is not None:
                grown = events.WorkspaceQuotaExceeded(size_bytes=size, quota_mb=changed.quota_mb)
                transitions.emit(tx, session.id, grown, turn_id=due)
            return changed

        await self._store.write(work)

    # ------------------------------------------------------------------------------------------------- putting back

    @contextlib.asynccontextmanager
    async def changing(self, session: Session) -> AsyncIterator[None]:
        """Nobody else reads or replaces the session's folder as a whole meanwhile."""
        key = str(self._folders.workspace(session))
        lock = self._locks[key]
        lock.users += 1
        try:
            async with lock.lock:
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[key]

    @contextlib.asynccontextmanager
    async def filling(self, session: Session) -> AsyncIterator[None]:
        """The session's files are there, no turn of it begins meanwhile, and they are kept afterwards.

        Raises:
            TurnAtWork: a turn waits or is at work in its files, or somebody else is filling them.
            Unavailable: as `ensure`.
        """
        if session.id in self._filling:
            raise TurnAtWork("Files are being brought into this session already; wait until that is done.")
        self._filling.add(session.id)
        try:
            # In one that writes: a turn that is being started at this moment is seen, or sees that it has to wait.
            await self._store.write(lambda tx: begin_filling(tx, session.id, UPLOAD))
            await self.ensure(session)
            async with self.changing(session):
                yield
        finally:
            self._filling.discard(session.id)
            self.wake(session.id)
            self._poke(session.id)

    async def ensure(self, session: Session) -> None:
        """Have the session's files there: where the folder is gone, the last snapshot is put in its place.

        No agent of the session may be at work.

        Raises:
            Unavailable: the object store is away; nothing has changed, and it can be tried again.
            CloneFailed, SecretMissing: what it begins with cannot be had; likewise.
        """
        if session.workspace.repo is None:
            await self._ensure_alone(session)
            return
        task = self._task(session)
        await asyncio.wait([task])  # it is not this caller's alone, and ends with the session
        if task.cancelled():
            raise SessionNotFound
        self._ensuring.pop(session.id, None)
        await task

    async def ensured(self, session: Session, seconds: float) -> bool:
        """As `ensure`, and for so long at most: False where it takes longer. It goes on then, and pokes when it is done."""
        task = self._task(session)
        await asyncio.wait([task], timeout=seconds)
        if not task.done() or task.cancelled():
            return False
        self._ensuring.pop(session.id, None)
        await task
        return True

    def _task(self, session: Session) -> asyncio.Task[None]:
        """What has the session's files there; one at a time."""
        task = self._ensuring.get(session.id)
        if task is None:
            task = asyncio.create_task(self._ensure_alone(session), name=f"files of {session.id}")
            self._ensuring[session.id] = task
            task.add_done_callback(lambda task: self._ensured(session.id, task))
        return task

    async def _ensure_alone(self, session: Session) -> None:
        if session.files_of is not None:
            owner = session.files_of
            found = await self._store.read(lambda tx: tx.sessions.get(owner))
            if found is None:
                return
            session = found
        async with self.changing(session):
            await self._ensure(session)

    def _ensured(self, session_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # whoever looks next is told; nobody may, where the session was stopped meanwhile
        self._poke(session_id)

    async def _ensure(self, session: Session) -> None:
        if session.workspace.type == "user":
            return
        if session.restoring is not None:
            await self._run_blocking(self._folders.adopt, session)
        if not await self._run_blocking(self._folders.there, session):
            await self._bring_back(session)

    async def _bring_back(self, session: Session) -> None:
        kept = await self._store.read(lambda tx: list(kept_of(tx, session)))
        if not kept and session.generation == 0:
            if session.workspace.repo is not None:
                cloned = await self.cloner.clone(session)
                reached("clone.staged")
                await self._run_blocking(self._folders.adopt, session)
                await self._store.write(lambda tx: tell(tx, session.id, cloned))
            return
        tried: set[str] = set()
        for snapshot in kept if self._vault is not None else ():
            if snapshot.key in tried:
                continue
            tried.add(snapshot.key)
            try:
                await self.stage(session, snapshot)
            except Unavailable:
                raise
            except CarrelError as error:
                log.error("snapshot.unreadable", snapshot=snapshot.id, code=error.code, detail=error.operator_detail)
                continue
            await self._run_blocking(self._folders.adopt, session)
            told = events.WorkspaceRestored(
                snapshot_id=snapshot.id, reason="lost", taken_at=snapshot.created_at, seq=snapshot.seq
            )
            log.warning("workspace.restored", session=session.id, snapshot=snapshot.id)
            await self._store.write(lambda tx, told=told: tell(tx, session.id, told))  # type: ignore[misc]
            return
        why = "No snapshot of it could be read." if kept else "No snapshot of it was kept."
        log.error("workspace.lost", session=session.id, why=why)
        await self._run_blocking(self._folders.make, session)
        await self._store.write(lambda tx: tell(tx, session.id, events.WorkspaceLost(message=why)))

    async def stage(self, session: Session, snapshot: Snapshot) -> None:
        """Put a snapshot beside the session's folder, ready to take its place."""
        if self._vault is None:
            raise Unavailable("This server keeps no snapshots.")
        await self._run_blocking(self._folders.clear_staged, session)
        await self._vault.restore(session, snapshot.key, self._folders.staged(session))

    async def put_back(self, session: Session) -> None:
        """Finish what the session is being put back to. No sandbox of it may be there; safe to repeat."""
        async with self.changing(session):
            if session.restoring is not None and session.restoring.snapshot_id is not None:
                await self._run_blocking(self._folders.adopt, session)
            reached("restore.adopted")
            await self._store.write(lambda tx: steps.put_back(tx, session.id))

    async def copy(self, snapshot: Snapshot, target: Session) -> None:
        """Make the workspace of a new session of a snapshot."""
        await self.stage(target, snapshot)
        await self._run_blocking(self._folders.adopt, target)

    # ---------------------------------------------------------------------------------------------------- deleting

    def doomed(self) -> None:
        """There are objects to be deleted."""
        self._doomed.set()

    async def _delete_doomed(self, vault: Vault) -> None:
        while True:
            self._doomed.clear()
            try:
                await self._prune_old()
                while prefixes := await self._store.read(lambda tx: list(tx.doomed.some(_BATCH))):
                    for prefix in prefixes:
                        await vault.delete(prefix)
                        await self._store.write(lambda tx, p=prefix: tx.doomed.remove(p))  # type: ignore[misc]
            except CarrelError as error:
                log.warning("objects.not_deleted", code=error.code, detail=error.operator_detail)
            except Exception:
                # Whatever it is, objects that stay for longer are no reason to stop.
                log.exception("objects.not_deleted")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP_SECONDS):
                    await self._doomed.wait()

    async def _prune_old(self) -> None:
        """Forget the snapshots that are too old of sessions that take no new ones."""
        if self._rules.max_age is None or time.monotonic() - self._swept_at < _OLD_SECONDS:
            return
        before = utc_now() - self._rules.max_age

        def work(tx: abc.Transaction) -> bool:
            old = tx.snapshots.older(before, limit=_BATCH)
            remove_snapshots(tx, [each.id for each in old])
            return len(old) == _BATCH

        while await self._store.write(work):
            pass
        self._swept_at = time.monotonic()

    async def _close(self) -> None:
        self._closed = True
        tasks = [
            *self._work.values(),
            *self._ensuring.values(),
            *([self._deleting] if self._deleting is not None else []),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.cloner.close()
        self._work.clear()
        self._ensuring.clear()


class _Lock:
    """A lock that goes with its last user."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class _Gone(Exception):
    """The session was deleted meanwhile."""
