"""A backend that recites: for tests, and for measuring the gateway without an engine behind it.

It honours `max_tokens`, `stop_token_ids`, cancellation and the shape of log-probabilities and usage. It knows no
probabilities: the recited token is always reported at -0.5 and the alternatives below it. An embedding has 8
dimensions, and says how often the prompt has token ids of each remainder by 8.
"""

import asyncio
import math
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from localmoe.core.errors import BackendUnavailableError, LocalMoEError
from localmoe.core.request import FinishReason, Request, TokenChunk, TokenLogprob, Usage

Script = Callable[[Request], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class ScriptedFailure:
    """Raise `error` in place of the token after the first `after_tokens`."""

    error: LocalMoEError
    after_tokens: int = 0


class ScriptedBackend:
    """Answers every request from a script, one token a chunk.

    Args:
        script: the answer's token ids, the same for each request or computed from it. An answer that comes to
            its end within `max_tokens` finishes with `stop`.
        delay_s: pause before each token.
        failure: where the answer breaks off, if it does.
        capacity: see `Backend.capacity`.
    """

    def __init__(
        self,
        script: Sequence[int] | Script,
        *,
        delay_s: float = 0.0,
        failure: ScriptedFailure | None = None,
        capacity: int = 1000,
    ) -> None:
        self._script: Script = script if callable(script) else lambda _: script
        self._delay_s = delay_s
        self._failure = failure
        self.capacity = capacity
        self._started = False
        self.num_running = 0
        """Requests being answered now."""
        self.num_cancelled = 0
        """Requests whose stream was closed before its end."""

    async def start(self) -> None:
        """See `Backend.start`."""
        self._started = True

    async def stop(self) -> None:
        """See `Backend.stop`."""
        self._started = False

    @property
    def is_ready(self) -> bool:
        """See `Generator.is_ready`."""
        return self._started

    def refusal(self, request: Request) -> str | None:
        """See `Backend.refusal`."""
        return None

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `Generator.generate`."""
        if not self._started:
            raise BackendUnavailableError("the scripted backend is not started")
        self.num_running += 1
        try:
            async with aclosing(self._recite(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    async def _recite(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        sampling = request.sampling
        if request.embed:
            await self._pause(0)
            chunk = self._chunk(request, [], 0, FinishReason.LENGTH, None)
            yield msgspec.structs.replace(chunk, embedding=_embedding(request.prompt_ids))
            return
        answer = list(self._script(request))
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            top = sampling.prompt_logprobs
            prompt_logprobs = [_logprob(token_id, top) for token_id in request.prompt_ids[1:]]
        if not answer or sampling.max_tokens == 0:
            await self._pause(0)
            nothing = FinishReason.LENGTH if sampling.max_tokens == 0 else FinishReason.STOP
            yield self._chunk(request, [], 0, nothing, prompt_logprobs)
            return
        for index, token_id in enumerate(answer):
            if index < len(request.resumed_ids):
                continue
            await self._pause(index)
            reason: FinishReason | None = None
            if token_id in sampling.stop_token_ids or index + 1 == len(answer):
                reason = FinishReason.STOP
            elif index + 1 == sampling.max_tokens:
                reason = FinishReason.LENGTH
            yield self._chunk(request, [token_id], index + 1, reason, prompt_logprobs if index == 0 else None)
            if reason is not None:
                return

    async def _pause(self, index: int) -> None:
        await asyncio.sleep(self._delay_s)
        if self._failure is not None and self._failure.after_tokens == index:
            raise self._failure.error

    @staticmethod
    def _chunk(
        request: Request,
        token_ids: list[int],
        num_tokens: int,
        reason: FinishReason | None,
        prompt_logprobs: list[TokenLogprob] | None,
    ) -> TokenChunk:
        top = request.sampling.logprobs
        usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=num_tokens)
        return TokenChunk(
            request_id=request.id,
            token_ids=token_ids,
            logprobs=[] if top is None else [_logprob(token_id, top) for token_id in token_ids],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            usage=usage if num_tokens <= 1 or reason is not None else None,
        )


def _embedding(prompt_ids: Sequence[int]) -> bytes:
    counts = [sum(token_id % 8 == place for token_id in prompt_ids) for place in range(8)]
    return struct.pack("<8f", *(count / math.hypot(*counts) for count in counts))


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The token itself as the likeliest, then the lowest other ids."""
    others = [other for other in range(num_top + 1) if other != token_id]
    top = [(other, -0.5 - place) for place, other in enumerate([token_id, *others][:num_top])]
    return TokenLogprob(token_id=token_id, logprob=-0.5, top=top)
