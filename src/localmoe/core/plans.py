"""Plans as data: what the scheduler decided, for those who carry it out."""

from dataclasses import dataclass

from localmoe.core.model import ExpertId
from localmoe.core.protocols import TokenMatcher
from localmoe.core.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """One sequence's share of a step."""

    sequence_id: int
    token_ids: tuple[int, ...]
    """Tokens to run through the model now: a chunk of the prompt, or the last sampled token and a draft of those
    that may follow it."""
    num_drafts: int = 0
    """How many of them, at the end, are the draft. Above 0 only where the one before it is the last known token."""
    start: int
    """Position of the first of them in the sequence; keys and values before it are in the cache."""
    block_table: tuple[int, ...]
    """Cache blocks of the sequence in order of position; covers `start + len(token_ids)`."""
    samples: bool
    """Whether the step reaches the end of the known tokens, so that a next token is drawn there, and one after each
    draft token that equals the draw before it."""
    sampling: SamplingParams
    seed: int
    """The sequence's own seed; with the position it fixes the random draw."""
    history: tuple[list[int], list[int]]
    """(prompt ids, output ids) so far, for the penalties; lists are the scheduler's own, not to be changed."""
    scores_prompt: bool
    """Whether the prompt tokens that follow this chunk's positions get log-probabilities."""
    embeds: bool = False
    """Whether the hidden states of this chunk's positions are summed up."""
    matcher: TokenMatcher | None = None
    """What keeps the draws within a grammar, at the end of the output so far; the scheduler's own."""

    @property
    def draft_ids(self) -> tuple[int, ...]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def computes_prompt(self) -> bool:
        """Whether it has more tokens than the last known one and a draft."""
        return len(self.token_ids) > self.num_drafts + 1


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One forward pass over the concatenated tokens of `sequences`."""

    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step computed for one sequence."""

    token_ids: tuple[int, ...] = ()
    """The drawn tokens, where the plan asked for any: one more than drafts that proved right. None at all in a step
    with drafts: nothing could be drawn, which may be the draft's doing; to be computed again without."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of them, where the request asked for it."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the prompt tokens that follow this chunk's positions, where asked for."""
    hidden_sums: tuple[int, ...] = ()
    """Of this chunk's positions, where asked for; see `engine/embedding.py`."""
    fault: str | None = None
    """Why there is no usable result; the request fails with it."""
    is_invalid: bool = False
    """Whether that is the request's own doing: no engine could go on with it."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One expert to be read into memory."""

    expert: ExpertId
    slot: int
    """Of the arena: where to."""
    evicts: ExpertId | None
    """Who is in the slot now, and computes no more from here on."""
    is_prefetch: bool
    """Read because it is expected to be used, not because it is."""
