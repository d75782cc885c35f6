"""Settings of the state database."""

from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

STATE_FILE = "state.db"
"""In the home directory, where the settings name no database."""
_SCHEMES = ("sqlite:///", "postgresql://")
_POSTGRES_OPTIONS = ("host", "port", "sslmode")
"""As libpq has them; a host may be the directory of a socket there."""
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """Where state is kept."""

    database_url: str | None = field(default=None, repr=False)
    """`postgresql://user:password@host/name`, for several gateways with one state, or `sqlite:///path`; none:
    `state.db` in the home directory. A PostgreSQL's may end in `?sslmode=require` or libpq's other modes."""
    files_directory: str | None = None
    """Where clients' files are; none: `files` in the home directory. Gateways that share a database share it, too."""
    busy_timeout_s: float = 10.0
    """Who waits longer for the database gets an error."""
    max_owner_response_bytes: int = 256 * 2**20
    """Most that one owner's stored responses (`/v1/responses`) take together; those changed longest ago go first."""
    keep_responses_s: float = 30 * 24 * 3600.0
    """After this long they go, too."""

    def __post_init__(self) -> None:
        if self.database_url is not None:
            _check_url(self.database_url)
        if not 0 < self.busy_timeout_s <= 3600:
            raise ValueError(f"busy_timeout_s is {self.busy_timeout_s}; it must be positive, and at most 3600")
        for name in ("max_owner_response_bytes", "keep_responses_s"):
            if not 0 < getattr(self, name) < 2**50:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, and less than 2^50")


def _check_url(url: str) -> None:
    """Raises ValueError, in which the URL is not shown: there is a password in it."""
    if not url.startswith(_SCHEMES):
        raise ValueError(f"database_url begins with none of {' and '.join(_SCHEMES)}")
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True)
        _ = parts.port, [int(port) for port in options.get("port", [])]
    except ValueError as error:
        raise ValueError("database_url has a host or port that is none") from error
    if parts.scheme == "sqlite" and parts.path.strip("/") in ("", ":memory:"):
        raise ValueError("database_url names no file behind sqlite:///")
    known = _POSTGRES_OPTIONS if parts.scheme == "postgresql" else ()
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"database_url has an option {unknown[0]!r}; it may have {', '.join(known) or 'none'}")
    if not set(options.get("sslmode", [])).issubset(_SSL_MODES):
        raise ValueError(f"database_url: sslmode must be one of {', '.join(_SSL_MODES)}")
