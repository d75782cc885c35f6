"""Stand-ins for the parts of speculative decoding."""

from collections.abc import Sequence

from localmoe.engine.speculation import MAX_DRAFT_TOKENS, PromptLookup, SpeculationController


class Eager(SpeculationController):
    """Runs every draft that there is room for, whatever it costs."""

    def choose(self, proposals: Sequence[tuple[float, int]], max_tokens: int) -> list[int]:
        counts, left = [], max_tokens - len(proposals)
        for _, available in proposals:
            counts.append(min(available, left))
            left -= counts[-1]
        return counts


class Foreteller(PromptLookup):
    """Knows how sequences go on.

    Args:
        sequences: whole ones, prompt and output, told apart by their prompts.
        num_right: how many tokens of each draft are right.
        wrong_id: what stands in place of a right token, unless it is the right one.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], num_right: int, wrong_id: int) -> None:
        super().__init__()
        self._sequences, self._num_right, self._wrong_id = sequences, num_right, wrong_id

    def propose(self) -> list[int]:
        known = self._ids
        for sequence in self._sequences:
            if list(sequence[: len(known)]) == known:
                coming = sequence[len(known) : len(known) + MAX_DRAFT_TOKENS]
                wrong = [self._wrong_id + (token_id == self._wrong_id) for token_id in coming]
                self._proposal = [*coming[: self._num_right], *wrong[self._num_right :]]
        return self._proposal
