"""The road every generated answer takes, whatever the API: engine chunks in, text deltas out.

Each choice of a request is a `core.Request` of its own, pumped by a task into one queue. Leaving the stream for
any reason (a stop string, an error, a client that left) closes every engine stream before it returns.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field

import msgspec

from localmoe.core.errors import EngineFaultError
from localmoe.core.events import EventBus, RequestFinished
from localmoe.core.request import FinishReason, Request, TokenChunk, TokenLogprob, ToolCallDelta, Usage
from localmoe.gateway.context import ServedModel
from localmoe.gateway.fields import PromptTokensDetails, UsageCounts
from localmoe.gateway.limits.metering import Metered, num_prompt_tokens
from localmoe.text.answer_parser import MakeParser, Part, PlainParser, add_part
from localmoe.text.detokenizer import IncrementalDetokenizer
from localmoe.text.stop_strings import StopStringDetector
from localmoe.text.tokenizer import Tokenizer

_MAX_WAITING_DELTAS = 256
"""Of all choices of a request; a client that takes them slowly slows its engines down."""


_MAX_GAPS = 1024
"""That are noted of one chunk: engines elsewhere may say that it has any number of tokens."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer to generate."""

    index: int
    """Its place in the API's `choices`."""
    request: Request
    stop_strings: tuple[str, ...]
    make_parser: MakeParser = PlainParser
    """Of the parser that its text goes through. Text from engines that answer in text has been parsed there."""
    shown_token_ids: frozenset[int] = frozenset()
    """Special tokens that are text to the parser."""


class ScoredToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the answer with its probability and its place in the answer's text."""

    logprob: TokenLogprob
    text_offset: int
    """Characters of the answer before it."""


class ChoiceDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next piece of one answer. The last one, and only it, has a `finish_reason`.

    It has text, reasoning or tool calls, and only one of them, so that what comes first is in the first delta.
    """

    index: int
    text: str
    """Of the content."""
    scored: Sequence[ScoredToken] = ()
    """Tokens that begin in the text sent so far, where log-probabilities were asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache, as far as the engine has said; it does with the first chunk."""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    stop_string: str | None = None
    """The one that ended the answer."""

    @property
    def is_empty(self) -> bool:
        """Whether a client would see nothing of it."""
        return not (
            self.text
            or self.reasoning
            or self.tool_calls
            or self.scored
            or self.finish_reason
            or self.prompt_logprobs is not None
        )


class AnswerAssembler:
    """Text, stop strings and log-probabilities of one answer, token by token.

    Stop strings are looked for in the content, which is what a client sees of them. One does not reach over thoughts
    or calls.
    """

    def __init__(self, tokenizer: Tokenizer | None, choice: Choice) -> None:
        self._choice = choice
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(tokenizer, shown_token_ids=choice.shown_token_ids)
        self._stops = StopStringDetector(choice.stop_strings)
        self._parser = choice.make_parser()
        self._num_chars = 0
        self._content_end = 0
        """Characters of the answer up to the end of the content that there was."""
        self._parts: list[Part] = []
        """To be sent."""
        self._waiting: deque[ScoredToken] = deque()
        self._has_text = tokenizer is None
        """Whether the answer comes as text."""
        self._has_calls = False
        self.num_tokens = 0
        self.usage: Usage | None = None
        """The engine's own, as it said last."""

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt; where it was not tokenized here, as the engine says, and 0 before."""
        return len(self._choice.request.prompt_ids) or (self.usage.prompt_tokens if self.usage else 0)

    def push(self, chunk: TokenChunk) -> list[ChoiceDelta]:
        """What the chunk adds, one delta at least. After one with a finish reason nothing more may be pushed."""
        if chunk.usage is not None:
            self.usage = chunk.usage
        if self._has_text or chunk.text is not None:
            self._take_text(chunk)
        else:
            self._take_ids(chunk)
        if chunk.finish_reason is not None and not self._is_over:
            self._take_rest()
        finish = FinishReason.STOP if self._is_over else chunk.finish_reason
        if finish is not None and self._stops.matched is None:
            self._take_held()
        if finish == FinishReason.STOP and self._has_calls:
            finish = FinishReason.TOOL_CALLS
        parts, self._parts = self._parts or [Part(end=0)], []
        last = len(parts) - 1
        return [
            ChoiceDelta(
                index=self._choice.index,
                text=part.content,
                reasoning=part.reasoning,
                tool_calls=part.tool_calls,
                scored=self._release(part.end, finish if place == last else None) if self._waiting else (),
                prompt_logprobs=chunk.prompt_logprobs if place == 0 else None,
                finish_reason=finish if place == last else None,
                stop_string=self._stops.matched if place == last else None,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=self.num_tokens,
                cached_tokens=self.usage.cached_tokens if self.usage else 0,
            )
            for place, part in enumerate(parts)
        ]

    @property
    def _is_over(self) -> bool:
        """Whether the answer ends before the engine's."""
        return self._stops.matched is not None or self._parser.is_complete

    def _take_text(self, chunk: TokenChunk) -> None:
        """What an engine says that answers in text, which has parsed it."""
        self._has_text = True
        if chunk.usage is not None:
            self.num_tokens = chunk.usage.completion_tokens
        elif chunk.text is not None:
            self.num_tokens += 1  # it may be more, which only the engine knows
        text, calls = chunk.text or "", chunk.tool_calls
        self._num_chars += len(text)
        end = self._num_chars
        # Such a chunk has no order. What goes on with a call that has begun can only be before all else.
        num_continued = next((place for place, call in enumerate(calls) if call.name is not None), len(calls))
        parts = [Part(tool_calls=(call,), end=end) for call in calls]
        if text:
            parts.insert(num_continued, Part(content=text, end=end))
        if chunk.reasoning:
            parts.insert(num_continued, Part(reasoning=chunk.reasoning, end=end))
        self._take(parts)

    def _take_ids(self, chunk: TokenChunk) -> None:
        """What an engine says that answers in token ids."""
        assert self._detokenizer is not None, "token ids come from engines whose tokenizer is here"
        last = len(chunk.token_ids) - 1 if chunk.finish_reason == FinishReason.STOP else None
        for place, token_id in enumerate(chunk.token_ids):
            self.num_tokens += 1
            if chunk.logprobs:
                scored = ScoredToken(logprob=chunk.logprobs[place], text_offset=self._num_chars)
                self._waiting.append(scored)
            ends = place == last and token_id in self._choice.request.sampling.stop_token_ids
            piece = "" if ends else self._detokenizer.push(token_id)
            self._num_chars += len(piece)
            self._take(self._parser.push(piece))
            if self._is_over:
                break

    def _take_rest(self) -> None:
        """What comes to light at the end."""
        if self._detokenizer is not None:
            self._take(self._parser.push(self._detokenizer.flush()))
        if not self._is_over:
            self._take(self._parser.flush())

    def _take(self, parts: Iterable[Part]) -> None:
        """Parts as far as they are certainly before any stop string."""
        for part in parts:
            if not part.content:
                self._take_held()
                self._has_calls |= bool(part.tool_calls)
                add_part(self._parts, part)
                continue
            if part.is_break:
                self._take_held()
                add_part(self._parts, Part(content=part.content, end=part.end))
                continue
            self._content_end = part.end
            text = self._stops.push(part.content)
            if text:
                add_part(self._parts, Part(content=text, end=part.end - self._stops.num_withheld))
            if self._stops.matched is not None:
                return

    def _take_held(self) -> None:
        """Content that can no longer become a stop string."""
        if held := self._stops.flush():
            add_part(self._parts, Part(content=held, end=self._content_end))

    def _release(self, end: int, finish: FinishReason | None) -> list[ScoredToken]:
        """Scored tokens whose text was sent, which is as far as `end`; when the answer ends all of them, but those
        that a stop string cut off."""
        if finish is not None and self._stops.matched is None:
            end = self._num_chars + 1
        ready = []
        while self._waiting and self._waiting[0].text_offset < end:
            ready.append(self._waiting.popleft())
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
            self.first_s = self.last_s = now_s
            num_tokens -= 1
        if num_tokens == 1:
            self.gaps_s.append(now_s - self.last_s)
        elif num_tokens:
            self.gaps_s += [(now_s - self.last_s) / num_tokens] * min(num_tokens, _MAX_GAPS)
        self.last_s = now_s


