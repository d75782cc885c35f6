"""Who asks, and what that allows."""

from enum import IntEnum

import msgspec


class Role(IntEnum):
    """Each may do what those before it may."""

    VIEWER = 1
    """Sees what is served and how it is."""
    USER = 2
    """Has answers generated."""
    OPERATOR = 3
    """Changes which models are served."""
    ADMIN = 4
    """Changes settings and keys."""


class RateLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much one principal may ask for, where that is not what others of its role may; 0: as much as it likes."""

    requests_per_minute: int | None = None
    """None: as others; likewise those that follow."""
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    concurrent_requests: int | None = None


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever a request is made by."""

    id: str
    """Never changes, and owns what is stored. It is no secret."""
    name: str
    """For people."""
    role: Role
    models: tuple[str, ...] = ()
    """Names of models that may be used; none: all."""
    limits: RateLimits = RateLimits()


ANYBODY = Principal(id="anybody", name="anybody", role=Role.ADMIN)
"""Where nobody is asked who they are."""

STRANGER = Principal(id="stranger", name="stranger", role=Role.VIEWER)
"""Who is not known yet, or need not be."""
