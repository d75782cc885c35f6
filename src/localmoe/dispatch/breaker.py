"""A circuit breaker: an engine that keeps failing is left alone for a while (Nygard, Release It!, 2007)."""

import time
from collections.abc import Callable
from enum import StrEnum


class BreakerState(StrEnum):
    """Whether requests pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One request at a time tries whether it works again."""


class CircuitBreaker:
    """Counts failures in a row.

    Args:
        max_failures: this many open it.
        open_s: how long it stays so.
        clock: seconds that only grow.
    """

    def __init__(self, *, max_failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_failures = max_failures
        self._open_s = open_s
        self._clock = clock
        self._num_failures = 0
        self._failed_s = -1.0
        self._opened_s: float | None = None
        self._probing = False

    def reconfigure(self, *, max_failures: int, open_s: float) -> None:
        """Go by other settings from now on; what was counted stays."""
        self._max_failures = max_failures
        self._open_s = open_s

    @property
    def state(self) -> BreakerState:
        if self._opened_s is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() - self._opened_s < self._open_s else BreakerState.HALF_OPEN

    @property
    def admits(self) -> bool:
        """Whether a request may be tried now."""
        state = self.state
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._probing)

    @property
    def reopens_in_s(self) -> float:
        """Until it admits a request, at most."""
        return 0.0 if self._opened_s is None else max(0.0, self._opened_s + self._open_s - self._clock())

    def begin(self) -> None:
        """A request is tried; call one of the others when it ends."""
        self._probing = self._probing or self.state is BreakerState.HALF_OPEN

    def begun(self, begun_s: float) -> None:
        """The answer has begun. So a try need not end before others may follow; but the next failure opens it again.

        Args:
            begun_s: as of `failed`.
        """
        if self._opened_s is not None and begun_s >= self._opened_s:
            self._opened_s, self._probing = None, False

    def succeeded(self) -> None:
        """The answer is complete, or as much of it as was wanted."""
        self._num_failures, self._opened_s, self._probing = 0, None, False

    def failed(self, begun_s: float) -> None:
        """The engine is to blame. All requests that a death ends are one failure.

        Args:
            begun_s: when the request was given to it, by the clock.
        """
        if begun_s <= self._failed_s:
            return
        self._failed_s = self._clock()
        self._num_failures += 1
        if self._num_failures >= self._max_failures:  # as it still is after a try
            self._opened_s = self._clock()
        self._probing = False

    def abandoned(self, begun_s: float) -> None:
        """It ended for another reason, as when the client leaves: nothing is known.

        Args:
            begun_s: as of `failed`.
        """
        if self._opened_s is not None and begun_s >= self._opened_s:
            self._probing = False