def stream_choices(
    model: ServedModel, choices: Sequence[Choice], *, api: str, bus: EventBus, started_s: float
) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of all choices as they come, those of one choice in order.

    Args:
        api: the route's name in `RequestFinished`.
        started_s: monotonic time at which the HTTP request came.

    Raises:
        BackendUnavailableError: see `Generator.generate`.
        EngineFaultError: see `Generator.generate`; also for a stream that ends without a finish reason.
        RateLimitedError: whoever asks has had as many tokens as they may.
    """
    requests = [choice.request for choice in choices]
    charge = Metered(num_prompt_tokens(requests), sum(request.sampling.max_tokens for request in requests))

    def answer(choice: Choice, within: AbstractAsyncContextManager[None]) -> AsyncGenerator[ChoiceDelta, None]:
        return _answer(model, choice, _Meter(started_s=started_s), api=api, bus=bus, within=within)

    if len(choices) == 1:
        return answer(choices[0], charge)
    return _merged([answer(choice, nullcontext()) for choice in choices], charge)


async def _merged(
    answers: Sequence[AsyncGenerator[ChoiceDelta, None]], within: AbstractAsyncContextManager[None]
) -> AsyncGenerator[ChoiceDelta, None]:
    queue: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue(_MAX_WAITING_DELTAS)

    async def pump(answer: AsyncGenerator[ChoiceDelta, None]) -> None:
        try:
            async with aclosing(answer):
                async for delta in answer:
                    await queue.put(delta)
        except Exception as error:
            await queue.put(error)

    async with within:
        tasks = [asyncio.create_task(pump(answer)) for answer in answers]
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
    model: ServedModel,
    choice: Choice,
    meter: _Meter,
    *,
    api: str,
    bus: EventBus,
    within: AbstractAsyncContextManager[None],
) -> AsyncGenerator[ChoiceDelta, None]:
    """One choice's deltas; publishes how it ended."""
    assembler = AnswerAssembler(model.text.tokenizer if model.text else None, choice)
    outcome = "error"
    async with within:
        try:
            async with aclosing(model.generator.generate(choice.request)) as chunks:
                async for chunk in chunks:
                    before = assembler.num_tokens
                    deltas = assembler.push(chunk)
                    meter.count(assembler.num_tokens - before)
                    if (finish := deltas[-1].finish_reason) is not None:
                        outcome = finish.value
                    for delta in deltas:
                        if not delta.is_empty:
                            yield delta
                    if finish is not None:
                        return
            raise EngineFaultError("the engine ended its stream without a finish reason")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # it came from below
                raise EngineFaultError("the engine broke the answer off") from None
            outcome = "abort" if outcome == "error" else outcome
            raise
        except GeneratorExit:
            outcome = "abort" if outcome == "error" else outcome
            raise
        finally:
            ttft_s = None if meter.first_s is None else meter.first_s - meter.started_s
            bus.publish(
                RequestFinished(
                    model=model.id,
                    api=api,
                    outcome=outcome,
                    prompt_tokens=assembler.prompt_tokens,
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
        n: answers to each prompt, whose choices are neighbours.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._last: dict[int, ChoiceDelta] = {}

    def count(self, delta: ChoiceDelta) -> None:
        """Take note of a delta."""
        self._last[delta.index] = delta

    def usage(self) -> UsageCounts:
        """The totals, once there has been a delta of each choice."""
        firsts = [delta for index, delta in self._last.items() if index % self._n == 0]
        prompt_tokens = sum(delta.prompt_tokens for delta in firsts)
        completion_tokens = sum(delta.completion_tokens for delta in self._last.values())
        return UsageCounts(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(delta.cached_tokens for delta in firsts)),
        )
