"""Settings of jobs, batches and files."""

from dataclasses import asdict, dataclass

_MAX_TIME_S = 1_000_000_000
_MAX_RUNNING = 1024


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """How much work may be left here to be done later, and how much of it is done at once."""

    max_running: int = 8
    """Requests of jobs and batches that this gateway has under way at once, beside those of clients that wait."""
    max_open_per_owner: int = 1000
    """Jobs and batches of one owner that have not ended; more are refused."""
    max_batch_requests: int = 50_000
    """Most lines of a batch's file."""
    max_file_bytes: int = 200 * 2**20
    """Largest file that can be uploaded."""
    max_owner_file_bytes: int = 2 * 2**30
    """Most that one owner's files may take together, and the requests of their open jobs and batches likewise.
    Answers of batches count, but are never refused. Results of asynchronous requests may take as much again; the
    oldest are forgotten early."""
    upload_timeout_s: float = 600.0
    """A file that has not come whole by then gets 408."""
    max_answer_bytes: int = 16 * 2**20
    """Longest answer to one request that is kept."""
    expire_after_s: float = 24 * 3600.0
    """A job or batch that has not ended by then does so without the rest of its answers."""
    keep_ended_s: float = 30 * 24 * 3600.0
    """Ended ones, and the files they made, are forgotten after this long."""
    lease_s: float = 30.0
    """What a gateway has under way is taken up by another one when it has been silent for this long."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
            if name.endswith("_s") and value > _MAX_TIME_S:
                raise ValueError(f"{name} is {value}; it must be at most {_MAX_TIME_S}")
        if self.max_running > _MAX_RUNNING:
            raise ValueError(f"max_running is {self.max_running}; it must be at most {_MAX_RUNNING}")
        if self.lease_s < 1:
            raise ValueError(f"lease_s is {self.lease_s}; it must be 1 at least")
