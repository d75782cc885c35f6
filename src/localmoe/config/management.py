"""Settings of the configuration itself."""

from dataclasses import dataclass

_MAX_VERSIONS = 100_000
_MAX_POLL_INTERVAL_S = 86_400


@dataclass(frozen=True, kw_only=True)
class ManagementConfig:
    """How changes of the configuration are found and kept."""

    watch: bool = True
    """Apply the configuration file anew when it changes, while the server serves."""
    poll_interval_s: float | None = None
    """Look for changes so often; None: be told of them by the system, which some mounts do not."""
    max_versions: int = 1000
    """Applied versions that the history keeps; the oldest go."""

    def __post_init__(self) -> None:
        if self.poll_interval_s is not None and not 0 < self.poll_interval_s <= _MAX_POLL_INTERVAL_S:
            raise ValueError(
                f"poll_interval_s is {self.poll_interval_s}; it must be positive, at most {_MAX_POLL_INTERVAL_S}"
            )
        if not 1 <= self.max_versions <= _MAX_VERSIONS:
            raise ValueError(f"max_versions is {self.max_versions}; it must be from 1 to {_MAX_VERSIONS}")
