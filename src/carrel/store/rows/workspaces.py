"""Persistent workspaces, snapshots, artifacts, and objects that are still to be deleted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from carrel import abc
from carrel.errors import WorkspaceNotFound
from carrel.model import Artifact, NamedWorkspace, Snapshot
from carrel.store import tables
from carrel.store.rows.base import (
    READ_BATCH,
    Rows,
    batches,
    columns,
    cursor_of,
    name_of,
    named_cursor_of,
    number_of,
    plain,
)

_WORKSPACE_COLUMNS = [tables.workspaces.c[name] for name in NamedWorkspace.model_fields]
_SNAPSHOT_COLUMNS = [tables.snapshots.c[name] for name in Snapshot.model_fields]
_ARTIFACT_COLUMNS = [tables.artifacts.c[name] for name in Artifact.model_fields]


class SqlWorkspaces(Rows, abc.WorkspaceRows):
    """Persistent workspaces."""

    def add(self, workspace: NamedWorkspace) -> bool:
        """Store a new workspace. False where its user has one of this name."""
        return self._insert_or_ignore(tables.workspaces, {**columns(workspace), "deleting": False})

    def get(self, workspace_id: str) -> NamedWorkspace | None:
        """The workspace, or None. In a writing transaction, nobody else changes it before that has ended."""
        return self._first(tables.workspaces.c.id == workspace_id)

    def named(self, owner: str, name: str) -> NamedWorkspace | None:
        """The user's workspace of this name, or None."""
        w = tables.workspaces.c
        return self._first((w.owner == owner) & (w.name == name))

    def _first(self, which: sa.ColumnElement[bool]) -> NamedWorkspace | None:
        query = sa.select(*_WORKSPACE_COLUMNS).where(which, ~tables.workspaces.c.deleting)
        row = self._one(query.with_for_update() if self._writing else query)
        return NamedWorkspace.model_validate(row) if row else None

    def update(self, workspace_id: str, **changes: Any) -> NamedWorkspace:
        """Change columns; `deleting=True` begins its deletion. Raises WorkspaceNotFound."""
        w = tables.workspaces
        values = {name: plain(value) for name, value in changes.items()}
        query = w.update().where(w.c.id == workspace_id, ~w.c.deleting).values(values).returning(*_WORKSPACE_COLUMNS)
        row = self._one(query)
        if row is None:
            raise WorkspaceNotFound
        return NamedWorkspace.model_validate(row)

    def page(self, owner: str | None, *, cursor: str | None, limit: int) -> abc.Page[NamedWorkspace]:
        """Newest first, of one user or of all. Raises InvalidCursor."""
        w = tables.workspaces.c
        query = sa.select(*_WORKSPACE_COLUMNS).where(~w.deleting).order_by(w.number.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(w.owner == owner)
        if cursor is not None:
            query = query.where(w.number < number_of(cursor))
        found = [NamedWorkspace.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], cursor_of(found[limit - 1].number) if more else None)

    def sessions(self, workspace_id: str) -> Sequence[str]:
        """The ids of sessions that have it, those that are being deleted too."""
        s = tables.sessions.c
        query = sa.select(s.id).where(s.workspace_id == workspace_id).order_by(s.number)
        return list(self._connection.execute(query).scalars())

    def deleting(self) -> Sequence[str]:
        """The ids of workspaces that are deleted and something of which is still to be removed."""
        return list(
            self._connection.execute(sa.select(tables.workspaces.c.id).where(tables.workspaces.c.deleting)).scalars()
        )

    def remove(self, workspace_id: str) -> None:
        """Delete the row."""
        self._connection.execute(tables.workspaces.delete().where(tables.workspaces.c.id == workspace_id))


