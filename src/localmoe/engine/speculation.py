"""Speculative decoding by prompt lookup (Saxena, 2023): tokens that followed the same few tokens earlier in the
sequence are a guess at what follows now, and the model checks a whole guess in one step.

The guess never changes the output. The sampler's draw is a function of logits, seed, position, sampling parameters
and history alone, and a token's logits do not depend on what runs beside it. A step runs the last known token and
the draft after it and draws at each of these positions. The first draw has only known tokens before it, so it is
the token that a plain step would draw. If it equals the first draft token, then the second position had exactly
the input, and its draw the history, that the next plain step would have had; and so on. Draws count up to and
including the first that differs from its draft; later ones had a wrong input and are dropped. What was written to
the cache for those is overwritten before anything reads it. This is why no rejection sampling (Leviathan et al.,
2023) is needed: greedy or sampled, every token is the one that would have come without speculation.

Whether it pays is measured. Each token more in a step reads more experts, so a step's duration grows with its
tokens by an amount that only the machine knows. Guesses are checked against what comes whether or not they were
run, so knowing how good they are costs nothing; steps are timed. Both together give the number of draft tokens
with the most expected tokens per second, which is often none.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from localmoe.core.plans import BatchPlan

MAX_DRAFT_TOKENS = 8
"""Longest draft of a sequence."""
MAX_STEP_TOKENS = 64
"""Most tokens of a step with drafts: bounds the rows of logits, and larger batches leave little to gain."""

_NGRAM_SIZES = (4, 3, 2)
_DRAFTS_PER_STEP = (1, 2, 4, 8, 16, 32)
_NUM_SLOTS = 1 << 15
_DECAY = 0.9
"""How much of the evidence on a sequence's guesses remains after each further one."""
_LEAST_PROBABILITY = 0.1
"""Draft tokens less likely to count are not run, however little that may cost."""
_LEAST_SPEEDUP = 1.05
"""Expected gain below which a step stays plain; durations are known no better."""
_NUM_MEASUREMENTS = 3
"""Durations that a step of a given size is judged by: their median, so that a hiccup decides nothing."""
_FORGET_AFTER_STEPS = 1024
"""Age at which measurements are taken anew: conditions change, and trying costs a few steps."""


