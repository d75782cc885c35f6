"""A generation request and the stream that answers it, in token ids.

Tokenization happens once, in the gateway. Engines see only what is here, so that any engine with the same
tokenizer can take over a stream at an exact token. These are msgspec structs: they cross process borders as
MessagePack without a copy of their definition.
"""

from enum import StrEnum
from typing import Any, Literal

import msgspec

UNBOUNDED_TOKENS = 2**31 - 1
"""`max_tokens` of a request for as many as there is room for, where nobody here knows how many that is."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """A language that an answer is to be a sentence of."""

    kind: Literal["json_object", "json_schema", "regex", "lark", "choice"]
    source: str = ""
    """The schema as JSON, the expression, the rules in llguidance's dialect of Lark, or a JSON list of texts."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Values are validated where they enter (the gateway), not here.

    Order of application: logit bias, penalties, grammar, temperature, top-k, top-p, min-p.
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
    grammar: Grammar | None = None
    """Tokens with which the answer could not become a sentence of it are never drawn. The answer ends where the
    sentence must, or with a stop token where it may; `max_tokens` can end it before. An answer that goes on on
    another replica is matched from its beginning, so it goes on with the same tokens there."""


class PromptSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a prompt was made of, for engines that take text and tokenize it themselves: one of the two, as the client
    sent it."""

    text: str | None = None
    suffix: str | None = None
    """What follows the answer; with a text only."""
    messages: list[dict[str, Any]] | None = None
    """A conversation, in the words of the OpenAI API."""
    stop: tuple[str, ...] = ()
    """Stop strings. Whoever reads the answer looks for them again."""
    parameters: dict[str, Any] = {}
    """What else the chat API was asked for, in its words: `tools`, `tool_choice`, `parallel_tool_calls`,
    `reasoning_effort`."""
    content_grammar: Grammar | None = None
    """What the content of the answer to a conversation is to be a sentence of. `SamplingParams.grammar` is of all
    that the model writes: tool calls and reasoning with their marks, which is another language for each model."""

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be tool calls."""
        return self.parameters.get("tool_choice", "auto") not in ("auto", "none")


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. Several choices (`n`) are several requests with a common prompt."""

    id: str
    model: str
    prompt_ids: list[int]
    """Empty for a model whose tokenizer is not here; then there is a `source`."""
    sampling: SamplingParams
    resumed_ids: list[int] = []
    """What another replica generated of the answer before it broke off. Generation goes on after these tokens: they
    count as output for `max_tokens`, penalties and draws, and are not sent again."""
    source: PromptSource | None = None
    engine: str | None = None
    """The kind of engine that is to answer, or one replica's name; None: whichever."""
    timeout_s: float | None = None
    """The answer must be complete within this time; None: the server's own bound."""
    adapter: str | None = None
    """Low-rank weights (LoRA) to add to the model's, by the name that engines know them by."""
    cache_scope: str = ""
    """Keys and values that an engine has computed for a prompt are used again for requests of the same scope only."""
    embed: bool = False
    """The prompt's embedding is wanted, and no tokens: `max_tokens` is 0, and the one chunk brings it."""


class FinishReason(StrEnum):
    """Why a sequence ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """As `STOP`, and there are tools to call. Engines whose answers are token ids do not know."""


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The next piece of one tool call."""

    index: int
    """Of the call in its answer, from 0."""
    id: str | None = None
    """With the first piece of a call."""
    name: str | None = None
    """Likewise, and whole."""
    arguments: str = ""
    """The next characters of its arguments, which are JSON."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural) of one token and of the likeliest tokens at its position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), likeliest first."""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request took; accompanies the last chunk and, where it is known then, the first."""

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
    text: str | None = None
    """From engines that answer in text: the next piece of it, in place of token ids."""
    reasoning: str = ""
    """From such engines: the next piece of what goes before the answer."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """From such engines: the next pieces of tool calls."""
    logprobs: list[TokenLogprob] = []
    """One per token in `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """For prompt tokens 1, 2, …; sent once, with the first chunk, where asked for."""
    embedding: bytes | None = None
    """Where asked for: float32, little-endian. Of engines here it is the mean of the prompt's hidden states after the
    last norm, scaled to length 1; of another server what that makes."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """Present on the last chunk and, where the engine knows it then, on the first; all but `completion_tokens` is
    final from the first on."""


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine could not take or compute a request; nothing more comes for it."""

    request_id: str
    message: str
    overloaded: bool = False
    """Refused for want of room, not failed: worth trying again later."""
    invalid: bool = False
    """Refused for what it asks for: no engine could take it."""
