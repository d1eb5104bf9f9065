"""Which version of an environment a sandbox was launched for."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema up to this revision."""
    op.add_column("sandboxes", sa.Column("environment", sa.String(80)))