class PromptLookup:
    """What may follow a growing sequence, and how often that proved right.

    A table from the hash of an n-gram to the position after its last occurrence; its size is fixed, and an n-gram
    that shares a slot with a later one is forgotten. A step costs as much as the tokens it added, not as the
    sequence is long.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._positions = array("I", bytes(4 * _NUM_SLOTS))
        self._proposal: list[int] = []
        self._matched = _NGRAM_SIZES[-1]
        # Of right guesses and of all, decayed, by length of the match; begins as one right of two.
        self._evidence = dict.fromkeys(_NGRAM_SIZES, (1.0, 2.0))

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence seen so far."""
        return len(self._ids)

    @property
    def probability(self) -> float:
        """Chance that a token of the last proposal is right, given that those before it are."""
        right, total = self._evidence[self._matched]
        return right / total

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take the tokens that the sequence has grown by; the last proposal is judged by them."""
        for guess, token_id in zip(self._proposal, token_ids, strict=False):
            right, total = self._evidence[self._matched]
            self._evidence[self._matched] = (_DECAY * right + (guess == token_id), _DECAY * total + 1)
            if guess != token_id:
                break
        self._proposal = []
        for token_id in token_ids:
            position = len(self._ids)
            for size in _NGRAM_SIZES:
                self._positions[_slot(self._ids[-size:])] = position
            self._ids.append(token_id)

    def propose(self) -> list[int]:
        """`MAX_DRAFT_TOKENS` tokens that followed the longest known match of the sequence's end, or none.

        A match so recent that fewer tokens followed is read as a period that goes on.
        """
        for size in _NGRAM_SIZES:
            end = self._ids[-size:]
            position = self._positions[_slot(end)]
            if len(end) == size <= position and self._ids[position - size : position] == end:
                period = len(self._ids) - position
                self._matched = size
                self._proposal = [self._ids[position + i % period] for i in range(MAX_DRAFT_TOKENS)]
                break
        return self._proposal


class SpeculationController:
    """How many draft tokens to run, from how likely they are and how long steps took.

    For each number of sequences a table of durations by number of tokens: between measured sizes interpolated,
    beyond them taken as if more tokens cost nothing, so that what might pay is tried. Decides by its inputs alone.
    """

    def __init__(self) -> None:
        self._durations_s: dict[int, dict[int, deque[float]]] = {}
        self._measured_at: dict[tuple[int, int], int] = {}
        self._num_steps = 0

    def observe(self, plan: BatchPlan, duration_s: float) -> None:
        """Take note of a step; those that compute anything but one known token of each sequence say nothing."""
        num_seqs, num_tokens = len(plan.sequences), plan.num_tokens
        num_drafts = sum(step.num_drafts for step in plan.sequences)
        if num_tokens - num_drafts > num_seqs or num_tokens > MAX_STEP_TOKENS:
            return
        table = self._durations_s.setdefault(num_seqs, {})
        durations = table.setdefault(num_tokens, deque(maxlen=_NUM_MEASUREMENTS))
        if self._is_old(num_seqs, num_tokens):
            durations.clear()
        durations.append(duration_s)
        self._num_steps += 1
        self._measured_at[num_seqs, num_tokens] = self._num_steps

    def choose(self, proposals: Sequence[tuple[float, int]], max_tokens: int) -> list[int]:
        """Numbers of draft tokens to run.

        Args:
            proposals: for each sequence of a step its `PromptLookup.probability` and how many tokens it proposes.
            max_tokens: most tokens in the step, the known one of each sequence included.
        """
        num_seqs, counts = len(proposals), [0] * len(proposals)
        if not any(available for _, available in proposals):
            return counts
        sizes, durations_s = self._known(num_seqs)
        if num_seqs not in sizes:
            return counts
        # The i-th draft token of a sequence counts only if those before it do.
        gains = sorted(
            (
                (probability**i, index)
                for index, (probability, available) in enumerate(proposals)
                for i in range(1, available + 1)
                if probability**i >= _LEAST_PROBABILITY
            ),
            reverse=True,
        )[: max(0, max_tokens - num_seqs)]
        # Few numbers to choose from: each has to be measured.
        drafts = [0, *(count for count in _DRAFTS_PER_STEP if count <= len(gains))]
        expected_tokens = [num_seqs + sum(gain for gain, _ in gains[:count]) for count in drafts]
        step_s = np.interp([num_seqs + count for count in drafts], sizes, durations_s)
        speed = np.array(expected_tokens) / step_s
        best = int(speed.argmax())
        if speed[best] >= _LEAST_SPEEDUP * speed[0]:
            for _, index in gains[: drafts[best]]:
                counts[index] += 1
        return counts

    def _known(self, num_seqs: int) -> tuple[list[int], list[float]]:
        """Numbers of tokens, ascending, whose steps have been measured well enough, and the durations of these."""
        known = sorted(
            (num_tokens, median(durations))
            for num_tokens, durations in self._durations_s.get(num_seqs, {}).items()
            if len(durations) == _NUM_MEASUREMENTS and not self._is_old(num_seqs, num_tokens)
        )
        return [num_tokens for num_tokens, _ in known], [duration_s for _, duration_s in known]

    def _is_old(self, num_seqs: int, num_tokens: int) -> bool:
        measured_at = self._measured_at.get((num_seqs, num_tokens), self._num_steps)
        return self._num_steps - measured_at >= _FORGET_AFTER_STEPS


def agreed(draft_ids: Sequence[int], drawn: Sequence[int | None]) -> tuple[int, ...]:
    """The draws that count: up to and including the first that differs from its draft.

    Args:
        drawn: at the last known token and at each draft token; None where there was nothing to draw from, and
            there they end.
    """
    token_ids: list[int] = []
    for draft_id, token_id in zip((*draft_ids, None), drawn, strict=True):
        if token_id is None:
            break
        token_ids.append(token_id)
        if token_id != draft_id:
            break
    return tuple(token_ids)


def _slot(ngram: Sequence[int]) -> int:
    return hash(tuple(ngram)) % _NUM_SLOTS
