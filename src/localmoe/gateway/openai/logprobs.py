"""Log-probabilities in the shapes of the two OpenAI APIs."""

from collections.abc import Sequence

from localmoe.core.request import TokenLogprob
from localmoe.gateway.answering.generation import ScoredToken
from localmoe.gateway.openai.chat_schema import ChatLogprobs, TokenLogprobEntry, TopLogprob
from localmoe.gateway.openai.completions_schema import CompletionLogprobs
from localmoe.text.detokenizer import IncrementalDetokenizer
from localmoe.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[ScoredToken]) -> ChatLogprobs:
    """Entries of a chat answer's tokens."""
    entries = []
    for item in scored:
        top = [_top(tokenizer, token_id, logprob) for token_id, logprob in item.logprob.top]
        own = _top(tokenizer, item.logprob.token_id, item.logprob.logprob)
        entries.append(TokenLogprobEntry(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=entries, refusal=None)


def completion_logprobs(
    tokenizer: Tokenizer, scored: Sequence[ScoredToken], *, base_offset: int
) -> CompletionLogprobs:
    """Lists over a completion's tokens; `base_offset` is where the answer begins in the choice's text."""
    return CompletionLogprobs(
        tokens=[_written(tokenizer, item.logprob.token_id) for item in scored],
        token_logprobs=[_finite(item.logprob.logprob) for item in scored],
        top_logprobs=[_alternatives(tokenizer, item.logprob) for item in scored],
        text_offset=[base_offset + item.text_offset for item in scored],
    )


def prompt_logprobs(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], scored: Sequence[TokenLogprob], *, num_prefix_tokens: int
) -> CompletionLogprobs:
    """Lists over an echoed prompt.

    Args:
        scored: of the prompt's tokens but the first.
        num_prefix_tokens: tokens at the beginning that the tokenizer had added and the text does not show.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False, at_start=True)
    offsets = []
    num_chars = 0
    for place, token_id in enumerate(prompt_ids):
        offsets.append(num_chars)
        if place >= num_prefix_tokens:
            num_chars += len(detokenizer.push(token_id))
    return CompletionLogprobs(
        tokens=[_written(tokenizer, token_id) for token_id in prompt_ids],
        token_logprobs=[None, *(_finite(item.logprob) for item in scored)],
        top_logprobs=[None, *(_alternatives(tokenizer, item) for item in scored)],
        text_offset=offsets,
    )


def join(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """One after the other."""
    return CompletionLogprobs(
        tokens=[item for part in parts for item in part.tokens],
        token_logprobs=[item for part in parts for item in part.token_logprobs],
        top_logprobs=[item for part in parts for item in part.top_logprobs],
        text_offset=[item for part in parts for item in part.text_offset],
    )


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    return TopLogprob(
        token=tokenizer.token_text(token_id),
        logprob=_finite(logprob),
        bytes=list(tokenizer.token_bytes(token_id)),
    )


def _alternatives(tokenizer: Tokenizer, item: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the token itself even if it is none of them. Of equal texts the likelier stays."""
    found: dict[str, float] = {}
    for token_id, logprob in [*item.top, (item.token_id, item.logprob)]:
        found.setdefault(_written(tokenizer, token_id), _finite(logprob))
    return found


def _written(tokenizer: Tokenizer, token_id: int) -> str:
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
