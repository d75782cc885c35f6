"""Times one engine's part of an answer, for what is learned of its speed."""

from collections.abc import Callable

from localmoe.core.request import Request, TokenChunk
from localmoe.dispatch.replica import Replica

_SEGMENT_TOKENS = 16
"""The pace is noted so often, so that a slow engine is known before its first answer is complete."""
_LEAST_TOKENS = 4
"""Of fewer tokens at the end, the pace is mostly chance."""
_SLOW_FIRST, _SLOW_NEXT = 3.0, 5.0
"""Times the predicted wait for a first token, and between two, for which an engine that works may be silent."""


class Pace:
    """Watches the chunks of one request.

    Args:
        replica: the engine; learns from it.
        request: as the engine has it.
        known_tokens: of the prompt, that the engine had computed before.
        num_beside: answers under way in the model's other engines now.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        replica: Replica,
        request: Request,
        *,
        known_tokens: int,
        num_beside: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._replica = replica
        self._num_prompt_tokens = len(request.prompt_ids) + len(request.resumed_ids)
        self._known_tokens = known_tokens
        self._num_beside = num_beside
        self._clock = clock
        self._began_s = self._since_s = clock()
        self._load = self._load_now()
        self._num_tokens = 0
        """Since the segment began."""
        self._to_compute = max(0, int(self._num_prompt_tokens - replica.cache_share * known_tokens))
        """Prompt tokens, as far as is known before the engine says."""
        self._before = replica.backlog_tokens
        """Prompt tokens of others that it computes first."""
        replica.backlog_tokens += self._to_compute
        self.has_begun = False
        """Whether a chunk came."""
        self._knows_cached = False
        """Whether the engine said at once what it had found in its cache."""
        self._took_s = self._predicted_s = 0.0
        """Of what was noted so far, each with the load that there was."""
        self.usual_silence_s = 0.0
        """For which even a busy engine that works may send nothing; 0 where no speed is known."""
        self._expect_silence()

    def take(self, chunk: TokenChunk) -> None:
        """Take note of a chunk."""
        now_s = self._clock()
        if not self.has_begun:
            self.has_begun = True
            self._replica.backlog_tokens -= self._to_compute
            computed = self._before + self._to_compute
            if chunk.usage is not None:
                self._knows_cached = True
                self._replica.learn_cached(chunk.usage.cached_tokens, self._known_tokens)
                computed = self._before + max(0, self._num_prompt_tokens - chunk.usage.cached_tokens)
            running, beside = self._load
            self._note(now_s - self._began_s, self._replica.speed.first_s(computed, int(running), int(beside)))
            self._replica.speed.observe_first(computed, running, beside, now_s - self._began_s)
            self._begin_segment(now_s)
            return
        if chunk.usage is not None and not self._knows_cached:
            self._replica.learn_cached(chunk.usage.cached_tokens, self._known_tokens)
        self._num_tokens += len(chunk.token_ids) or (chunk.text is not None)
        ends = chunk.finish_reason is not None and self._num_tokens >= _LEAST_TOKENS
        if ends or self._num_tokens >= _SEGMENT_TOKENS:
            before, after = self._load, self._load_now()
            load = ((before[0] + after[0]) / 2, (before[1] + after[1]) / 2)
            token_s = self._replica.speed.token_s(round(load[0]), round(load[1]))
            self._note(now_s - self._since_s, self._num_tokens * token_s)
            self._replica.speed.observe_between(*load, (now_s - self._since_s) / self._num_tokens)
            self._begin_segment(now_s)

    def end(self) -> None:
        """No chunk follows."""
        if not self.has_begun:
            self._replica.backlog_tokens -= self._to_compute

    @property
    def slowness(self) -> float | None:
        """How many times as long the answer takes as it should; None where no speed was known."""
        return self._took_s / self._predicted_s if self._predicted_s else None

    def give_up(self) -> None:
        """No chunk came in time. It would have taken longer still, but so much is known."""
        now_s, (running, beside) = self._clock(), self._load_now()
        speed, waited_s = self._replica.speed, now_s - self._since_s
        if not self.has_begun:
            to_compute = self._before + self._to_compute
            if waited_s > speed.first_s(to_compute, int(running), int(beside)):
                speed.observe_first(to_compute, running, beside, waited_s)
            return
        token_s = waited_s / (self._num_tokens + 1)
        if token_s > speed.token_s(int(running), int(beside)):
            speed.observe_between(running, beside, token_s)

    def _note(self, took_s: float, predicted_s: float) -> None:
        if self._replica.speed.is_known:
            self._took_s += took_s
            self._predicted_s += predicted_s

    def _begin_segment(self, now_s: float) -> None:
        self._since_s, self._num_tokens, self._load = now_s, 0, self._load_now()
        self._expect_silence()

    def _expect_silence(self) -> None:
        # Once a segment: it is asked for with every chunk.
        speed, (running, beside) = self._replica.speed, map(int, self._load)
        if speed.is_known:
            first_s = speed.first_s(self._before + self._to_compute, running, beside)
            self.usual_silence_s = max(_SLOW_FIRST * first_s, _SLOW_NEXT * speed.token_s(running, beside))

    def _load_now(self) -> tuple[float, float]:
        """Answers under way beside this one: in the engine, and in the others."""
        return self._replica.num_running - 1, self._num_beside()
