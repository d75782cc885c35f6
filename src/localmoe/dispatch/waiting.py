"""Requests that wait for a place in an engine.

A request waits here, not in an engine, so that it goes to whichever has a place first and can still be refused.
First come, first served, but nobody waits for an engine that only those before him wait for. A request is refused at
once if the queue is full, if no engine is there, or if it would not be complete in time, as far as speeds are known:
more answers at once are slower ones, so the places of an engine are not all given away where time is short. A request
that an engine has had is never refused.
"""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from localmoe.core.errors import (
    BackendUnavailableError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
)
from localmoe.core.request import Request
from localmoe.dispatch.replica import Replica

_LEAST_CAUTION, _MOST_CAUTION = 3.0, 6.0
_CAUTION_STEP = 0.2
_IN_TIME_SHARE = 0.99
"""A request is taken if it would be complete in time even if it took so many times as long as it should, with the
load that there is, as all but one in a hundred do. That factor is learned, but a busy minute must not come as a
surprise after a quiet one."""
_LOOK_S = 0.1
"""Between two looks at engines that may have come back, while somebody waits."""
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a request waits for."""

    request: Request
    deadline_s: float
    """By the clock."""
    avoid: Collection[str] = ()
    """Names of engines that have failed on it."""
    is_accepted: bool = False
    """Whether an engine has had it before: then it is not refused any more."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A request's place in an engine."""

    replica: Replica
    begun_s: float
    """When it was given, by the clock."""


class _Waiter:
    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.given: asyncio.Future[Place] = asyncio.get_running_loop().create_future()


