"""Sessions that begin sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema up to this revision."""
    with op.batch_alter_table("sessions") as batch:
        batch.add_column(sa.Column("parent_id", sa.String(36), nullable=True))
        batch.add_column(sa.Column("root_id", sa.String(36), nullable=True))
        batch.add_column(sa.Column("depth", sa.Integer(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("lineage", sa.JSON(), nullable=False, server_default=sa.text("'[]'")))
        batch.add_column(sa.Column("birth", sa.JSON(none_as_null=True), nullable=True))
        batch.add_column(sa.Column("files_of", sa.String(36), nullable=True))
        batch.add_column(sa.Column("paused_turn", sa.String(36), nullable=True))
        batch.create_index("ix_sessions_parent_id", ["parent_id"])
    op.create_table(
        "ancestry",
        sa.Column("session_id", sa.String(36), nullable=False),
        sa.Column("ancestor_id", sa.String(36), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "ancestor_id", name=op.f("pk_ancestry")),
    )
    op.create_index("ix_ancestry_ancestor_id", "ancestry", ["ancestor_id"])
