"""Puts the middleware in its order; why it is this one, the package's docstring says."""

from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from structlog.typing import FilteringBoundLogger

from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.gateway.anthropic.errors import AnthropicErrorsMiddleware
from localmoe.gateway.cache.middleware import CacheMiddleware
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.authenticator import Identity
from localmoe.gateway.identity.open import OpenToAll
from localmoe.gateway.limits.limiter import Limiter
from localmoe.gateway.middleware.body_limit import BodyLimitMiddleware
from localmoe.gateway.middleware.crash import CrashMiddleware
from localmoe.gateway.middleware.metrics import MetricsMiddleware
from localmoe.gateway.middleware.rate_limit import RateLimitMiddleware
from localmoe.gateway.middleware.request_id import RequestIdMiddleware
from localmoe.gateway.middleware.request_log import RequestLogMiddleware
from localmoe.gateway.middleware.security import SecurityMiddleware

_ALLOWED_METHODS = ("GET", "POST", "PATCH", "DELETE")
_EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-localmoe-ignored",
    "x-localmoe-cache",
    *(
        name
        for kind in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
        for name in (f"x-ratelimit-{what}-{kind}", f"anthropic-ratelimit-{kind}-{what}")
    ),
)
"""That pages may read."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Who is let in, and how much of them is written down."""

    identity: Identity = field(default_factory=OpenToAll)
    limiter: Limiter | None = None
    """None: there are no limits."""
    log: FilteringBoundLogger | None = None
    """Gets a line for each request."""


def middleware_stack(
    current: Current[GatewayConfig], guard: Guard, *, bus: EventBus, streamed_paths: Collection[str]
) -> list[Middleware]:
    """From the outside in.

    Args:
        streamed_paths: of routes that read their bodies themselves, and bound them.
    """
    config, stack = current.now, []
    if config.cors.origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors.origins,
                allow_credentials=config.cors.credentials,
                allow_methods=_ALLOWED_METHODS,
                allow_headers=["*"],
                expose_headers=_EXPOSED_HEADERS,
            )
        )
    stack.append(Middleware(RequestIdMiddleware))
    if guard.log is not None:
        stack.append(Middleware(RequestLogMiddleware, log=guard.log))
    stack += [
        Middleware(MetricsMiddleware, bus=bus),
        Middleware(AnthropicErrorsMiddleware),
        Middleware(CrashMiddleware),
        Middleware(SecurityMiddleware, identity=guard.identity),
    ]
    if guard.limiter is not None:
        stack.append(Middleware(RateLimitMiddleware, limiter=guard.limiter))
    if config.cache.enabled:
        stack.append(Middleware(CacheMiddleware))
    stack.append(Middleware(BodyLimitMiddleware, config=current, streamed_paths=streamed_paths))
    return stack
