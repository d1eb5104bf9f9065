"""Rules about calls of tools that people have written, by themselves or by an answer."""

import sqlalchemy as sa
from alembic import op

from carrel.store.tables import Moment

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema up to this revision."""
    op.create_table(
        "permission_rules",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("owner", sa.String(128), nullable=True),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("effect", sa.String(8), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("interaction_id", sa.String(36), nullable=True),
        sa.Column("created_by", sa.String(255), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_permission_rules")),
    )
    op.create_index("ix_permission_rules_scope_target", "permission_rules", ["scope", "target"])
    op.create_index("ix_permission_rules_owner_id", "permission_rules", ["owner", "id"])
