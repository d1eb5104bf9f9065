"""The roles of a transaction, in SQL that SQLite and PostgreSQL both take."""

from carrel.store.rows.audit import SqlAudit
from carrel.store.rows.counts import SqlCounts
from carrel.store.rows.environments import SqlEnvironments, SqlSecrets
from carrel.store.rows.events import SqlEvents
from carrel.store.rows.idempotency import SqlIdempotency
from carrel.store.rows.interactions import SqlInteractions
from carrel.store.rows.network import SqlNetwork
from carrel.store.rows.people import SqlKeys, SqlTickets, SqlUsers
from carrel.store.rows.pools import SqlPools
from carrel.store.rows.rules import SqlRules
from carrel.store.rows.sandboxes import SqlSandboxes
from carrel.store.rows.sessions import SqlSessions
from carrel.store.rows.transcripts import SqlTranscripts
from carrel.store.rows.trees import SqlTrees
from carrel.store.rows.turns import SqlTurns
from carrel.store.rows.usage import SqlUsage
from carrel.store.rows.workspaces import SqlArtifacts, SqlDoomed, SqlSnapshots, SqlWorkspaces

__all__ = [
    "SqlArtifacts",
    "SqlAudit",
    "SqlCounts",
    "SqlDoomed",
    "SqlEnvironments",
    "SqlEvents",
    "SqlIdempotency",
    "SqlInteractions",
    "SqlKeys",
    "SqlNetwork",
    "SqlPools",
    "SqlRules",
    "SqlSandboxes",
    "SqlSecrets",
    "SqlSessions",
    "SqlSnapshots",
    "SqlTickets",
    "SqlTranscripts",
    "SqlTrees",
    "SqlTurns",
    "SqlUsage",
    "SqlUsers",
    "SqlWorkspaces",
]
