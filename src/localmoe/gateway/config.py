"""Settings of the gateway."""

from dataclasses import dataclass, field, fields

from localmoe.gateway.cache.config import CacheConfig
from localmoe.gateway.identity.config import IdentityConfig
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.limits.config import LimitsConfig
from localmoe.gateway.middleware.cors_config import CorsConfig

_MAX_TIME_S = 1_000_000
"""Clocks take no infinite times."""


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Bounds and times. Bounds of single fields are in the request schemas."""

    max_body_bytes: int = 16 * 2**20
    """Largest request body; larger ones get 413 before they are parsed."""
    keepalive_s: float = 15.0
    """A stream that has been silent for this long gets a comment, so that proxies keep it open."""
    max_choices: int = 256
    """Most sequences that one request may ask for: its prompts times `n`."""

    max_logprobs: int = 1_000_000
    """Most log-probabilities that one request may ask for: tokens scored, of answers and of echoed prompts, times
    the alternatives plus one. Each takes some hundred bytes until the answer is sent."""
    body_timeout_s: float = 60.0
    """A request whose body has not come whole by then gets 408."""
    max_background_responses: int = 64
    """Most responses (`/v1/responses` with `background`) that are made at a time."""
    background_timeout_s: float = 3600.0
    """One that is not complete by then has failed."""

    identity: IdentityConfig = field(default_factory=IdentityConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    cors: CorsConfig = field(default_factory=CorsConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    request_log: bool = True
    """Whether a line is written on standard error for each request: who asked, and what came of it."""

    def __post_init__(self) -> None:
        bounds = {one.name: getattr(self, one.name) for one in fields(self) if one.type in (int, float)}
        for name, value in bounds.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
            if name.endswith("_s") and value > _MAX_TIME_S:
                raise ValueError(f"{name} is {value}; it must be at most {_MAX_TIME_S}")
