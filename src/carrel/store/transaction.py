"""The rows as one SQL transaction sees them, on either engine."""

from __future__ import annotations

from hashlib import sha256

import sqlalchemy as sa

from carrel import abc
from carrel.store import rows


class SqlTransaction(abc.Transaction):
    """Rows as one SQL transaction sees them."""

    def __init__(self, connection: sa.Connection, *, writing: bool = False) -> None:
        """See the rows through `connection`; `writing` transactions lock the rows of sessions they read."""
        self._connection = connection
        self.sessions = rows.SqlSessions(connection, writing=writing)
        self.pools = rows.SqlPools(connection)
        self.trees = rows.SqlTrees(connection)
        self.turns = rows.SqlTurns(connection)
        self.counts = rows.SqlCounts(connection)
        self.log = rows.SqlEvents(connection)
        self.events = self.log
        self.transcripts = rows.SqlTranscripts(connection)
        self.interactions = rows.SqlInteractions(connection)
        self.rules = rows.SqlRules(connection)
        self.sandboxes = rows.SqlSandboxes(connection)
        self.usage = rows.SqlUsage(connection)
        self.idempotency = rows.SqlIdempotency(connection)
        self.users = rows.SqlUsers(connection)
        self.keys = rows.SqlKeys(connection)
        self.tickets = rows.SqlTickets(connection)
        self.audit = rows.SqlAudit(connection)
        self.workspaces = rows.SqlWorkspaces(connection, writing=writing)
        self.snapshots = rows.SqlSnapshots(connection)
        self.artifacts = rows.SqlArtifacts(connection)
        self.doomed = rows.SqlDoomed(connection)
        self.network = rows.SqlNetwork(connection)
        self.environments = rows.SqlEnvironments(connection)
        self.secrets = rows.SqlSecrets(connection)

    def lock(self, name: str) -> None:
        """Wait until no other transaction has this lock, and keep it. SQLite has one writer at a time as it is."""
        if self._connection.dialect.name == "postgresql":
            key = int.from_bytes(sha256(name.encode()).digest()[:8], "big", signed=True)
            self._connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
