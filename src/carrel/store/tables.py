"""The tables. A change here needs a migration in `migrations/versions`; a test holds the two together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)


class Moment(sa.types.TypeDecorator[datetime]):
    """A time in UTC. SQLite keeps no zone, so it is taken off on the way in and put back on the way out."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Put the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# To SQLite every integer is a long one, and its first migrations have no other word for it.
_LONG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _id(name: str = "id", **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(36), **options)


def _of_session(**options: Any) -> sa.Column[str]:
    return sa.Column("session_id", sa.String(36), sa.ForeignKey("sessions.id", ondelete="CASCADE"), **options)


counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    _id(primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False, unique=True),
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("uid_number", sa.BigInteger),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("stop_reason", sa.String(32)),
    sa.Column("title", sa.Text),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("workspace", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("forked_from", sa.String(36)),
    sa.Column("agent_session_id", sa.String(64)),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("turn_count", sa.Integer, nullable=False),
    sa.Column("usage", sa.JSON, nullable=False),
    sa.Column("cost_usd", sa.Float),
    sa.Column("budget", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("last_active_at", Moment, nullable=False),
    sa.Column("expires_at", Moment),
    sa.Column("ttl_seconds", _LONG),
    sa.Column("deleting", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("workspace_id", sa.String(36)),
    sa.Column("rewound", sa.JSON, nullable=False, server_default=sa.text("'[]'")),
    sa.Column("snapshot_due", sa.String(36)),
    sa.Column("restoring", sa.JSON(none_as_null=True)),
    sa.Column("reserved", sa.String(64)),
    sa.Column("environment", sa.String(64), nullable=False, server_default="default"),
    sa.Column("environment_version", sa.Integer, nullable=False, server_default="0"),
    sa.Column("parent_id", sa.String(36)),
    sa.Column("root_id", sa.String(36)),
    sa.Column("depth", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lineage", sa.JSON, nullable=False, server_default=sa.text("'[]'")),
    sa.Column("birth", sa.JSON(none_as_null=True)),
    sa.Column("files_of", sa.String(36)),
    sa.Column("paused_turn", sa.String(36)),
    # Of the few alone: whoever asks for all others wants them by another index.
    sa.Index(
        "ix_sessions_reserved",
        "reserved",
        sqlite_where=sa.text("reserved IS NOT NULL"),
        postgresql_where=sa.text("reserved IS NOT NULL"),
    ),
    sa.Index("ix_sessions_owner_number", "owner", "number"),
    sa.Index("ix_sessions_status_number", "status", "number"),
    sa.Index("ix_sessions_expires_at", "expires_at"),
    sa.Index("ix_sessions_workspace_id", "workspace_id"),
    sa.Index("ix_sessions_snapshot_due", "snapshot_due"),
    sa.Index("ix_sessions_environment", "environment"),
    sa.Index("ix_sessions_parent_id", "parent_id"),
)

# It outlives the session below, so that what that has spent still counts for the one above.
ancestry = sa.Table(
    "ancestry",
    metadata,
    _id("session_id", primary_key=True),
    _id("ancestor_id", primary_key=True),
    sa.Index("ix_ancestry_ancestor_id", "ancestor_id"),
)

stopped_environments = sa.Table(
    "stopped_environments",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
)

turns = sa.Table(
    "turns",
    metadata,
    _id(primary_key=True),
    _of_session(nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("origin", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("stop_reason", sa.String(32)),
    sa.Column("content", sa.JSON),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON),
    sa.Column("structured_output", sa.JSON),
    sa.Column("usage", sa.JSON, nullable=False),
    sa.Column("cost_usd", sa.Float),
    sa.Column("num_turns", sa.Integer, nullable=False),
    sa.Column("duration_ms", sa.BigInteger),
    sa.Column("sandbox_id", sa.String(36)),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("started_at", Moment),
    sa.Column("ended_at", Moment),
    sa.Column("expires_at", Moment),
    sa.Column("deadline_at", Moment),
    sa.Column("interrupt_reason", sa.String(32)),
    sa.UniqueConstraint("session_id", "number"),
    sa.Index("ix_turns_status_session_id", "status", "session_id"),
)

events = sa.Table(
    "events",
    metadata,
    _of_session(primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("turn_id", sa.String(36)),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("at", Moment, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Index("ix_events_turn_id", "turn_id"),
)

transcript_entries = sa.Table(
    "transcript_entries",
    metadata,
    _of_session(primary_key=True),
    sa.Column("subpath", sa.String(512), primary_key=True),
    sa.Column("n", sa.BigInteger, primary_key=True),
    sa.Column("uuid", sa.String(64)),
    sa.Column("turn_id", sa.String(36)),
    sa.Column("line", sa.Text, nullable=False),
    sa.UniqueConstraint("session_id", "subpath", "uuid"),
)

sandboxes = sa.Table(
    "sandboxes",
    metadata,
    _id(primary_key=True),
    sa.Column("session_id", sa.String(36), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("runtime", sa.String(32), nullable=False),
    sa.Column("state", sa.JSON, nullable=False),
    sa.Column("acked", sa.BigInteger, nullable=False),
    sa.Column("link_token_hash", sa.String(64), nullable=False),
    sa.Column("agent_token_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("network", sa.JSON(none_as_null=True)),
    sa.Column("environment", sa.String(80)),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("ended_at", Moment),
    sa.Index("ix_sandboxes_session_id_generation", "session_id", "generation"),
    sa.Index("ix_sandboxes_status", "status"),
)

# Usage outlives its session: what was spent stays spent.
usage = sa.Table(
    "usage",
    metadata,
    _id(primary_key=True),
    sa.Column("session_id", sa.String(36), nullable=False),
    sa.Column("user_id", sa.String(128), nullable=False, server_default="admin"),
    sa.Column("turn_id", sa.String(36)),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("cache_creation_input_tokens", sa.BigInteger, nullable=False),
    sa.Column("cache_read_input_tokens", sa.BigInteger, nullable=False),
    sa.Column("cost_usd", sa.Float),
    sa.Column("at", Moment, nullable=False),
    sa.Index("ix_usage_turn_id", "turn_id"),
    sa.Index("ix_usage_session_id_at", "session_id", "at"),
    sa.Index("ix_usage_user_id_at", "user_id", "at"),
)

reservations = sa.Table(
    "reservations",
    metadata,
    _id(primary_key=True),
    sa.Column("session_id", sa.String(36), nullable=False),
    sa.Column("user_id", sa.String(128), nullable=False),
    sa.Column("turn_id", sa.String(36)),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("cost_usd", sa.Float),
    sa.Column("at", Moment, nullable=False),
    sa.Index("ix_reservations_user_id", "user_id"),
    sa.Index("ix_reservations_session_id", "session_id"),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("budget", sa.JSON(none_as_null=True)),
    sa.Column("daily_budget", sa.JSON(none_as_null=True)),
    sa.Column("max_sessions", sa.Integer),
    sa.Column("number", sa.BigInteger),
    sa.Column("created_at", Moment, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _id(primary_key=True),
    sa.Column("user_id", sa.String(64), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    sa.Column("name", sa.String(200)),
    sa.Column("prefix", sa.String(32), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("expires_at", Moment),
    sa.Column("revoked_at", Moment),
    sa.Column("last_used_at", Moment),
    sa.Index("ix_api_keys_user_id", "user_id"),
)

tickets = sa.Table(
    "tickets",
    metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("principal", sa.JSON, nullable=False),
    sa.Column("reusable", sa.Boolean, nullable=False),
    sa.Column("expires_at", Moment, nullable=False),
    sa.Index("ix_tickets_expires_at", "expires_at"),
)

audit = sa.Table(
    "audit",
    metadata,
    _id(primary_key=True),
    sa.Column("at", Moment, nullable=False),
    sa.Column("principal", sa.String(256), nullable=False),
    sa.Column("user_id", sa.String(128)),
    sa.Column("action", sa.String(128), nullable=False),
    sa.Column("object_type", sa.String(32)),
    sa.Column("object_id", sa.String(128)),
    sa.Column("address", sa.String(64)),
    sa.Column("request_id", sa.String(64)),
    sa.Column("outcome", sa.Integer, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Index("ix_audit_at", "at"),
    sa.Index("ix_audit_user_id_at", "user_id", "at"),
    sa.Index("ix_audit_object_id", "object_id"),
)

network_requests = sa.Table(
    "network_requests",
    metadata,
    _id(primary_key=True),
    _of_session(nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("port", sa.Integer, nullable=False),
    sa.Column("verdict", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("first_at", Moment, nullable=False),
    sa.Column("last_at", Moment, nullable=False),
    sa.UniqueConstraint("session_id", "host", "port", "verdict", "reason", name="uq_network_requests_kind"),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("principal", sa.String(128), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("boot_id", sa.String(36), nullable=False),
    sa.Column("object_id", sa.String(36)),
    sa.Column("status", sa.Integer),
    sa.Column("body", sa.Text),
    sa.Column("created_at", Moment, nullable=False),
    sa.Index("ix_idempotency_created_at", "created_at"),
)

workspaces = sa.Table(
    "workspaces",
    metadata,
    _id(primary_key=True),
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("mode", sa.String(16), nullable=False),
    sa.Column("quota_mb", sa.BigInteger),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("last_used_at", Moment, nullable=False),
    sa.Column("deleting", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("owner", "name"),
)

environments = sa.Table(
    "environments",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("created_by", sa.String(128)),
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("sealed", sa.Text, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("updated_at", Moment, nullable=False),
    sa.Column("updated_by", sa.String(128)),
)

# They refer to no session: the newest of a persistent workspace outlives it.
snapshots = sa.Table(
    "snapshots",
    metadata,
    _id(primary_key=True),
    _id("session_id", nullable=False),
    _id("workspace_id"),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(16), nullable=False),
    sa.Column("turn_id", sa.String(36)),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("exact", sa.Boolean, nullable=False),
    sa.Column("key", sa.String(255), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("stored_bytes", sa.BigInteger, nullable=False),
    sa.Column("files", sa.BigInteger, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Index("ix_snapshots_session_id_number", "session_id", "number"),
    sa.Index("ix_snapshots_workspace_id_number", "workspace_id", "number"),
    sa.Index("ix_snapshots_turn_id", "turn_id"),
    sa.Index("ix_snapshots_key", "key"),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    _id(primary_key=True),
    _of_session(nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("key", sa.String(255), nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Index("ix_artifacts_session_id_id", "session_id", "id"),
)

interactions = sa.Table(
    "interactions",
    metadata,
    _id(primary_key=True),
    _of_session(nullable=False),
    sa.Column("owner", sa.String(128), nullable=False),
    _id("turn_id", nullable=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("tool", sa.String(255), nullable=False),
    sa.Column("tool_use_id", sa.String(128), nullable=True),
    sa.Column("input", sa.JSON, nullable=False),
    sa.Column("input_digest", sa.String(64), nullable=False),
    sa.Column("reason", sa.Text, nullable=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("answer", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("answered_by", sa.String(255), nullable=True),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("expires_at", Moment, nullable=True),
    sa.Column("resolved_at", Moment, nullable=True),
    sa.Column("root_session_id", sa.String(36), nullable=False, server_default=""),
    sa.Column("title", sa.Text, nullable=True),
    sa.Column("suggestions", sa.JSON, nullable=False, server_default="[]"),
    sa.Column("options", sa.JSON, nullable=False, server_default="[]"),
    sa.Column("remind_at", Moment, nullable=True),
    sa.Column("remind_seconds", sa.Float, nullable=True),
    sa.Column("lone", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("parked", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("taken_at", Moment, nullable=True),
    sa.Index("ix_interactions_root_session_id_id", "root_session_id", "id"),
    sa.Index("ix_interactions_session_id_id", "session_id", "id"),
    sa.Index("ix_interactions_owner_status_id", "owner", "status", "id"),
    sa.Index("ix_interactions_status_id", "status", "id"),
)

permission_rules = sa.Table(
    "permission_rules",
    metadata,
    _id(primary_key=True),
    sa.Column("owner", sa.String(128)),
    sa.Column("scope", sa.String(16), nullable=False),
    sa.Column("target", sa.String(128), nullable=False),
    sa.Column("effect", sa.String(8), nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("interaction_id", sa.String(36)),
    sa.Column("created_by", sa.String(255), nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Index("ix_permission_rules_scope_target", "scope", "target"),
    sa.Index("ix_permission_rules_owner_id", "owner", "id"),
)

doomed_objects = sa.Table("doomed_objects", metadata, sa.Column("prefix", sa.String(255), primary_key=True))

# PostgreSQL: which of its transactions each connection has committed last, for when a commit's answer is lost.
commits = sa.Table(
    "commits",
    metadata,
    _id("writer", primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("at", Moment, nullable=False),
)
