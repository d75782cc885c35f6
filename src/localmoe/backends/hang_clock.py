"""How long an engine has kept everybody waiting."""

import time
from collections.abc import Callable


class HangClock:
    """Seconds of silence in which somebody waited.

    Time in which nobody waits does not count; time in which somebody did who has given up does, or an engine that
    hangs would never be found out by clients who are in a hurry.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_waiting = 0
        self._waited_s = 0.0
        """By those who have given up, since the engine was heard."""
        self._since_s = 0.0

    @property
    def silent_s(self) -> float:
        """Since the engine was heard; 0 where nobody waits."""
        return self._waited_s + self._clock() - self._since_s if self._num_waiting else 0.0

    def begin(self) -> None:
        """Somebody more waits for the engine."""
        if not self._num_waiting:
            self._since_s = self._clock()
        self._num_waiting += 1

    def end(self) -> None:
        """Somebody waits no more."""
        self._num_waiting -= 1
        if not self._num_waiting:
            self._waited_s += self._clock() - self._since_s

    def heard(self) -> None:
        """The engine does something."""
        self._waited_s, self._since_s = 0.0, self._clock()
