"""A model's engines as one `Generator`: one of them for each request, and another when it fails.

An answer goes on where it broke off: the next engine gets the prompt and the tokens that were generated, and sends
what follows. So nothing is lost or repeated; and since a draw is a function of seed and position, a native engine
goes on with the very tokens that its predecessor would have sent. An answer that came as text cannot be continued.

Whose fault a failure is decides what it costs. An engine that dies, is silent or does not answer counts against its
breaker. One that says that it failed on this request does so only if another could answer it: a request that fails
everywhere must not close all engines to everybody.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from localmoe.core.errors import (
    BackendUnavailableError,
    DeadlineExceededError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InvalidRequestError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.events import (
    BreakerChanged,
    EngineAnswered,
    EventBus,
    QueueChanged,
    RequestRefused,
    StreamResumed,
)
from localmoe.core.request import Request, TokenChunk
from localmoe.dispatch.answer import Answer
from localmoe.dispatch.breaker import BreakerState
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.pace import Pace
from localmoe.dispatch.policy import FirstToComplete, Load, Policy
from localmoe.dispatch.prefixes import PrefixMap
from localmoe.dispatch.probe import probe
from localmoe.dispatch.replica import Replica
from localmoe.dispatch.silence import SilenceTimer
from localmoe.dispatch.waiting import Place, WaitingRoom, Wish

logger = logging.getLogger(__name__)

_SMOOTHING = 0.1
_PATIENCE = 1 / 3
"""Of the time that an answer has left, for which an engine may be silent."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 600.0
"""Before an engine that could not be started is tried again."""
_USUAL_TOKENS = 128.0
"""Of an answer, before there was one."""


class _HurriedError(BackendUnavailableError):
    """An engine was silent for too long for a client in a hurry, which says nothing of the engine."""


