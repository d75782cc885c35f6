"""Logits to tokens.

A draw depends on the sequence's seed and the token's position only: a counter-based generator (Salmon et al.,
2011, Philox) gives one uniform number for the pair, and the inverse of the cumulative distribution turns it into
a token. So on one machine a seeded request gets the same tokens alone, in any batch and when it is replayed.

Shape suffixes: S draws, V vocabulary, G draws by a grammar, B bytes of a bit for each token id.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams, TokenLogprob
from localmoe.kernels.base import Draws, Kernels

_NEVER = -1e30
"""The logit of a token that may not be drawn: finite, as logits must be, with room to be divided by a temperature."""
GREEDY_BELOW = 1e-5
"""A temperature below this takes the likeliest token: the quotient would leave float32's range."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """All that decides a token beside the logits."""

    sampling: SamplingParams
    seed: int
    position: int
    """Of the token to draw."""
    history: tuple[list[int], list[int]]
    """(prompt ids, output ids) before it."""
    mask: Tensor | None = None
    """What a grammar does not let come, see `mask_of`; None: there is no grammar."""


def draws_of(step: SequenceStep, masks: Sequence[Tensor] | None = None) -> list[Draw]:
    """What a step draws: a token after its last known one, and one after each draft, taking that draft for right.

    Args:
        masks: for each draw, what a grammar does not let come; None: there is no grammar.
    """
    prompt_ids, output_ids = step.history
    draft_ids, end = step.draft_ids, step.start + len(step.token_ids)
    return [
        Draw(
            sampling=step.sampling,
            seed=step.seed,
            position=end - step.num_drafts + count,
            history=(prompt_ids, output_ids + list(draft_ids[:count]) if count else output_ids),
            mask=None if masks is None else masks[count],
        )
        for count in range(step.num_drafts + 1)
    ]


def sample(kernels: Kernels, logits_SV: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """Draw a token from each row; `logits_SV` float32, one row per draw, is modified.

    None where the logits are not finite numbers, of the model's or a penalty's doing: there is nothing to draw from.
    """
    for row, draw in zip(logits_SV, draws, strict=True):
        adjust(row, draw.sampling, *draw.history)
    masks = {row: draw.mask for row, draw in enumerate(draws) if draw.mask is not None}
    if masks:
        refuse(logits_SV, masks)
    token_ids = kernels.draw(logits_SV, settings(draws))
    return [None if token_id < 0 else token_id for token_id in token_ids]


def settings(draws: Sequence[Draw]) -> Draws:
    """What the kernels need to know of S draws, as arrays of an entry for each."""
    sampling = [draw.sampling for draw in draws]
    temperatures = [0.0 if s.temperature < GREEDY_BELOW else s.temperature for s in sampling]
    # A generator takes longer to make than a likeliest token to find, which needs none.
    uniforms = [uniform(d.seed, d.position) if t else 0.0 for d, t in zip(draws, temperatures, strict=True)]
    return Draws(
        temperatures_S=np.array(temperatures, np.float32),
        top_k_S=np.array([s.top_k for s in sampling], np.int32),
        top_p_S=np.array([s.top_p for s in sampling], np.float32),
        min_p_S=np.array([s.min_p for s in sampling], np.float32),
        uniforms_S=np.array(uniforms),
    )


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def adjust(logits_V: Tensor, sampling: SamplingParams, prompt_ids: list[int], output_ids: list[int]) -> None:
    """Apply logit bias and penalties to one row in place."""
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


def mask_of(allowed: bytes, num_tokens: int, device: torch.device) -> Tensor:
    """What a draw may not bring, as `refuse` takes it.

    Args:
        allowed: a bit for each token id that may come, those of a byte from the lowest up.
        device: where the logits are. In memory, a byte for each token is quickest to use; to a GPU, bits travel.
    """
    refused_B = ~np.frombuffer(allowed, np.uint8)
    if device.type != "cpu":
        return torch.from_numpy(refused_B)
    return torch.from_numpy(np.unpackbits(refused_B, count=num_tokens, bitorder="little").view(np.bool_))


def refuse(logits_SV: Tensor, masks: Mapping[int, Tensor]) -> None:
    """Keep tokens from being drawn, in place.

    Args:
        masks: by row.
    """
    refused = list(masks.values())
    if refused[0].dtype == torch.uint8:  # bits
        bits_GB = torch.stack(refused).to(logits_SV.device)
        shifts_8 = torch.arange(8, dtype=torch.uint8, device=logits_SV.device)
        bytes_GV = ((bits_GB.unsqueeze(-1) >> shifts_8) & 1).flatten(1)[:, : logits_SV.shape[1]]
        refused = list(bytes_GV.bool())
    for row, refused_V in zip(masks, refused, strict=True):
        logits_SV[row].masked_fill_(refused_V, _NEVER)


def score(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token under one row of unmodified logits."""
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(num_top)
    return TokenLogprob(
        token_id,
        float(logprobs_V[token_id]),
        list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
