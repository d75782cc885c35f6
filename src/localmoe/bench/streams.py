"""Drives an engine in this process with many requests at once, and times what comes out.

Prompts are random, so that none shares its beginning with another; answers are greedy, of a fixed length.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import Request, RequestFailed, SamplingParams
from localmoe.engine.engine import Engine

WARM_S = 1.0
"""At the start of a saturated run, not counted."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The requests."""

    count: int = 100
    """How many are open at a time, on average where they arrive by themselves."""
    prompt_tokens: int = 128
    output_tokens: int = 64
    seconds: float = 6.0
    """How long the engine is kept saturated, the warm second included."""
    num_timed: int = 200
    """Arrivals whose first tokens are timed, after `count` that fill the engine."""


@dataclass(frozen=True, kw_only=True)
class Saturated:
    """A new request for each that is finished."""

    tok_s: float
    """Tokens generated, of all streams together."""
    requests_s: float
    """Requests finished."""


class StreamDriver:
    """Sends requests to an engine that nobody else uses."""

    def __init__(self, engine: Engine, vocab_size: int, streams: Streams) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._streams = streams
        self._rng = np.random.default_rng(0)
        self._num_added = 0

    def saturated(self, on_step: Callable[[], None]) -> Saturated:
        """Keep `count` requests open for some seconds.

        Args:
            on_step: called after every step that counts.

        Raises:
            EngineFaultError: a request failed.
        """
        streams = self._streams
        for _ in range(streams.count):
            self._add()
        warm_s = min(WARM_S, streams.seconds / 2)
        num_tokens, counted_s = 0, 0.0
        before_s = started_s = time.perf_counter()
        while before_s - started_s < streams.seconds or not counted_s:
            step = list(self._step())
            for _, _, is_last in step:
                if is_last:
                    self._add()
            now_s = time.perf_counter()
            if before_s - started_s >= warm_s:
                num_tokens += sum(count for _, count, _ in step)
                counted_s += now_s - before_s
                on_step()
            before_s = now_s
        self._drain()
        tok_s = num_tokens / counted_s
        return Saturated(tok_s=tok_s, requests_s=tok_s / streams.output_tokens)

    def times_to_first_token(self, requests_s: float) -> list[float]:
        """Seconds from arrival to first token, of Poisson arrivals at this rate whether or not the engine keeps up.

        A request arrives when its time has come, not when the engine looks: waiting for the step before it counts.

        Raises:
            EngineFaultError: a request failed.
        """
        num_arrivals = self._streams.count + self._streams.num_timed
        arrivals_s = np.cumsum(self._rng.exponential(1 / requests_s, num_arrivals)).tolist()
        arrived_s: dict[str, float] = {}
        waits_s: dict[str, float] = {}
        started_s = time.perf_counter()
        while len(waits_s) < num_arrivals:
            now_s = time.perf_counter() - started_s
            while len(arrived_s) < num_arrivals and arrivals_s[len(arrived_s)] <= now_s:
                due_s = arrivals_s[len(arrived_s)]
                arrived_s[self._add()] = due_s
            if not self._engine.has_work:
                time.sleep(max(0.0, arrivals_s[len(arrived_s)] - now_s))
                continue
            for request_id, count, _ in self._step():
                if count and request_id not in waits_s:
                    waits_s[request_id] = time.perf_counter() - started_s - arrived_s[request_id]
        self._drain()
        return [waits_s[request_id] for request_id in list(arrived_s)[self._streams.count :]]

    def _add(self) -> str:
        streams, name = self._streams, str(self._num_added)
        self._num_added += 1
        prompt_ids = self._rng.integers(0, self._vocab_size, streams.prompt_tokens).tolist()
        sampling = SamplingParams(max_tokens=streams.output_tokens, temperature=0.0)
        self._engine.add(Request(id=name, model="", prompt_ids=prompt_ids, sampling=sampling))
        return name

    def _step(self) -> Iterator[tuple[str, int, bool]]:
        """Of each request that something came from: its id, its new tokens, and whether it is finished."""
        for output in self._engine.step():
            if isinstance(output, RequestFailed):
                raise EngineFaultError(f"the engine failed on a request: {output.message}")
            yield output.request_id, len(output.token_ids), output.finish_reason is not None

    def _drain(self) -> None:
        for number in range(self._num_added):
            self._engine.cancel(str(number))
        assert not self._engine.has_work, "all were cancelled"


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]
