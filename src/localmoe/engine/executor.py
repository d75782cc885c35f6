"""Carries out a batch plan: one forward pass, then a token for each sequence that is due one."""

from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from localmoe.core.plans import BatchPlan, SequenceStep, StepResult
from localmoe.core.request import TokenLogprob
from localmoe.engine.kv_cache import KVCache, place
from localmoe.engine.sampler import sample, score
from localmoe.models.decoder import Decoder


class Executor:
    """A decoder and its cache.

    Args:
        decoder: with its weights loaded.
        cache: as many blocks as the scheduler hands out.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache

    @torch.inference_mode()
    def execute(self, plan: BatchPlan) -> dict[int, StepResult]:
        """Compute a step; results by sequence id."""
        steps = sorted(plan.sequences, key=lambda step: len(step.token_ids) == 1)
        batch = place(steps, self._cache.block_tokens)
        token_ids_T = torch.tensor([token for step in steps for token in step.token_ids])
        positions_T = torch.cat([torch.arange(s.start, s.start + len(s.token_ids)) for s in steps])
        hidden_TD = self._decoder.forward(token_ids_T, positions_T, partial(self._cache.attend, batch))

        ends = list(accumulate(len(step.token_ids) for step in steps))
        results = self._sample(steps, ends, hidden_TD)
        for i, (step, end) in enumerate(zip(steps, ends, strict=True)):
            if step.scores_prompt:
                scores = self._score_prompt(step, hidden_TD[end - len(step.token_ids) : end])
                results[i] = replace(results[i], prompt_logprobs=scores)
        return {step.sequence_id: result for step, result in zip(steps, results, strict=True)}

    def _sample(self, steps: list[SequenceStep], ends: list[int], hidden_TD: Tensor) -> list[StepResult]:
        due = [i for i, step in enumerate(steps) if step.samples]
        results = [StepResult()] * len(steps)
        if not due:
            return results
        raw_SV = self._decoder.logits(hidden_TD[[ends[i] - 1 for i in due]])
        token_ids = sample(raw_SV.clone(), [steps[i] for i in due])
        for row, i in enumerate(due):
            token_id, wanted = token_ids[row], steps[i].sampling.logprobs
            if token_id is None:
                results[i] = StepResult(fault="the logits of the next token are not finite numbers")
                self._cache.scrub(steps[i].block_table)
            else:
                logprob = None if wanted is None else score(raw_SV[row], token_id, wanted)
                results[i] = StepResult(token_id=token_id, logprob=logprob)
        return results

    def _score_prompt(self, step: SequenceStep, hidden_TD: Tensor) -> tuple[TokenLogprob, ...]:
        """Score the prompt tokens that follow the positions of this chunk."""
        num_top = step.sampling.prompt_logprobs
        assert num_top is not None, "the plan asked for scores"
        prompt_ids, _ = step.history
        following = prompt_ids[step.start + 1 : step.start + 1 + len(step.token_ids)]
        logits_TV = self._decoder.logits(hidden_TD[: len(following)])
        return tuple(score(row, token, num_top) for row, token in zip(logits_TV, following, strict=True))
