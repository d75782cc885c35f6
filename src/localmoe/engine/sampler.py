"""Logits to tokens.

A draw depends on the sequence's seed and the token's position only: a counter-based generator (Salmon et al.,
2011, Philox) gives one uniform number for the pair, and the inverse of the cumulative distribution turns it into
a token. So a seeded request gets the same tokens alone and in any batch, and a replay elsewhere goes on alike.

Shape suffixes: S sequences, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""A temperature below this takes the likeliest token: the quotient would leave float32's range."""
_NUCLEUS_CANDIDATES = 1024
"""Nearly every nucleus lies within this many tokens, and selecting them is much cheaper than sorting all."""


def sample(logits_SV: Tensor, steps: Sequence[SequenceStep]) -> list[int | None]:
    """Draw the next token of each sequence; `logits_SV` float32, one row per step, is modified.

    None where the logits are not finite numbers, of the model's or a penalty's doing: there is nothing to draw from.
    """
    for row, step in zip(logits_SV, steps, strict=True):
        adjust(row, step.sampling, *step.history)
    finite = logits_SV.isfinite().all(-1).tolist()
    token_ids_S = logits_SV.argmax(-1)
    drawn = [i for i, step in enumerate(steps) if step.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        sampling = [steps[i].sampling for i in drawn]
        uniforms = [uniform(steps[i].seed, steps[i].start + len(steps[i].token_ids)) for i in drawn]
        probabilities_SV = filtered_probabilities(logits_SV[drawn], sampling)
        cumulative_SV = probabilities_SV.double().cumsum(-1)
        targets_S1 = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cumulative_SV[:, -1:]
        # right=True: the first token whose cumulative sum exceeds the target, which has a probability above zero.
        token_ids_S[drawn] = torch.searchsorted(cumulative_SV, targets_S1, right=True).squeeze(-1)
    return [token_id if ok else None for token_id, ok in zip(token_ids_S.tolist(), finite, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def adjust(logits_V: Tensor, sampling: SamplingParams, prompt_ids: list[int], output_ids: list[int]) -> None:
    """Apply logit bias and penalties to one row in place."""
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}))
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        counted = Counter(output_ids)
        ids, counts = torch.tensor(list(counted)), torch.tensor(list(counted.values()))
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def filtered_probabilities(logits_SV: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p; zero for what they exclude, not renormalised."""
    temperatures_S1 = torch.tensor([[s.temperature] for s in sampling])
    # Shifted first, so that a tiny temperature overflows to minus infinity and never to infinity.
    scaled_SV = (logits_SV - logits_SV.amax(-1, keepdim=True)) / temperatures_S1
    probabilities_SV = scaled_SV.softmax(-1)
    for row, s in zip(probabilities_SV, sampling, strict=True):
        if 0 < s.top_k < len(row):
            row[row < row.topk(s.top_k).values[-1]] = 0
        if s.top_p < 1:
            row[row < _nucleus_floor(row, s.top_p)] = 0
        if s.min_p > 0:
            row[row < s.min_p * row.max()] = 0
    return probabilities_SV


def _nucleus_floor(probabilities_V: Tensor, top_p: float) -> Tensor:
    """Probability of the last token of the nucleus; tokens as likely as it belong to it too."""
    wanted = top_p * probabilities_V.sum()
    for count in (min(_NUCLEUS_CANDIDATES, len(probabilities_V)), len(probabilities_V)):
        likeliest = probabilities_V.topk(count).values
        cumulative = likeliest.cumsum(0)
        if cumulative[-1] >= wanted:
            break
    return likeliest[min(int(torch.searchsorted(cumulative, wanted)), count - 1)]


def score(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token under one row of unmodified logits."""
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(num_top)
    return TokenLogprob(
        token_id,
        float(logprobs_V[token_id]),
        list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
