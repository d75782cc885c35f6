"""Draws of tokens on the device, as `Draws` says, in plain torch; what is waited for is only the tokens."""

import torch
from torch import Tensor

from localmoe.kernels.base import Draws
from localmoe.kernels.triton.product import to_device


def draw(logits_SV: Tensor, draws: Draws) -> Tensor:
    """A token of each row, int64 [S]; -1 where a logit is not a finite number."""
    device = logits_SV.device
    temperatures_S = to_device(draws.temperatures_S, device)
    token_ids_S = logits_SV.argmax(-1)
    if (draws.temperatures_S > 0).any():
        cumulative_SV = _filtered(logits_SV, draws, temperatures_S).double().cumsum(-1)
        targets_S1 = to_device(draws.uniforms_S, device)[:, None] * cumulative_SV[:, -1:]
        # The first token whose cumulative sum exceeds the target, which has a probability above zero.
        drawn_S = torch.searchsorted(cumulative_SV, targets_S1, right=True).squeeze(-1)
        token_ids_S = torch.where(temperatures_S > 0, drawn_S, token_ids_S)
    return torch.where(logits_SV.isfinite().all(-1), token_ids_S, -1)


def _filtered(logits_SV: Tensor, draws: Draws, temperatures_S: Tensor) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p; zero for what they exclude, not renormalised."""
    device, num_tokens = logits_SV.device, logits_SV.shape[1]
    temperatures_S1 = torch.where(temperatures_S > 0, temperatures_S, 1.0)[:, None]
    # Shifted first, so that a tiny temperature overflows to minus infinity and never to infinity.
    weights_SV = ((logits_SV - logits_SV.amax(-1, keepdim=True)) / temperatures_S1).softmax(-1)
    if (draws.top_k_S > 0).any() or (draws.top_p_S < 1).any():
        likeliest_SV = weights_SV.sort(-1, descending=True).values
        top_k_S1 = to_device(draws.top_k_S, device).long()[:, None]
        last_S1 = torch.where((top_k_S1 > 0) & (top_k_S1 < num_tokens), top_k_S1, num_tokens) - 1
        least_S1 = likeliest_SV.gather(-1, last_S1)
        likeliest_SV = torch.where(likeliest_SV < least_S1, 0.0, likeliest_SV)
        cumulative_SV = likeliest_SV.double().cumsum(-1)
        top_p_S1 = to_device(draws.top_p_S, device)[:, None]
        wanted_S1 = top_p_S1.double() * cumulative_SV[:, -1:]
        last_S1 = torch.searchsorted(cumulative_SV, wanted_S1).clamp_(max=num_tokens - 1)
        least_S1 = torch.where(top_p_S1 < 1, likeliest_SV.gather(-1, last_S1), least_S1)
        weights_SV = torch.where(weights_SV < least_S1, 0.0, weights_SV)
    least_S1 = to_device(draws.min_p_S, device)[:, None] * weights_SV.amax(-1, keepdim=True)
    return torch.where(weights_SV < least_S1, 0.0, weights_SV)
