"""Values that may be replaced while others go by them."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Current(Generic[T]):
    """Holds what is in effect; whoever goes by it asks each time.

    Args:
        now: what is in effect at first.
    """

    def __init__(self, now: T) -> None:
        self.now = now

    def replace(self, now: T) -> None:
        """Put something else into effect."""
        self.now = now
