"""Items know how often their model was not served by whoever took them, and by whom last;
what an owner's results take is found fast."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what is new."""
    op.add_column("job_items", sa.Column("num_not_served", sa.Integer, nullable=False, server_default="0"))
    op.add_column("job_items", sa.Column("not_served_by", sa.String(128)))
    op.create_index("ix_jobs_kept", "jobs", ["kind", "owner_id", "ended_at", "num_bytes"])
    op.execute(
        "UPDATE jobs SET num_bytes = (SELECT coalesce(sum(length(result)), 0) FROM job_items WHERE job_id = jobs.id) "
        "WHERE kind = 'inference' AND ended_at IS NOT NULL"
    )
