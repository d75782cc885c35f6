"""How one request uses the cache, and what it found.

Middleware says the first and reads the second; models' generators, some calls below, do the opposite. It is in a
context variable so that no API has to know of it.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from localmoe.core.bound import Bound


@dataclass(kw_only=True, slots=True)
class CacheUse:
    """Of one request, which may ask for several answers."""

    may_read: bool = True
    may_write: bool = True
    num_asked: int = 0
    """Answers that were looked for."""
    num_found: int = 0
    level: str | None = None
    """Where the last one was found."""

    @property
    def summary(self) -> str | None:
        """For people and programs; None: nothing was asked for that could be there."""
        if not self.num_asked:
            return None
        if not self.may_read:
            return "bypass"
        # Of several answers some may still be looked for.
        return f"hit; level={self.level}" if self.num_found == self.num_asked else "miss"


_current: ContextVar[CacheUse | None] = ContextVar("cache_use", default=None)


def bound(use: CacheUse) -> Bound[CacheUse | None]:
    """Makes it the one that the code inside, and tasks that it starts, go by."""
    return Bound(_current, use)


def current_use() -> CacheUse | None:
    """None: what runs is no client's request, and does without the cache."""
    return _current.get()
