"""Warm pools: a session may wait for whoever takes it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema up to this revision."""
    with op.batch_alter_table("sessions") as batch:
        batch.add_column(sa.Column("reserved", sa.String(64), nullable=True))
        batch.create_index(
            "ix_sessions_reserved",
            ["reserved"],
            sqlite_where=sa.text("reserved IS NOT NULL"),
            postgresql_where=sa.text("reserved IS NOT NULL"),
        )
