"""What answers took lately, for people who ask without a Prometheus."""

import time
from collections import deque
from collections.abc import Callable

from localmoe.core.events import Event, EventBus, RequestFinished
from localmoe.core.protocols import Summary

MAX_AGE_S = 3600.0
_MAX_ANSWERS = 50_000


class Performance:
    """A `PerformanceStats`: keeps what each answer of the last hour took, at most 50,000 of them."""

    def __init__(self, bus: EventBus, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answers: deque[tuple[float, str, dict[str, float]]] = deque(maxlen=_MAX_ANSWERS)
        """(when it finished, model, what it took)."""
        bus.subscribe(self._on_event)

    def summaries(self, window_s: float, model: str | None) -> dict[str, Summary]:
        """See `PerformanceStats.summaries`."""
        since_s = self._clock() - window_s
        values: dict[str, list[float]] = {}
        for finished_s, name, took in reversed(self._answers):
            if finished_s < since_s:
                break
            if model in (None, name):
                for key, value in took.items():
                    values.setdefault(key, []).append(value)
        return {
            key: Summary(
                count=len(found), sum=sum(found), mean=sum(found) / len(found), min=min(found), max=max(found)
            )
            for key, found in values.items()
        }

    def _on_event(self, event: Event) -> None:
        if not isinstance(event, RequestFinished):
            return
        took = {
            "e2e_s": event.e2e_s,
            "prompt_tokens": float(event.prompt_tokens),
            "completion_tokens": float(event.completion_tokens),
        }
        if event.time_to_first_token_s is not None:
            took["time_to_first_token_s"] = event.time_to_first_token_s
        if event.inter_token_s:
            took["inter_token_s"] = sum(event.inter_token_s) / len(event.inter_token_s)
        if event.queue_s is not None:
            took["queue_s"] = event.queue_s
        now_s = self._clock()
        self._answers.append((now_s, event.model, took))
        while self._answers[0][0] < now_s - MAX_AGE_S:
            self._answers.popleft()
