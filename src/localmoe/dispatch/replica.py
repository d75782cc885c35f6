"""One of a model's engines, as dispatch sees it."""

import time
from collections.abc import Callable, Sequence

from localmoe.backends.base import Backend
from localmoe.core.request import Request
from localmoe.dispatch.breaker import CircuitBreaker
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.speed import Processor, SpeedModel

_SMOOTHING = 0.1
"""Weight of the latest value in running means."""


class Replica:
    """An engine with its load, its health and its speed. Dispatch alone changes it.

    Args:
        name: unique among the model's engines.
        kind: of engine: `native`, `vllm` and so on.
        devices: GPUs that it runs on, by index; none for a CPU or another machine.
        takes_adapters: whether it knows the model's adapters.
        processor: what it computes with; None: one that no other engine of the model has.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        backend: Backend,
        config: DispatchConfig,
        devices: Sequence[int] = (),
        takes_adapters: bool = False,
        processor: Processor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.kind = kind
        self.backend = backend
        self.devices = tuple(devices)
        self._takes_adapters = takes_adapters
        self.breaker = CircuitBreaker(
            max_failures=config.breaker_failures, open_s=config.breaker_open_s, clock=clock
        )
        self.processor = processor or Processor()
        self.speed = SpeedModel(self.processor)
        self.num_running = 0
        """Answers under way."""
        self.backlog_tokens = 0
        """Prompt tokens of answers under way that have not begun, and are computed before those that come now."""
        self.start_failure: str | None = None
        """Why it could not be started, if so."""
        self.last_used_s = clock()
        self.cache_share = 1.0
        """Of prompt tokens that it has computed before, those that it did not compute again."""

    @property
    def is_free(self) -> bool:
        """Whether a request would be computed at once."""
        return self.num_running < self.backend.capacity

    @property
    def is_healthy(self) -> bool:
        """Whether it would take a request, if it has a place."""
        return self.backend.is_ready and self.breaker.admits

    def is_called(self, engine: str | None) -> bool:
        """Whether a request that names an engine means this one."""
        return engine is None or engine in (self.kind, self.name)

    def suits(self, request: Request) -> bool:
        """Whether it can give this answer at all."""
        return self.is_called(request.engine) and self.refusal(request) is None

    def refusal(self, request: Request) -> str | None:
        """Why it could not give it; None if it can. An engine that has no adapters is not even asked: it might answer
        with the model itself."""
        if request.adapter is not None and not self._takes_adapters:
            return f"{self.name} adds no adapters to the model"
        return self.backend.refusal(request)

    def learn_cached(self, cached_tokens: int, known_tokens: int) -> None:
        """Take note of what its prefix cache had, of so many tokens that it had computed before."""
        if known_tokens:
            share = min(1.0, cached_tokens / known_tokens)
            self.cache_share += _SMOOTHING * (share - self.cache_share)