class WaitingRoom:
    """Gives out the places of a model's engines.

    Args:
        replicas: the engines.
        choose: picks one of several that have a place free.
        predict: seconds that a request would take in engines if it began now, by their names; 0: not known.
        max_queued: requests that may wait.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        choose: Callable[[Sequence[Replica], Request], Replica],
        predict: Callable[[Sequence[Replica], Request], Mapping[str, float]],
        *,
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._choose = choose
        self._predict = predict
        self.max_queued = max_queued
        self._clock = clock
        self._waiters: list[_Waiter] = []
        self._caution = _LEAST_CAUTION
        self._looking: asyncio.Task[None] | None = None
        self._closed: str | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    @property
    def num_running(self) -> int:
        """Answers under way in all engines."""
        return sum(replica.num_running for replica in self._replicas)

    async def enter(self, wish: Wish) -> Place:
        """A place in an engine, as soon as there is one; to be given back with `leave`.

        Raises:
            InvalidRequestError: no engine could ever give this answer.
            BackendUnavailableError: there is no engine now.
            OverloadedError: too many wait, or the answer would not be complete in time.
            DeadlineExceededError: it waited until its time was over.
        """
        if self._closed is not None:
            raise BackendUnavailableError(f"the model takes no requests now: {self._closed}")
        if not self._waiters and (place := self._take(wish)):
            return place
        self._check(wish)
        waiter = _Waiter(wish)
        # It has waited before, and of its answer somebody may have read the beginning.
        self._waiters.insert(0 if wish.is_accepted else len(self._waiters), waiter)
        self._give_out()  # those who wait may wait for other engines
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            async with asyncio.timeout(max(0.0, wish.deadline_s - self._clock())):
                return await waiter.given
        except BaseException as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.given.cancelled() and waiter.given.exception() is None:
                place = waiter.given.result()  # given in the moment in which it gave up
                place.replica.breaker.abandoned(place.begun_s)
                self.leave(place)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError("no engine had a place before the answer's time was over") from error
            raise

    def leave(self, place: Place, slowness: float | None = None) -> None:
        """A place is free again.

        Args:
            slowness: how many times as long the answer took as it should have; None: not known.
        """
        replica = place.replica
        if slowness is not None:
            # Stochastic approximation of a quantile (Robbins and Monro, 1951), of factors.
            exceeded = slowness > self._caution
            factor = math.exp(_CAUTION_STEP * (exceeded - (1 - _IN_TIME_SHARE)))
            self._caution = min(_MOST_CAUTION, max(_LEAST_CAUTION, self._caution * factor))
        replica.num_running -= 1
        replica.last_used_s = self._clock()
        self._give_out()

    def close(self, reason: str) -> None:
        """Nobody waits any more."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.given.done():
                waiter.given.set_exception(BackendUnavailableError(f"the model takes no requests now: {reason}"))
        self._closed = reason

    def _take(self, wish: Wish) -> Place | None:
        """A place, if there is one for it.

        Raises:
            OverloadedError: there is, but the answer would not be complete in time, there or elsewhere.
        """
        request, left_s = wish.request, wish.deadline_s - self._clock()
        healthy = [replica for replica in self._replicas if replica.is_healthy and replica.suits(request)]
        # Those that failed on it may have come back, when there is nobody else.
        wanted = [replica for replica in healthy if replica.name not in wish.avoid] or healthy
        free = [replica for replica in wanted if replica.is_free]
        if not free:
            return None
        takes_s, caution = self._predict(wanted, request), self._caution_for(request)
        in_time = [replica for replica in wanted if caution * takes_s[replica.name] <= left_s]
        # One that has nothing to do is always tried: a prediction that keeps everybody out would never be mended.
        able = [r for r in free if wish.is_accepted or not r.num_running or r in in_time]
        if not able:
            if in_time:
                return None  # they are full, which the others need not be
            raise _too_late(caution * min(takes_s.values()), left_s)
        replica = self._choose(able, request)
        replica.num_running += 1
        replica.breaker.begin()
        return Place(replica=replica, begun_s=self._clock())

    def _give_out(self) -> None:
        """Give the places that are free to those who wait."""
        for waiter in list(self._waiters):
            if not any(replica.is_free for replica in self._replicas):
                return
            if waiter.given.done():
                continue  # its task was cancelled, and has not noticed yet
            try:
                place = self._take(waiter.wish)
            except OverloadedError as error:
                waiter.given.set_exception(error)
            else:
                if place is None:
                    continue
                waiter.given.set_result(place)
            self._waiters.remove(waiter)

    async def _look(self) -> None:
        while self._waiters:
            await asyncio.sleep(_LOOK_S)
            self._give_out()

    def _check(self, wish: Wish) -> None:
        """Refuse whoever would wait for nothing."""
        request = wish.request
        called = [replica for replica in self._replicas if replica.is_called(request.engine)]
        if not called:
            names = ", ".join(dict.fromkeys(name for r in self._replicas for name in (r.kind, r.name)))
            raise InvalidRequestError(
                f"no engine of this model is called {request.engine!r}; its engines: {names}", param="engine"
            )
        suitable = [replica for replica in called if replica.suits(request)]
        if not suitable:
            refusal = called[0].refusal(request)
            raise InvalidRequestError(f"no engine of this model can give this answer: {refusal}")
        if wish.is_accepted:
            return
        healthy = [replica for replica in suitable if replica.is_healthy]
        if not healthy:
            raise self._unavailable(suitable)
        takes_s = self._predict(healthy, request)
        per_s = sum(replica.num_running / (takes_s[replica.name] or 1.0) for replica in healthy)
        wait_s = (len(self._waiters) + 1) / per_s if per_s else 0.0
        if len(self._waiters) >= self.max_queued:
            message = f"the queue is full ({self.max_queued} requests)"
            raise OverloadedError(message, retry_after_s=_sensible(wait_s))
        left_s = wish.deadline_s - self._clock()
        complete_s = self._caution_for(request) * (wait_s + min(takes_s.values()))
        if complete_s > left_s:
            raise _too_late(complete_s, left_s)

    def _caution_for(self, request: Request) -> float:
        """Who names no time has plenty, and had better be late than refused for what is only feared."""
        return 1.0 if request.timeout_s is None else self._caution

    def _unavailable(self, replicas: Sequence[Replica]) -> BackendUnavailableError:
        reasons = []
        for replica in replicas:
            if replica.start_failure is not None:
                reasons.append(f"{replica.name} could not be started: {replica.start_failure}")
            elif not replica.backend.is_ready:
                reasons.append(f"{replica.name} is starting")
            else:
                reasons.append(f"{replica.name} has failed too often lately")
        wait_s = min(replica.breaker.reopens_in_s for replica in replicas)
        return BackendUnavailableError(f"no engine is ready: {'; '.join(reasons)}", retry_after_s=max(1.0, wait_s))


def _too_late(may_take_s: float, left_s: float) -> OverloadedError:
    return OverloadedError(
        f"the answer may take {may_take_s:.1f} s with what is under way, and its time is over in {left_s:.1f} s",
        retry_after_s=_sensible(may_take_s - left_s),
    )


def _sensible(wait_s: float) -> float:
    """When trying again makes sense."""
    return min(_MAX_RETRY_AFTER_S, max(1.0, wait_s))
