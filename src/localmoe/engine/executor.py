"""Carries out a batch plan: one forward pass, then the tokens of each sequence that is due any."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from localmoe.core.errors import InvalidRequestError
from localmoe.core.events import TierState
from localmoe.core.plans import BatchPlan, SequenceStep, StepResult
from localmoe.core.request import TokenLogprob
from localmoe.engine.budget import SCORED_ROWS
from localmoe.engine.embedding import hidden_sums
from localmoe.engine.grammars import Masks
from localmoe.engine.kv_cache import KVCache, place
from localmoe.engine.sampler import draws_of, sample, score
from localmoe.engine.speculation import agreed
from localmoe.engine.watch import Watch
from localmoe.kernels.base import Kernels, PagedStep
from localmoe.models.decoder import Decoder

Forward = Callable[[Tensor, PagedStep], Tensor]
"""As `Decoder.forward`, with a cache."""


def forward_with(decoder: Decoder, cache: KVCache, watch: Watch, *, max_num_seqs: int) -> Forward:
    """The decoder's forward pass; where it computes everything on a GPU, its decode steps are captured graphs.

    Args:
        watch: on the decoder's experts.
        max_num_seqs: most sequences in one step.
    """
    if decoder.device.type != "cuda" or watch.state() is not None:
        return lambda token_ids_T, step: decoder.forward(token_ids_T, cache, step)
    from localmoe.engine.cuda_graphs import CudaCapture, DecodeGraphs

    return DecodeGraphs(decoder, cache, watch, CudaCapture(), max_num_seqs=max_num_seqs)


class Executor:
    """A decoder and its cache.

    Args:
        decoder: with its weights loaded.
        cache: as many blocks as the scheduler hands out.
        kernels: draw tokens.
        forward: the decoder's, with this cache.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, kernels: Kernels, forward: Forward) -> None:
        self._decoder = decoder
        self._forward = forward
        self._cache = cache
        self._kernels = kernels

    @torch.inference_mode()
    def execute(self, plan: BatchPlan, masks: Mapping[int, "Future[Masks]"]) -> dict[int, StepResult]:
        """Compute a step; results by sequence id.

        Args:
            masks: what grammars do not let come, by sequence id; being computed meanwhile.
        """
        steps = list(plan.sequences)
        token_ids_T = torch.tensor([token for step in steps for token in step.token_ids], dtype=torch.int32)
        placed = place(steps, self._cache.block_tokens, self._decoder.frequencies)
        self._decoder.experts.begin_step([step.computes_prompt for step in steps for _ in step.token_ids])
        hidden_TD = self._forward(token_ids_T, placed)

        ends = list(accumulate(len(step.token_ids) for step in steps))
        results = self._sample(steps, ends, hidden_TD, masks)
        for i, (step, end) in enumerate(zip(steps, ends, strict=True)):
            own_TD = hidden_TD[end - len(step.token_ids) : end]
            if step.scores_prompt:
                results[i] = replace(results[i], prompt_logprobs=self._score_prompt(step, own_TD))
            if step.embeds:
                results[i] = self._sum_hidden(step, own_TD)
        return {step.sequence_id: result for step, result in zip(steps, results, strict=True)}

    def ensure_device(self) -> None:
        """Raise what a GPU that is lost raises at whatever it is asked, if it is."""
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)

    def tier_state(self) -> TierState | None:
        return self._decoder.experts.state()

    def _sample(
        self,
        steps: list[SequenceStep],
        ends: list[int],
        hidden_TD: Tensor,
        masks: Mapping[int, "Future[Masks]"],
    ) -> list[StepResult]:
        due = [i for i, step in enumerate(steps) if step.samples]
        results = [StepResult()] * len(steps)
        if not due:
            return results
        rows = [row for i in due for row in range(ends[i] - steps[i].num_drafts - 1, ends[i])]
        # In a decode step all are due: then a GPU need not be told which.
        last_SD = hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows]
        logits_SV = self._decoder.logits(last_SD)
        awaited = {i: masks[steps[i].sequence_id] for i in due if steps[i].sequence_id in masks}
        faults = {
            i: StepResult(fault=str(error), is_invalid=isinstance(error, InvalidRequestError))
            for i, mask in awaited.items()
            if (error := mask.exception())
        }
        masked = {i: mask.result() for i, mask in awaited.items() if i not in faults}
        draws = [draw for i in due for draw in draws_of(steps[i], masked.get(i))]
        # Scores are of the logits before bias and penalties, which change them in place.
        scored = any(draw.sampling.logprobs is not None for draw in draws)
        raw_SV = logits_SV.clone() if scored else logits_SV
        drawn = sample(self._kernels, logits_SV, draws)
        start = 0
        for i in due:
            end = start + steps[i].num_drafts + 1
            results[i] = faults.get(i) or self._result(steps[i], drawn[start:end], raw_SV[start:end])
            start = end
        return results

    def _result(self, step: SequenceStep, drawn: list[int | None], raw_SV: Tensor) -> StepResult:
        """What became of one sequence's draws."""
        if None in drawn:
            self._cache.scrub(step.block_table)
        token_ids, wanted = agreed(step.draft_ids, drawn), step.sampling.logprobs
        if not token_ids and not step.num_drafts:
            return StepResult(fault="the logits of the next token are not finite numbers")
        if wanted is None:
            return StepResult(token_ids=token_ids)
        pairs = zip(raw_SV[: len(token_ids)], token_ids, strict=True)
        return StepResult(token_ids=token_ids, logprobs=tuple(score(row, token, wanted) for row, token in pairs))

    def _sum_hidden(self, step: SequenceStep, hidden_TD: Tensor) -> StepResult:
        """Sum up the hidden states of this chunk's positions, as they are after the last norm."""
        sums = hidden_sums(map(self._decoder.final_norm, torch.split(hidden_TD, SCORED_ROWS)))
        if sums is None:
            self._cache.scrub(step.block_table)
            return StepResult(fault="the hidden states of the prompt are not finite numbers")
        return StepResult(hidden_sums=sums)

    def _score_prompt(self, step: SequenceStep, hidden_TD: Tensor) -> tuple[TokenLogprob, ...]:
        """Score the prompt tokens that follow the positions of this chunk."""
        num_top = step.sampling.prompt_logprobs
        assert num_top is not None, "the plan asked for scores"
        prompt_ids, _ = step.history
        following = prompt_ids[step.start + 1 : step.start + 1 + len(step.token_ids)]
        scores: list[TokenLogprob] = []
        for start in range(0, len(following), SCORED_ROWS):
            piece = following[start : start + SCORED_ROWS]
            logits_TV = self._decoder.logits(hidden_TD[start : start + len(piece)])
            scores += (score(row, token, num_top) for row, token in zip(logits_TV, piece, strict=True))
        return tuple(scores)
