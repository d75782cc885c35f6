"""Settings of the state database."""

from dataclasses import dataclass, field

STATE_FILE = "state.db"
"""In the home directory, where the settings name no database."""
_SCHEMES = ("sqlite:///", "postgresql://")


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """Where state is kept."""

    database_url: str | None = field(default=None, repr=False)
    """`postgresql://user:password@host/name`, for several gateways with one state, or `sqlite:///path`; none:
    `state.db` in the home directory."""
    files_directory: str | None = None
    """Where clients' files are; none: `files` in the home directory. Gateways that share a database share it, too."""
    busy_timeout_s: float = 10.0
    """Who waits longer for the database gets an error."""
    max_owner_response_bytes: int = 256 * 2**20
    """Most that one owner's stored responses (`/v1/responses`) take together; those changed longest ago go first."""
    keep_responses_s: float = 30 * 24 * 3600.0
    """After this long they go, too."""

    def __post_init__(self) -> None:
        if self.database_url is not None and not self.database_url.startswith(_SCHEMES):
            # Not shown: there is a password in it.
            raise ValueError(f"database_url begins with none of {' and '.join(_SCHEMES)}")
        if not 0 < self.busy_timeout_s <= 3600:
            raise ValueError(f"busy_timeout_s is {self.busy_timeout_s}; it must be positive, and at most 3600")
        for name in ("max_owner_response_bytes", "keep_responses_s"):
            if not 0 < getattr(self, name) < 2**50:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, and less than 2^50")
