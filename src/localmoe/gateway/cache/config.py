"""Settings of the cache."""

from dataclasses import asdict, dataclass, field

_MAX_TIME_S = 1_000_000_000
_MIN_LEVEL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Answers that are kept to be given again to the same request. Only those that would be the same again are: of
    temperature 0, or with a seed."""

    enabled: bool = False
    """Off unless asked for: whoever measures, or asks the same twice to see whether it comes out the same, expects
    the model to answer."""
    shared: bool = False
    """Whether one principal's requests are answered with what another's were, and engines use again what they have
    computed of another's prompts, enabled or not. Then how fast an answer comes tells whether somebody has asked
    before."""
    max_entry_bytes: int = 1 << 20
    """Longer answers are not kept."""
    memory_bytes: int = 64 * 2**20
    """Most that answers in memory take."""
    memory_entries: int = 1000
    """Most of them."""
    memory_ttl_s: float = 3600.0
    """For how long one may be given again."""
    redis_url: str | None = field(default=None, repr=False)
    """`redis://host:port/number`; none: there is no such level. Its size is bounded by Redis's own `maxmemory`."""
    redis_ttl_s: float = 24 * 3600.0
    redis_timeout_s: float = 0.05
    """A Redis that takes longer is left alone for some time."""
    disk_bytes: int = 0
    """Most that answers on disk take, in the home directory; 0: there is no such level."""
    disk_ttl_s: float = 7 * 24 * 3600.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool | str | None):
                continue
            if name == "disk_bytes" and value == 0:
                continue
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
            if name.endswith("_s") and value > _MAX_TIME_S:
                raise ValueError(f"{name} is {value}; it must be at most {_MAX_TIME_S}")
        for name in ("memory_bytes", "disk_bytes"):
            if 0 < getattr(self, name) < _MIN_LEVEL_BYTES:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {_MIN_LEVEL_BYTES} at least")
        if self.redis_url is not None and not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            # Not shown: there may be a password in it.
            raise ValueError("redis_url begins with none of redis://, rediss:// and unix://")
