"""What the worker is told first, and what its ranks say to each other in every step.

Ranks talk over pipes, MessagePack in frames (`frames.py`): a collective would time out while there is nothing to do.
"""

import msgspec

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.core.request import SamplingParams, TokenLogprob


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on the worker's standard input, as JSON."""

    address: str
    """ZeroMQ endpoint that the client has bound."""
    model: str
    """The name it is served under."""
    checkpoint_path: str
    """Directory in Hugging Face's format."""
    config: DeepSpeedConfig


class RankLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame that a rank other than 0 gets."""

    launch: Launch
    rank: int
    meeting_path: str
    """Directory of rank 0's own, in which the ranks find each other."""
    nonce: int
    """Tells this group of ranks from others on the machine."""
    scratch_path: str | None
    """Directory for weights on disk."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says once: its model is loaded, and has computed a first step."""

    num_pages: int
    """Of its cache; see `attention.py`."""
    vocab_size: int
    max_context_tokens: int


class Work(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence's part of a step."""

    sequence_id: int
    token_ids: list[int]
    """Tokens to run through the model: a chunk of what is known and not yet computed."""
    start: int
    """Position of the first of them; keys and values before it are in the cache."""
    samples: bool = False
    """Whether the chunk reaches the end of the known tokens, so that a next token is drawn."""
    sampling: SamplingParams
    seed: int
    prompt_ids: list[int] = []
    """Known tokens, for penalties; left out where there are none to apply."""
    output_ids: list[int] = []
    targets: list[int] = []
    """Prompt tokens to score: those that follow each position of the chunk, as far as there are any."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank does in one step."""

    forget: list[int]
    """Sequences whose keys and values are needed no more."""
    work: list[Work]
    computes: bool
    """Whether any rank computes: then all must, because they exchange weights or tokens."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a step computed for one sequence."""

    sequence_id: int
    token_id: int | None = None
    """The drawn token, where one was asked for."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = []
    fault: str | None = None
    """Why there is no usable result; the request fails with it."""
