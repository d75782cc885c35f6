"""The tables as they were first."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("principal_id", sa.String(64), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Integer, nullable=False),
        sa.Column("models", sa.LargeBinary, nullable=False),
        sa.Column("limits", sa.LargeBinary, nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("expires_s", sa.Double),
        sa.Column("revoked_s", sa.Double),
        sa.Column("last_used_s", sa.Double),
    )
    op.create_index("ix_api_keys_digest", "api_keys", ["digest"], unique=True)
    op.create_index("ix_api_keys_principal", "api_keys", ["principal_id"])
    op.create_table(
        "responses",
        sa.Column("owner_id", sa.Text, primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("num_bytes", sa.Integer, nullable=False),
        sa.Column("changed_at", sa.Double, nullable=False),
    )
    op.create_index("ix_responses_owner", "responses", ["owner_id", "changed_at", "num_bytes"])
    op.create_index("ix_responses_changed", "responses", ["changed_at"])
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner_id", sa.Text, nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
    )
    op.create_index("ix_files_owner", "files", ["owner_id", "created_at"])
    op.create_index("ix_files_expiry", "files", ["expires_at"])
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("owner_id", sa.Text, nullable=False),
        sa.Column("owner", sa.LargeBinary, nullable=False),
        sa.Column("endpoint", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("in_progress_at", sa.Double),
        sa.Column("finalizing_at", sa.Double),
        sa.Column("cancelling_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("num_items", sa.Integer, nullable=False),
        sa.Column("num_succeeded", sa.Integer, nullable=False),
        sa.Column("num_failed", sa.Integer, nullable=False),
        sa.Column("input_file_id", sa.String(64)),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        sa.Column("output_lifetime_s", sa.Integer),
        sa.Column("completion_window", sa.String(16)),
        sa.Column("metadata_json", sa.LargeBinary),
        sa.Column("errors_json", sa.LargeBinary),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", sa.Double),
    )
    op.create_index("ix_jobs_owner", "jobs", ["owner_id", "kind", "created_at"])
    op.create_index("ix_jobs_open", "jobs", ["owner_id", "ended_at"])
    op.create_index("ix_jobs_state", "jobs", ["state", "expires_at"])
    op.create_index("ix_jobs_ended", "jobs", ["ended_at"])
    op.create_index("ix_jobs_lease", "jobs", ["lease_owner"])
    op.create_table(
        "job_items",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("custom_id", sa.Text),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("flow", sa.Text, nullable=False),
        sa.Column("turn", sa.BigInteger, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("num_starts", sa.Integer, nullable=False),
        sa.Column("num_refusals", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", sa.Double),
        sa.Column("status_code", sa.Integer),
        sa.Column("request_id", sa.String(128)),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("result", sa.LargeBinary),
    )
    op.create_index("ix_job_items_turn", "job_items", ["state", "turn"])
    op.create_index("ix_job_items_flow", "job_items", ["flow", "state", "turn"])
    op.create_index("ix_job_items_lease", "job_items", ["lease_owner"])
