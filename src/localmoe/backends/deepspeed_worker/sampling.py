"""Logits to tokens, by the rules of the native engine: see `core.request.SamplingParams`.

A draw is a function of logits, seed and position (Philox; Salmon et al., 2011), so a seeded request gets the same
tokens whatever else is in the batch, and when it is replayed. The native engine's sampler is not importable here;
the tests hold the two together.

Shape suffix: V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from localmoe.core.request import SamplingParams, TokenLogprob

_GREEDY_BELOW = 1e-5
"""A temperature below this takes the likeliest token: the quotient would leave float32's range."""


def draw(
    logits_V: Tensor,
    sampling: SamplingParams,
    *,
    seed: int,
    position: int,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
) -> int | None:
    """A token from a row of logits, float32, which is modified. None where they are not finite numbers."""
    _adjust(logits_V, sampling, prompt_ids, output_ids)
    if not bool(logits_V.isfinite().all()):
        return None
    if sampling.temperature < _GREEDY_BELOW:
        return int(logits_V.argmax())
    cumulative_V = _filtered_probabilities(logits_V, sampling).double().cumsum(0)
    uniform = float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())
    # right=True: the first token whose cumulative sum exceeds the target, which has a probability above zero.
    return int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))


def score(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token under a row of unmodified logits, and of the likeliest ones."""
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(num_top)
    return TokenLogprob(
        token_id,
        float(logprobs_V[token_id]),
        list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def _adjust(
    logits_V: Tensor, sampling: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> None:
    device = logits_V.device
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=device)
        logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), device=device)
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        counted = Counter(output_ids)
        ids = torch.tensor(list(counted), device=device)
        counts = torch.tensor(list(counted.values()), device=device)
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _filtered_probabilities(logits_V: Tensor, sampling: SamplingParams) -> Tensor:
    """After temperature, top-k, top-p and min-p; zero for what they exclude, not renormalised."""
    # Shifted first, so that a tiny temperature overflows to minus infinity and never to infinity.
    probabilities_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < len(probabilities_V):
        probabilities_V[probabilities_V < probabilities_V.topk(sampling.top_k).values[-1]] = 0
    if sampling.top_p < 1:
        likeliest = probabilities_V.sort(descending=True).values
        cumulative = likeliest.double().cumsum(0)
        last = int(torch.searchsorted(cumulative, sampling.top_p * cumulative[-1]))
        probabilities_V[probabilities_V < likeliest[min(last, len(likeliest) - 1)]] = 0
    if sampling.min_p > 0:
        probabilities_V[probabilities_V < sampling.min_p * probabilities_V.max()] = 0
    return probabilities_V
