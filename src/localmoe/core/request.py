"""A generation request and the stream that answers it, in token ids.

Tokenization happens once, in the gateway. Engines see only what is here, so that any engine with the same
tokenizer can take over a stream at an exact token. These are msgspec structs: they cross process borders as
MessagePack without a copy of their definition.
"""

from enum import StrEnum

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Values are validated where they enter (the gateway), not here.

    Order of application: logit bias, penalties, temperature, top-k, top-p, min-p.
    """

    max_tokens: int
    """Most tokens to generate; 0 only scores the prompt."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p (Holtzman et al., 2019)."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest one's probability (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the output."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Same seed, same request, same tokens. None: drawn by the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends at any of these; the token itself is reported but carries no text."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many alternatives (of the unmodified distribution)."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. Several choices (`n`) are several requests with a common prompt."""

    id: str
    model: str
    prompt_ids: list[int]
    sampling: SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural) of one token and of the likeliest tokens at its position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), likeliest first."""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request took; accompanies the first chunk and the last."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix cache."""
    queue_s: float | None = None
    """From arrival to first being scheduled; None from engines that do not say."""
    prefill_s: float | None = None
    """From first being scheduled to the first token."""


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """The next tokens of one request. The last chunk of a stream, and only it, has a `finish_reason`."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    """One per token in `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """For prompt tokens 1, 2, …; sent once, with the first chunk, where asked for."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """Present on the first chunk and on the last; all but `completion_tokens` is final from the first on."""


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine could not take or compute a request; nothing more comes for it."""

    request_id: str
    message: str
    overloaded: bool = False
    """Refused for want of room, not failed: worth trying again later."""