class SqlSnapshots(Rows, abc.SnapshotRows):
    """Snapshots of sessions' files."""

    def add(self, snapshot: Snapshot) -> None:
        """Store a new snapshot."""
        self._connection.execute(tables.snapshots.insert(), columns(snapshot))

    def get(self, snapshot_id: str) -> Snapshot | None:
        """The snapshot, or None."""
        return self._first(tables.snapshots.c.id == snapshot_id)

    def _first(self, which: sa.ColumnElement[bool]) -> Snapshot | None:
        row = self._one(self._query(which).limit(1))
        return Snapshot.model_validate(row) if row else None

    def _query(self, which: sa.ColumnElement[bool]) -> sa.Select[Any]:
        return sa.select(*_SNAPSHOT_COLUMNS).where(which).order_by(tables.snapshots.c.number.desc())

    def page(self, session_id: str, *, cursor: str | None, limit: int) -> abc.Page[Snapshot]:
        """A session's, newest first. Raises InvalidCursor."""
        query = self._query(tables.snapshots.c.session_id == session_id).limit(limit + 1)
        if cursor is not None:
            query = query.where(tables.snapshots.c.number < number_of(cursor))
        found = [Snapshot.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], cursor_of(found[limit - 1].number) if more else None)

    def of_files(
        self, *, session_id: str | None = None, workspace_id: str | None = None, owner: str | None = None
    ) -> Sequence[Snapshot]:
        """Every snapshot of a session, of all sessions in one persistent workspace, or of one user, newest first."""
        s = tables.snapshots.c
        which = s.workspace_id == workspace_id if workspace_id is not None else s.session_id == session_id
        if owner is not None:
            sessions, named = tables.sessions.c, tables.workspaces.c
            which = s.session_id.in_(sa.select(sessions.id).where(sessions.owner == owner))
            which |= s.workspace_id.in_(sa.select(named.id).where(named.owner == owner))
        return [Snapshot.model_validate(row) for row in self._all(self._query(which))]

    def older(self, before: datetime, *, limit: int) -> Sequence[Snapshot]:
        """So many of those taken before a moment, but never the newest of the same files; the oldest first."""
        s, later = tables.snapshots, tables.snapshots.alias()
        own = s.c.workspace_id.is_(None) & (later.c.session_id == s.c.session_id)
        same = own | (later.c.workspace_id == s.c.workspace_id)
        newer = sa.select(later.c.id).where(same, later.c.number > s.c.number).exists()
        query = sa.select(*_SNAPSHOT_COLUMNS).where(s.c.created_at < before, newer).order_by(s.c.number).limit(limit)
        return [Snapshot.model_validate(row) for row in self._all(query)]

    def of_turn(self, turn_id: str) -> Snapshot | None:
        """The newest that was taken after this turn, or None."""
        return self._first(tables.snapshots.c.turn_id == turn_id)

    def remove(self, snapshot_ids: Sequence[str]) -> Sequence[str]:
        """Delete rows. Answers the objects that no row has any more."""
        s = tables.snapshots
        keys: set[str] = set()
        for batch in batches(list(snapshot_ids), READ_BATCH):
            query = s.delete().where(s.c.id.in_(batch)).returning(s.c.key)
            keys.update(self._connection.execute(query).scalars())
        for batch in batches(sorted(keys), READ_BATCH):
            keys.difference_update(self._connection.execute(sa.select(s.c.key).where(s.c.key.in_(batch))).scalars())
        return sorted(keys)

    def due(self) -> Sequence[str]:
        """The ids of sessions whose files are still to be kept."""
        s = tables.sessions.c
        query = sa.select(s.id).where(s.snapshot_due.is_not(None), ~s.deleting)
        return list(self._connection.execute(query).scalars())


class SqlArtifacts(Rows, abc.ArtifactRows):
    """Files that sessions have published."""

    def add(self, artifact: Artifact) -> None:
        """Store a new artifact."""
        self._connection.execute(tables.artifacts.insert(), columns(artifact))

    def get(self, artifact_id: str) -> Artifact | None:
        """The artifact, or None."""
        row = self._one(sa.select(*_ARTIFACT_COLUMNS).where(tables.artifacts.c.id == artifact_id))
        return Artifact.model_validate(row) if row else None

    def page(self, session_id: str, *, cursor: str | None, limit: int) -> abc.Page[Artifact]:
        """A session's, newest first. Raises InvalidCursor."""
        a = tables.artifacts.c
        query = sa.select(*_ARTIFACT_COLUMNS).where(a.session_id == session_id).order_by(a.id.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(a.id < name_of(cursor))
        found = [Artifact.model_validate(row) for row in self._all(query)]
        more = len(found) > limit
        return abc.Page(found[:limit], named_cursor_of(found[limit - 1].id) if more else None)

    def remove(self, artifact_id: str) -> None:
        """Delete the row."""
        self._connection.execute(tables.artifacts.delete().where(tables.artifacts.c.id == artifact_id))


class SqlDoomed(Rows, abc.DoomedRows):
    """Objects that are still to be deleted."""

    def add(self, prefix: str) -> None:
        """From now on nothing refers to objects whose keys begin so."""
        self._insert_or_ignore(tables.doomed_objects, {"prefix": prefix})

    def some(self, limit: int) -> Sequence[str]:
        """So many of the prefixes."""
        query = sa.select(tables.doomed_objects.c.prefix).order_by(tables.doomed_objects.c.prefix).limit(limit)
        return list(self._connection.execute(query).scalars())

    def remove(self, prefix: str) -> None:
        """They are deleted."""
        self._connection.execute(tables.doomed_objects.delete().where(tables.doomed_objects.c.prefix == prefix))
