"""How long an engine may be silent in an answer.

A time-out for each token would cost more than most of what is done with a token. So there is one timer for an
answer: when it fires, it looks since when the next chunk is waited for, and sets itself again for what is left.
"""

import asyncio
from collections.abc import Callable


class SilenceTimer:
    """Cancels the task that waits for a chunk that does not come. Close it.

    Around each wait, call `begin` and `end`; of a cancellation in between, `exceeded` says whether it was ours.

    Args:
        limit_s: seconds that a wait may take that began at this time; asked for while it lasts.
        clock: seconds that only grow.
    """

    def __init__(self, limit_s: Callable[[float], float], *, clock: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._num_cancelled = 0
        """Times that others had cancelled the task when the wait began."""
        self._is_waiting = False
        self._since_s = 0.0
        self._exceeded_s: float | None = None

    def begin(self) -> None:
        """A wait begins, in this task."""
        # The task is not always the same: readers of an answer may take turns.
        self._task = asyncio.current_task()
        assert self._task is not None
        self._num_cancelled = self._task.cancelling()
        self._is_waiting = True
        self._since_s = self._clock()
        if self._timer is None:
            self._set(self._limit_s(self._since_s))

    def end(self) -> None:
        """A chunk has come."""
        self._is_waiting = False
        if self._exceeded_s is not None:
            self._take_back()  # it came in spite of us

    def exceeded(self) -> float | None:
        """The limit in seconds, if the wait was cancelled for it; None: somebody else did, and is to be obeyed."""
        self._is_waiting = False
        limit_s = self._exceeded_s
        return limit_s if self._take_back() else None

    def _take_back(self) -> bool:
        """Our cancellation, as asyncio.timeout does it; False where there is none, or another one with it."""
        if self._exceeded_s is None or self._task is None:
            return False
        self._exceeded_s = None
        return self._task.uncancel() <= self._num_cancelled

    def close(self) -> None:
        """Nobody waits any more."""
        self._is_waiting = False
        self._take_back()  # where the engine made something else of it
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, left_s: float) -> None:
        self._timer = self._loop.call_later(max(0.0, left_s), self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._is_waiting:
            return  # the next wait sets it again
        limit_s = self._limit_s(self._since_s)
        left_s = self._since_s + limit_s - self._clock()
        if left_s > 0:
            self._set(left_s)
        else:
            assert self._task is not None
            self._exceeded_s = max(0.0, limit_s)
            self._task.cancel()
