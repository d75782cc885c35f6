"""Plans as data: what the scheduler decided, for those who carry it out."""

from dataclasses import dataclass

from localmoe.core.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """One sequence's share of a step."""

    sequence_id: int
    token_ids: tuple[int, ...]
    """Tokens to run through the model now: a chunk of the prompt, or the last sampled token."""
    start: int
    """Position of the first of them in the sequence; keys and values before it are in the cache."""
    block_table: tuple[int, ...]
    """Cache blocks of the sequence in order of position; covers `start + len(token_ids)`."""
    samples: bool
    """Whether the step reaches the end of the known tokens, so that a next token is drawn."""
    sampling: SamplingParams
    seed: int
    """The sequence's own seed; with the position it fixes the random draw."""
    history: tuple[list[int], list[int]]
    """(prompt ids, output ids) so far, for the penalties; lists are the scheduler's own, not to be changed."""
    scores_prompt: bool
    """Whether the prompt tokens that follow this chunk's positions get log-probabilities."""


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

    token_id: int | None = None
    """The drawn token, where the plan asked for one."""
    logprob: TokenLogprob | None = None
    """Its log-probability, where the request asked for it."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the prompt tokens that follow this chunk's positions, where asked for."""
    fault: str | None = None
    """Why there is no usable result; the request fails with it."""
