"""The road every generated answer takes, whatever the API: engine chunks in, text deltas out.

Each choice of a request is a `core.Request` of its own, pumped by a task into one queue. Leaving the stream for
any reason (a stop string, an error, a client that left) closes every engine stream before it returns.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from localmoe.core.errors import EngineFaultError
from localmoe.core.events import EventBus, RequestFinished
from localmoe.core.request import FinishReason, Request, TokenChunk, TokenLogprob, Usage
from localmoe.gateway.context import ServedModel
from localmoe.gateway.fields import PromptTokensDetails, UsageCounts
from localmoe.text.detokenizer import IncrementalDetokenizer
from localmoe.text.stop_strings import StopStringDetector
from localmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer to generate."""

    index: int
    """Its place in the API's `choices`."""
    request: Request
    stop_strings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """A token of the answer with its probability and its place in the answer's text."""

    logprob: TokenLogprob
    text_offset: int
    """Characters of the answer before it."""


@dataclass(frozen=True, kw_only=True)
class ChoiceDelta:
    """The next piece of one answer. The last one, and only it, has a `finish_reason`."""

    index: int
    text: str
    scored: list[ScoredToken]
    """Tokens that begin in the text sent so far, where log-probabilities were asked for."""
    prompt_logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    completion_tokens: int
    """Tokens generated so far."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache, as far as the engine has said; it does with the first chunk."""


class AnswerAssembler:
    """Text, stop strings and log-probabilities of one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice) -> None:
        self._choice = choice
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStringDetector(choice.stop_strings)
        self._num_chars = 0
        self._num_chars_sent = 0
        self._waiting: list[ScoredToken] = []
        self.num_tokens = 0
        self.usage: Usage | None = None
        """The engine's own, as it said last."""

    def push(self, chunk: TokenChunk) -> ChoiceDelta:
        """What the chunk adds. After a delta with a finish reason nothing more may be pushed."""
        text = ""
        self.usage = chunk.usage or self.usage
        finish = chunk.finish_reason
        stop_ids = self._choice.request.sampling.stop_token_ids
        for place, token_id in enumerate(chunk.token_ids):
            self.num_tokens += 1
            if chunk.logprobs:
                scored = ScoredToken(logprob=chunk.logprobs[place], text_offset=self._num_chars)
                self._waiting.append(scored)
            ends = finish == FinishReason.STOP and place + 1 == len(chunk.token_ids) and token_id in stop_ids
            piece = "" if ends else self._detokenizer.push(token_id)
            self._num_chars += len(piece)
            text += self._stops.push(piece)
            if self._stops.matched is not None:
                finish = FinishReason.STOP
                break
        if finish is not None and self._stops.matched is None:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self._num_chars_sent += len(text)
        return ChoiceDelta(
            index=self._choice.index,
            text=text,
            scored=self._release(finish),
            prompt_logprobs=chunk.prompt_logprobs,
            finish_reason=finish,
            completion_tokens=self.num_tokens,
            cached_tokens=self.usage.cached_tokens if self.usage else 0,
        )

    def _release(self, finish: FinishReason | None) -> list[ScoredToken]:
        """Scored tokens whose text was sent; at the end all of them, but those that a stop string cut off."""
        if finish is not None and self._stops.matched is None:
            ready, self._waiting = self._waiting, []
            return ready
        ready = [token for token in self._waiting if token.text_offset < self._num_chars_sent]
        self._waiting = self._waiting[len(ready) :]
        return ready


@dataclass(kw_only=True)
class _Meter:
    """Times one answer for `RequestFinished`."""

    started_s: float
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)

    def count(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now_s = time.monotonic()
        if self.first_s is None:
            self.first_s = now_s
            num_tokens -= 1
        self.gaps_s += [(now_s - max(self.last_s, self.first_s)) / num_tokens] * num_tokens if num_tokens else []
        self.last_s = now_s


async def stream_choices(
    model: ServedModel, choices: Sequence[Choice], *, api: str, bus: EventBus, started_s: float
) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of all choices as they come, those of one choice in order.

    Args:
        api: the route's name in `RequestFinished`.
        started_s: monotonic time at which the HTTP request came.

    Raises:
        BackendUnavailableError: see `Generator.generate`.
        EngineFaultError: see `Generator.generate`; also for a stream that ends without a finish reason.
    """
    queue: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        failure: Exception | None = EngineFaultError("the engine broke the answer off")
        try:
            meter = _Meter(started_s=started_s)
            async with aclosing(_answer(model, choice, meter, api=api, bus=bus)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
                    if delta.finish_reason is not None:
                        failure = None
        except Exception as error:
            failure = error
        finally:  # also for a cancellation that came from below: whoever reads the queue must not wait for ever
            if failure is not None:
                queue.put_nowait(failure)

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    unfinished = len(tasks)
    try:
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= item.finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(
    model: ServedModel, choice: Choice, meter: _Meter, *, api: str, bus: EventBus
) -> AsyncGenerator[ChoiceDelta, None]:
    """One choice's deltas; publishes how it ended."""
    assembler = AnswerAssembler(model.text.tokenizer, choice)
    outcome = "error"
    try:
        async with aclosing(model.generator.generate(choice.request)) as chunks:
            async for chunk in chunks:
                before = assembler.num_tokens
                delta = assembler.push(chunk)
                meter.count(assembler.num_tokens - before)
                if delta.finish_reason is not None:
                    outcome = delta.finish_reason.value
                if delta.text or delta.scored or delta.prompt_logprobs or delta.finish_reason:
                    yield delta
                if delta.finish_reason is not None:
                    return
        raise EngineFaultError("the engine ended its stream without a finish reason")
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "abort" if outcome == "error" else outcome
        raise
    finally:
        ttft_s = None if meter.first_s is None else meter.first_s - meter.started_s
        bus.publish(
            RequestFinished(
                model=model.id,
                api=api,
                outcome=outcome,
                prompt_tokens=len(choice.request.prompt_ids),
                completion_tokens=assembler.num_tokens,
                time_to_first_token_s=ttft_s,
                inter_token_s=tuple(meter.gaps_s),
                queue_s=assembler.usage.queue_s if assembler.usage else None,
                prefill_s=assembler.usage.prefill_s if assembler.usage else None,
                e2e_s=time.monotonic() - meter.started_s,
            )
        )


class UsageCounter:
    """Adds up token counts over the choices of one HTTP request.

    Args:
        choices: grouped by prompt, `n` answers each.
    """

    def __init__(self, choices: Sequence[Choice], n: int) -> None:
        self._prompt_tokens = sum(len(choice.request.prompt_ids) for choice in choices[::n])
        self._n = n
        self._completion: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def count(self, delta: ChoiceDelta) -> None:
        """Take note of a delta."""
        self._completion[delta.index] = delta.completion_tokens
        if delta.index % self._n == 0:
            self._cached[delta.index] = delta.cached_tokens

    def usage(self) -> UsageCounts:
        """The totals so far."""
        completion_tokens = sum(self._completion.values())
        return UsageCounts(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )
