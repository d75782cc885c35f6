"""Every operation of a decoder in plain torch: what the fast kernels are tested against.

Shape suffixes: T tokens, D hidden size, F expert width, E experts, K experts per token, H heads, G key-value
heads, d head size, S sequences, N cache blocks, B tokens per block, L cached length, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from localmoe.core.model import ModelShape

_FEW_TOKENS = 16


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in float32, returned in the dtype of x."""
    x32 = x_TD.float()
    normalised = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight_D * normalised.to(x_TD.dtype)


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Angular frequencies [d/2], float32 (Su et al., 2021), stretched as Llama 3.1 does where the shape says."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1 for wavelengths short against the original context (kept), 0 for long ones (divided by the factor).
    kept = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotate(x_THd: Tensor, angles_Td: Tensor) -> Tensor:
    """Rotary embedding on half-split pairs (x[i], x[i + d/2]) by `angles` [T, d/2], computed in float32."""
    cos, sin = angles_Td.cos().unsqueeze(1), angles_Td.sin().unsqueeze(1)
    first, second = x_THd.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THd.dtype)


def project(x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    """`x @ weight.T`, [T, F].

    While tokens are few, BLAS reads a weight matrix about three times faster as the left factor than as the right
    one; and a vector alone would go to a matrix-vector routine that uses one thread, so it is doubled.
    """
    num_tokens = len(x_TD)
    if num_tokens > _FEW_TOKENS:
        return linear(x_TD, weight_FD)
    columns_DT = x_TD.repeat(2, 1).T if num_tokens == 1 else x_TD.T
    return (weight_FD @ columns_DT).T[:num_tokens].contiguous()


def swiglu(x_TD: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """Gated feed-forward block (Shazeer, 2020); gate's rows first, then up's."""
    gate_TF, up_TF = project(x_TD, gate_up_2FD).chunk(2, dim=-1)
    return project(silu(gate_TF) * up_TF, down_DF)


def top_k_softmax(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest experts and their probabilities, summing to one; ([T, K] int64, [T, K] float32)."""
    probabilities, ids = logits_TE.float().softmax(-1).topk(k, dim=-1)
    return ids, probabilities / probabilities.sum(-1, keepdim=True)


def moe(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Weighted sum of each token's experts, each expert visited once and in ascending order.

    The order of the additions for a token does not depend on which other tokens are in the batch.
    """
    out_TD = torch.zeros_like(x_TD)
    for expert in torch.unique(ids_TK).tolist():
        rows, slots = torch.where(ids_TK == expert)
        expert_out = swiglu(x_TD[rows], gate_up_E2FD[expert], down_EDF[expert])
        out_TD.index_add_(0, rows, expert_out * weights_TK[rows, slots, None].to(x_TD.dtype))
    return out_TD


def causal_attention(q_THd: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> Tensor:
    """Attention of the last T of L positions of one sequence, each over itself and what precedes it; [T, H, d]."""
    num_tokens, length = len(q_THd), len(k_LGd)
    mask = torch.ones(num_tokens, length, dtype=torch.bool).tril(length - num_tokens) if num_tokens > 1 else None
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_LGd, v_LGd))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where the tokens of one step live in the paged cache (Kwon et al., 2023)."""

    slots_T: Tensor
    """int64: each token's own slot, block * B + offset."""
    spans: tuple[tuple[int, int], ...]
    """(start, end) of each multi-token sequence's rows among the T tokens; these come first."""
    span_blocks: tuple[Tensor, ...]
    """For each span, its block table as int64."""
    span_lengths: tuple[int, ...]
    """For each span, the cached length including this step's tokens."""
    decode_start: int
    """Rows from here on belong to sequences with one token each."""
    decode_blocks_SN: Tensor
    """int64 block tables of those sequences, padded with any valid block."""
    decode_lengths_S: Tensor
    """int64 cached lengths of those sequences, this step's token included."""


def paged_attention(q_THd: Tensor, k_cache_NBGd: Tensor, v_cache_NBGd: Tensor, batch: PagedBatch) -> Tensor:
    """Causal attention of every token in `batch` over its sequence's cached blocks; [T, H, d].

    The cache must hold finite numbers everywhere: masked slots are multiplied by zero, not skipped.
    """
    out_THd = torch.empty_like(q_THd)
    for (start, end), blocks, length in zip(batch.spans, batch.span_blocks, batch.span_lengths, strict=True):
        k, v = (cache[blocks].flatten(0, 1)[:length] for cache in (k_cache_NBGd, v_cache_NBGd))
        out_THd[start:end] = causal_attention(q_THd[start:end], k, v)
    if batch.decode_start < len(q_THd):
        tables, lengths = batch.decode_blocks_SN, batch.decode_lengths_S
        k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (k_cache_NBGd, v_cache_NBGd))
        mask = torch.arange(k.shape[2]) < lengths[:, None]
        q = q_THd[batch.decode_start :].unsqueeze(2)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], enable_gqa=True)
        out_THd[batch.decode_start :] = out.squeeze(2)
    return out_THd
