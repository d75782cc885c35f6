"""The tables. A change here needs a migration (`migrations/versions`), or a test fails.

Times are Unix times in seconds. `api_keys`, `responses`, `files` and `jobs` belong to a principal (`owner_id`).
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("principal_id", String(64), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Integer, nullable=False),
    Column("models", LargeBinary, nullable=False),  # JSON
    Column("limits", LargeBinary, nullable=False),  # JSON
    Column("created_s", Double, nullable=False),
    Column("expires_s", Double),
    Column("revoked_s", Double),
    Column("last_used_s", Double),
    Index("ix_api_keys_digest", "digest", unique=True),
    Index("ix_api_keys_principal", "principal_id"),
)

responses = Table(
    "responses",
    metadata,
    Column("owner_id", Text, primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("changed_at", Double, nullable=False),
    Index("ix_responses_owner", "owner_id", "changed_at", "num_bytes"),
    Index("ix_responses_changed", "changed_at"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner_id", Text, nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Index("ix_files_owner", "owner_id", "created_at"),
    Index("ix_files_expiry", "expires_at"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("owner_id", Text, nullable=False),
    Column("owner", LargeBinary, nullable=False),  # the principal, JSON
    Column("endpoint", String(255), nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("cancelling_at", Double),
    Column("ended_at", Double),
    Column("num_bytes", BigInteger, nullable=False),
    Column("num_items", Integer, nullable=False),
    Column("num_succeeded", Integer, nullable=False),
    Column("num_failed", Integer, nullable=False),
    Column("input_file_id", String(64)),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("output_lifetime_s", Integer),
    Column("completion_window", String(16)),
    Column("metadata_json", LargeBinary),
    Column("errors_json", LargeBinary),
    Column("lease_owner", String(128)),
    Column("lease_until", Double),  # where nobody has it: it is not to be taken before then
    Index("ix_jobs_owner", "owner_id", "kind", "created_at"),
    Index("ix_jobs_open", "owner_id", "ended_at"),
    Index("ix_jobs_state", "state", "expires_at"),
    Index("ix_jobs_ended", "ended_at"),
    Index("ix_jobs_lease", "lease_owner"),
    Index("ix_jobs_kept", "kind", "owner_id", "ended_at", "num_bytes"),
)

job_items = Table(
    "job_items",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("custom_id", Text),
    Column("state", String(16), nullable=False),
    Column("flow", Text, nullable=False),  # items of different flows take turns
    Column("turn", BigInteger, nullable=False),
    Column("due_at", Double, nullable=False),
    Column("num_starts", Integer, nullable=False),
    Column("num_refusals", Integer, nullable=False),
    Column("num_not_served", Integer, nullable=False, server_default="0"),
    Column("not_served_by", String(128)),  # who has found that last
    Column("lease_owner", String(128)),
    Column("lease_until", Double),
    Column("status_code", Integer),
    Column("request_id", String(128)),
    # Last, since SQLite reads what lies before a column to get there.
    Column("body", LargeBinary, nullable=False),  # emptied when the item has ended
    Column("result", LargeBinary),
    Index("ix_job_items_turn", "state", "turn"),
    Index("ix_job_items_flow", "flow", "state", "turn"),
    Index("ix_job_items_lease", "lease_owner"),
)
