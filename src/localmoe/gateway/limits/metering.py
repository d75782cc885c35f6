"""Charges generation to whoever asks for it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from localmoe.core.errors import DeadlineExceededError, LocalMoEError
from localmoe.core.request import Request
from localmoe.gateway.exchange import current_exchange

_BYTES_PER_TOKEN = 4
"""Of text whose tokenizer is not here."""


@asynccontextmanager
async def metered(prompt_tokens: int, most_answer_tokens: int) -> AsyncIterator[None]:
    """Generation for the request that is being answered. What its answers took is in the `RequestFinished` that are
    published inside.

    Raises:
        RateLimitedError: whoever asks had too much lately.
    """
    exchange = current_exchange()
    if exchange is None:
        yield
        return
    ticket, before = exchange.ticket, exchange.completion_tokens
    charged = 0 if ticket is None else await ticket.charge(prompt_tokens, most_answer_tokens)
    try:
        yield
    except LocalMoEError as error:
        has_begun = exchange.completion_tokens > before
        if not has_begun and not isinstance(error, DeadlineExceededError):
            prompt_tokens = 0  # it is not their fault, and another model may answer
        raise
    finally:
        exchange.prompt_tokens += prompt_tokens
        if ticket is not None:
            answer_tokens = exchange.completion_tokens - before
            ticket.settle(charged, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)


def num_prompt_tokens(requests: Sequence[Request]) -> int:
    """Of all prompts; one that is in several requests counts once. Estimated where the tokenizer is not here."""
    prompts = {id(request.prompt_ids): request for request in requests}  # they are not copied for each choice
    return sum(len(request.prompt_ids) or _estimate(request) for request in prompts.values())


def _estimate(request: Request) -> int:
    return 0 if request.source is None else len(msgspec.json.encode(request.source)) // _BYTES_PER_TOKEN
