"""Charges generation to whoever asks for it."""

from collections.abc import Sequence

import msgspec

from localmoe.core.errors import DeadlineExceededError, LocalMoEError
from localmoe.core.request import Request
from localmoe.gateway.exchange import current_exchange

_BYTES_PER_TOKEN = 4
"""Of text whose tokenizer is not here."""


class Metered:
    """Generation for the request that is being answered, as a context. What its answers took is in the
    `RequestFinished` that are published inside.

    Entering it raises `RateLimitedError` where whoever asks had too much lately.
    """

    # It lasts as long as a stream, of which there are many: as a generator it would be six times as large.
    __slots__ = ("_before", "_charged", "_exchange", "_most_answer_tokens", "_prompt_tokens")

    def __init__(self, prompt_tokens: int, most_answer_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._most_answer_tokens = most_answer_tokens
        self._exchange = current_exchange()
        self._before = self._charged = 0

    async def __aenter__(self) -> None:
        if self._exchange is not None:
            self._before = self._exchange.completion_tokens
            if (ticket := self._exchange.ticket) is not None:
                self._charged = await ticket.charge(self._prompt_tokens, self._most_answer_tokens)

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        prompt_tokens, answer_tokens = self._prompt_tokens, exchange.completion_tokens - self._before
        failed = isinstance(error, LocalMoEError) and not isinstance(error, DeadlineExceededError)
        if failed and answer_tokens == 0:
            prompt_tokens = 0  # it is not their fault, and another model may answer
        exchange.prompt_tokens += prompt_tokens
        if exchange.ticket is not None:
            exchange.ticket.settle(self._charged, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)


def num_prompt_tokens(requests: Sequence[Request]) -> int:
    """Of all prompts; one that is in several requests counts once. Estimated where the tokenizer is not here."""
    prompts = {id(request.prompt_ids): request for request in requests}  # they are not copied for each choice
    return sum(len(request.prompt_ids) or _estimate(request) for request in prompts.values())


def _estimate(request: Request) -> int:
    if request.source is None:
        return 0
    source = msgspec.structs.replace(request.source, content_grammar=None)  # which is no part of the prompt
    return len(msgspec.json.encode(source)) // _BYTES_PER_TOKEN
