"""Calls that wait without a process: what an interaction needs to outlive its agent."""

import sqlalchemy as sa
from alembic import op

from carrel.store.tables import Moment

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema up to this revision."""
    for column in (
        sa.Column("root_session_id", sa.String(36), nullable=False, server_default=""),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("suggestions", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("options", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("remind_at", Moment(), nullable=True),
        sa.Column("remind_seconds", sa.Float(), nullable=True),
        sa.Column("lone", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("parked", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("taken_at", Moment(), nullable=True),
    ):
        op.add_column("interactions", column)
    op.execute("UPDATE interactions SET root_session_id = session_id, taken_at = resolved_at")
    op.create_index("ix_interactions_root_session_id_id", "interactions", ["root_session_id", "id"])