class Dispatcher:
    """Serves one model with several engines.

    Args:
        model: the name it is served under.
        replicas: its engines; not started yet.
        policy: chooses among those that have a place.
        config: bounds and times.
        bus: gets what happens.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        model: str,
        replicas: Sequence[Replica],
        policy: Policy,
        config: DispatchConfig,
        bus: EventBus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.replicas = tuple(replicas)
        self._policy = policy
        self._config = config
        self._bus = bus
        self._clock = clock
        self._room = WaitingRoom(
            self.replicas, self._choose, self._predict, max_queued=config.max_queued, clock=clock
        )
        self._prefixes = PrefixMap()
        self._answer_tokens: float | None = None
        """Of an answer, a running mean."""
        self._starting: asyncio.Task[None] | None = None
        self._open_breakers: set[str] = set()
        self._refused: str | None = None
        self._num_pausing = 0
        """Requests between two attempts."""

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted now."""
        return self._refused is None and any(replica.is_healthy for replica in self.replicas)

    @property
    def is_starting(self) -> bool:
        """Whether there are engines that were not tried yet."""
        return not all(replica.backend.is_ready or replica.start_failure for replica in self.replicas)

    @property
    def num_open(self) -> int:
        """Requests that wait or are being answered."""
        return self._room.num_waiting + self._room.num_running + self._num_pausing

    def reconfigure(self, config: DispatchConfig, policy: Policy) -> None:
        """Go by other settings from now on; answers under way keep the time that they were given."""
        self._config = config
        self._policy = policy
        self._room.max_queued = config.max_queued
        for replica in self.replicas:
            replica.breaker.reconfigure(max_failures=config.breaker_failures, open_s=config.breaker_open_s)

    async def start(self) -> None:
        """Start the engines in turn, so that each sees the memory that the others left; return with the first.

        Raises:
            EngineStartError: none of them can start.
        """
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starting = asyncio.create_task(self._start_all(first))
        try:
            await asyncio.shield(first)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End all engines; requests that they still answer fail, and so do those that wait."""
        self._refused = self._refused or "it was stopped"
        self._room.close(self._refused)
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(replica.backend.stop() for replica in self.replicas))

    def refuse_new(self, reason: str) -> None:
        """Take no more requests; those that are here are answered."""
        self._refused = reason

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`.

        Raises:
            DeadlineExceededError: the answer was not complete in time.
        """
        if self._refused is not None:
            raise BackendUnavailableError(f"{self.model} takes no requests now: {self._refused}")
        limit_s = min(request.timeout_s or self._config.request_timeout_s, self._config.request_timeout_s)
        answer = Answer(request, deadline_s=self._clock() + limit_s)
        while True:
            place = await self._enter(answer)
            outcome = "abort"
            try:
                async with aclosing(self._attempt(place, answer)) as chunks:
                    async for chunk in chunks:
                        if chunk.finish_reason is not None:
                            outcome = "complete"  # before the chunk goes: whoever has it need not ask for more
                            self._praise(place, answer)
                            self._learn_length(answer)
                        yield chunk
                return
            except GeneratorExit:  # no more is wanted of what comes, as behind a stop sequence
                self._praise(place, answer)
                raise
            except LocalMoEError as error:
                failure = error
                outcome = "deadline" if isinstance(error, DeadlineExceededError) else "failed"
                self._blame(place, answer, error)
            finally:
                if outcome == "abort":
                    place.replica.breaker.abandoned(place.begun_s)
                self._leave(place, answer, outcome)
            await self._before_retry(answer, failure)

    async def _enter(self, answer: Answer) -> Place:
        wish = Wish(
            request=answer.rest(),
            deadline_s=answer.deadline_s,
            avoid=answer.failed,
            is_accepted=answer.num_attempts > 0,
        )
        try:
            self._bus.publish(QueueChanged(model=self.model, num_waiting=self._room.num_waiting + 1))
            place = await self._room.enter(wish)
        except BackendUnavailableError as error:
            kinds = {OverloadedError: "overloaded", DeadlineExceededError: "deadline"}
            self._bus.publish(RequestRefused(model=self.model, reason=kinds.get(type(error), "unavailable")))
            raise answer.verdict(error) from None
        finally:
            self._bus.publish(QueueChanged(model=self.model, num_waiting=self._room.num_waiting))
        answer.num_attempts += 1
        return place

    async def _attempt(self, place: Place, answer: Answer) -> AsyncGenerator[TokenChunk, None]:
        """What one engine sends of an answer, in time."""
        replica, request = place.replica, answer.rest()
        known = self._known_tokens(request).get(replica.name, 0)
        if not request.embed:
            self._prefixes.record(request.prompt_ids, replica.name, scope=request.cache_scope)
        pace = Pace(
            replica,
            request,
            known_tokens=known,
            num_beside=lambda: self._num_beside(replica),
            clock=self._clock,
        )
        silence = SilenceTimer(lambda since_s: self._silence_s(replica, answer, pace, since_s), clock=self._clock)
        try:
            async with aclosing(replica.backend.generate(request)) as chunks:
                while True:
                    silence.begin()
                    chunk = await anext(chunks, None)
                    silence.end()
                    if chunk is None:
                        raise EngineFaultError("the engine ended its stream without a finish reason")
                    if not pace.has_begun:
                        replica.breaker.begun(place.begun_s)
                        if answer.engine is not None:
                            self._say_resumed(replica, answer)
                    pace.take(chunk)
                    yield answer.take(chunk, replica.name, self._clock())
                    if chunk.finish_reason is not None:
                        return
                    if answer.last_chunk_s >= answer.deadline_s:
                        # With a reader that is slower than the engine, no chunk has to be waited for.
                        raise DeadlineExceededError("the answer was not complete in time")
        except asyncio.CancelledError:
            limit_s = silence.exceeded()
            if limit_s is None:
                raise
            pace.give_up()
            raise self._too_silent(answer, limit_s) from None
        except LocalMoEError:
            raise
        except Exception as error:  # engines may be of other packages
            logger.exception("%s: %s failed in a way that nobody foresaw", self.model, replica.name)
            raise EngineFaultError("the engine failed on this request; the server's log says why") from error
        finally:
            silence.close()
            answer.slowness = pace.slowness
            pace.end()

    def _too_silent(self, answer: Answer, limit_s: float) -> LocalMoEError:
        """What it means that no chunk came in time."""
        if self._clock() >= answer.deadline_s:
            return DeadlineExceededError("the answer was not complete in time")
        hurried = answer.request.timeout_s is not None and limit_s < self._config.stall_timeout_s
        kind = _HurriedError if hurried else BackendUnavailableError
        return kind(f"the engine sent nothing for {limit_s:.1f} s")

    def _silence_s(self, replica: Replica, answer: Answer, pace: Pace, since_s: float) -> float:
        """How long a chunk may take that is waited for since then: what is left; or, where another engine could go
        on, so little that it would still be in time, but more than the engine might need when it is busy."""
        left_s = answer.deadline_s - since_s
        # vLLM sends nothing of an answer whose prompt it scores before it is complete.
        scores = answer.engine is None and answer.request.sampling.prompt_logprobs is not None
        if scores or not answer.can_resume or not self._others(answer, beside=replica):
            return left_s
        stall_s = min(self._config.stall_timeout_s, _PATIENCE * left_s)
        return min(left_s, max(stall_s, pace.usual_silence_s))

    def _others(self, answer: Answer, beside: Replica | None = None) -> list[Replica]:
        """Engines that could go on now."""
        return [
            other
            for other in self.replicas
            if other is not beside
            and other.name not in answer.failed
            and other.is_healthy
            and other.suits(answer.gist)
        ]

    def _praise(self, place: Place, answer: Answer) -> None:
        """It could be answered; those who failed on it are to blame after all."""
        place.replica.breaker.succeeded()
        for suspect, begun_s in answer.suspects:
            suspect.breaker.failed(begun_s)
        self._say_breakers()

    def _learn_length(self, answer: Answer) -> None:
        before, count = self._answer_tokens, answer.num_tokens
        if not answer.request.embed:
            self._answer_tokens = count if before is None else before + _SMOOTHING * (count - before)

    def _blame(self, place: Place, answer: Answer, error: LocalMoEError) -> None:
        replica = place.replica
        answer.failed.add(replica.name)
        answer.has_seen_death = answer.has_seen_death or isinstance(error, EngineDiedError)
        match error:
            case EngineFaultError():
                answer.suspects.append((replica, place.begun_s))
                replica.breaker.abandoned(place.begun_s)
            case InvalidRequestError() | OverloadedError() | _HurriedError():
                replica.breaker.abandoned(place.begun_s)
            case DeadlineExceededError() if answer.request.timeout_s is not None:
                replica.breaker.abandoned(place.begun_s)  # or clients in a hurry could close it
            case _:
                logger.warning("%s: %s failed: %s", self.model, replica.name, error)
                replica.breaker.failed(place.begun_s)
                self._prefixes.forget(replica.name)
        self._say_breakers()

    async def _before_retry(self, answer: Answer, failure: LocalMoEError) -> None:
        """Return when another engine is to be tried; raises the failure where none is."""
        failure = answer.verdict(failure)
        final = isinstance(failure, InvalidRequestError | DeadlineExceededError)
        if final or not answer.can_resume or answer.num_attempts >= self._config.max_attempts:
            raise failure
        if self._others(answer):
            return
        lives = isinstance(failure, EngineFaultError)  # and would fail again
        if lives or not any(replica.suits(answer.gist) for replica in self.replicas):
            raise failure
        pause_s = self._config.retry_backoff_s * 2 ** (answer.num_attempts - 1)
        if self._clock() + pause_s >= answer.deadline_s:
            raise failure
        self._num_pausing += 1
        try:
            await asyncio.sleep(pause_s)
        finally:
            self._num_pausing -= 1
        answer.failed.clear()

    def _say_resumed(self, replica: Replica, answer: Answer) -> None:
        assert answer.engine is not None
        self._bus.publish(
            StreamResumed(
                model=self.model,
                engine=replica.name,
                failed_engine=answer.engine,
                num_tokens=answer.num_tokens,
                gap_s=self._clock() - answer.last_chunk_s,
            )
        )

    def _leave(self, place: Place, answer: Answer, outcome: str) -> None:
        self._room.leave(place, answer.slowness if outcome in ("complete", "deadline") else None)
        self._bus.publish(EngineAnswered(model=self.model, engine=place.replica.name, outcome=outcome))

    def _choose(self, candidates: Sequence[Replica], request: Request) -> Replica:
        """See `WaitingRoom`."""
        return candidates[0] if len(candidates) == 1 else self._policy.choose(candidates, self._load(request))

    def _predict(self, replicas: Sequence[Replica], request: Request) -> dict[str, float]:
        """See `WaitingRoom`."""
        load = self._load(request)
        return {
            replica.name: FirstToComplete.completion_s(replica, load) if replica.speed.is_known else 0.0
            for replica in replicas
        }

    def _load(self, request: Request) -> Load:
        return Load(
            num_prompt_tokens=len(request.prompt_ids) + len(request.resumed_ids),
            expected_tokens=self._expected_tokens(request.sampling.max_tokens - len(request.resumed_ids)),
            known_tokens=self._known_tokens(request),
            num_beside={replica.name: self._num_beside(replica) for replica in self.replicas},
        )

    def _num_beside(self, replica: Replica) -> int:
        """Answers under way in others with the same processor."""
        return sum(
            other.num_running
            for other in self.replicas
            if other is not replica and other.processor is replica.processor
        )

    def _known_tokens(self, request: Request) -> Mapping[str, int]:
        """By engine, prompt tokens that it need not compute again; an embedding needs all, and leaves none behind."""
        if request.embed:
            return {}
        return self._prefixes.known_tokens(request.prompt_ids, scope=request.cache_scope)

    def _expected_tokens(self, most: int) -> float:
        """Of an answer that may have so many more: most that may be long are not."""
        return min(most, 2 * (self._answer_tokens or _USUAL_TOKENS))

    def _say_breakers(self) -> None:
        for replica in self.replicas:
            is_open = replica.breaker.state is not BreakerState.CLOSED
            if is_open != (replica.name in self._open_breakers):
                self._open_breakers ^= {replica.name}
                self._bus.publish(BreakerChanged(model=self.model, engine=replica.name, is_open=is_open))

    async def _start_all(self, first: asyncio.Future[None]) -> None:
        """Start the engines in turn, then try those again that could not be: what they lack may come."""
        failed = list(self.replicas)
        pause_s = 0.0
        while failed:
            await asyncio.sleep(pause_s)
            failed = [replica for replica in failed if not await self._start_one(replica, first)]
            if len(failed) == len(self.replicas) and not first.done():
                first.set_exception(EngineStartError(failed[0].start_failure))
                return
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s or _FIRST_PAUSE_S)

    async def _start_one(self, replica: Replica, first: asyncio.Future[None]) -> bool:
        try:
            await replica.backend.start()
        except Exception as error:
            foreseen = isinstance(error, LocalMoEError)
            logger.error("%s: %s could not be started: %s", self.model, replica.name, error, exc_info=not foreseen)
            replica.start_failure = str(error) or type(error).__name__
            return False
        replica.start_failure = None
        if not first.done():
            first.set_result(None)
        if len(self.replicas) > 1 and not replica.speed.is_known:
            await probe(replica, self.model, self._clock, timeout_s=self._config.stall_timeout_s)
        return True
