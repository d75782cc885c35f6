"""Settings of limits."""

from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from localmoe.core.identity import RateLimits, Role

MAX_LIMIT = 2**40


@dataclass(frozen=True, kw_only=True)
class RoleLimits:
    """What each key or token of a role may ask for, where it has no limits of its own. Not set: as for all roles; 0:
    as much as it likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LIMIT:
                raise ValueError(f"{name} is {value}; it must be from 0, which is no limit, to {MAX_LIMIT}")


@dataclass(frozen=True, kw_only=True)
class LimitsConfig(RoleLimits):
    """What each key or token may ask for, where everybody is asked who they are; 0: as much as it likes."""

    requests_per_minute: int | None = 100
    tokens_per_minute: int | None = 0
    """Of prompts and answers together."""
    concurrent_requests: int | None = 0
    """In each gateway process."""
    viewer: RoleLimits = RoleLimits()
    user: RoleLimits = RoleLimits()
    operator: RoleLimits = RoleLimits()
    admin: RoleLimits = RoleLimits()
    redis_url: str | None = field(default=None, repr=False)
    """Where requests and tokens are counted for several gateways together; not set: each counts for itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redis_url is not None and urlsplit(self.redis_url).scheme not in ("redis", "rediss"):
            raise ValueError("redis_url must begin with redis:// or rediss://")

    def of(self, role: Role, own: RateLimits) -> RateLimits:
        """The limits of somebody of this role who has these of their own; None: there is none."""
        by_role = {
            Role.VIEWER: self.viewer,
            Role.USER: self.user,
            Role.OPERATOR: self.operator,
            Role.ADMIN: self.admin,
        }[role]
        found = {}
        for one in fields(RoleLimits):
            layers = (getattr(layer, one.name) for layer in (own, by_role, self))
            found[one.name] = next((value for value in layers if value is not None), 0) or None
        return RateLimits(**found)
