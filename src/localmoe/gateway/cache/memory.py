"""The level in memory."""

import time
from collections import OrderedDict
from collections.abc import Callable

_ENTRY_BYTES = 200
"""About what an entry takes beside its data."""


class MemoryLevel:
    """Keeps what was used last. Our own few lines, since libraries count entries, not bytes.

    Args:
        max_bytes: of all entries together.
        clock: seconds that only grow.
    """

    name = "memory"

    def __init__(
        self, *, max_bytes: int, max_entries: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        """Data, and when its time is over."""
        self.num_bytes = 0

    def get(self, key: bytes) -> bytes | None:
        """What is kept under the key."""
        data, end_s = self._entries.get(key, (None, 0.0))
        if data is None:
            return None
        if self._clock() >= end_s:
            self._forget(key)
            return None
        self._entries.move_to_end(key)
        return data

    def put(self, key: bytes, data: bytes) -> None:
        """Keep it, in place of what was used least lately."""
        self._forget(key)
        self._entries[key] = (data, self._clock() + self._ttl_s)
        self.num_bytes += len(data) + _ENTRY_BYTES
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: bytes) -> None:
        data, _ = self._entries.pop(key, (None, 0.0))
        if data is not None:
            self.num_bytes -= len(data) + _ENTRY_BYTES
