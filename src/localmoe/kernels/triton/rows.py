"""What is done to a token's vector alone: norm, rounding to a product's input, the choice of experts, embedding.

Shape suffixes: D columns, E experts, T tokens, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.product import (
    BF16,
    INT8,
    LAUNCH,
    NVFP4,
    DeviceMatrices,
    Tiling,
    block_scales,
    e2m1,
    store_input,
)

_EMBED_COLUMNS = 256


def prepare(x_TD: Tensor, tiling: Tiling) -> Tensor:
    """Rows as a product's input: in its dtype and order of columns."""
    return _normed(x_TD, None, 0.0, tiling, keep=False)[0]


def normed_input(x_TD: Tensor, norm_D: Tensor, eps: float, tiling: Tiling) -> Tensor:
    """RMS norm (Zhang & Sennrich, 2019) of rows, as a product's input."""
    return _normed(x_TD, norm_D, eps, tiling, keep=False)[0]


def normed(x_TD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    """RMS norm of rows in float32."""
    return _normed(x_TD, norm_D, eps, None, keep=True)[1]


def _normed(
    x_TD: Tensor, norm_D: Tensor | None, eps: float, tiling: Tiling | None, *, keep: bool
) -> tuple[Tensor, Tensor]:
    num_tokens, columns = x_TD.shape
    nothing = torch.empty(0, device=x_TD.device)
    input_TD = nothing if tiling is None else torch.empty_like(x_TD, dtype=tiling.input_dtype)
    h_TD = torch.empty_like(x_TD) if keep else nothing
    _norm[(num_tokens,)](
        x_TD,
        nothing if norm_D is None else norm_D,
        input_TD,
        h_TD,
        columns,
        eps,
        NORM=norm_D is not None,
        INPUT=tiling is not None,
        FP4=tiling is not None and tiling.fp4,
        KEEP=keep,
        D=triton.next_power_of_2(columns),
        **LAUNCH,
    )
    return input_TD, h_TD


@triton.jit
def rms_scale(x, columns, eps):
    """One over the root mean square of the numbers of a vector of `columns`, the rest of it zeros."""
    return 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / columns + eps)


@triton.jit
def _norm(
    x, norm, input_, h, columns, eps,
    NORM: tl.constexpr, INPUT: tl.constexpr, FP4: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * columns
    at_D = tl.arange(0, D)
    mask = at_D < columns
    x_D = tl.load(x + first + at_D, mask=mask, other=0.0)
    if NORM:
        x_D = tl.load(norm + at_D, mask=mask, other=0.0) * (x_D * rms_scale(x_D, columns, eps))
    if INPUT:
        store_input(input_ + first, at_D, x_D, mask, FP4)
    if KEEP:
        tl.store(h + first + at_D, x_D, mask=mask)


def choose_experts(logits_TE: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The likeliest experts [T, K] int32, of equal ones the lower id first, and their probabilities [T, K] float32;
    with `normalize` these are scaled to sum to one. A NaN among the logits counts as minus infinity in the choice."""
    num_tokens, num_experts = logits_TE.shape
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, top_k, device=logits_TE.device)
    _choose[(num_tokens,)](
        logits_TE,
        ids_TK,
        weights_TK,
        num_experts,
        TOP_K=top_k,
        NORMALIZE=normalize,
        E=triton.next_power_of_2(num_experts),
        K=triton.next_power_of_2(top_k),
        num_warps=1,
        enable_fp_fusion=LAUNCH["enable_fp_fusion"],
    )
    return ids_TK, weights_TK


@triton.jit
def _choose(
    logits, ids, weights, num_experts,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at_E, at_K = tl.arange(0, E), tl.arange(0, K)
    left_E = at_E < num_experts
    logits_E = tl.load(logits + token * num_experts + at_E, mask=left_E, other=float("-inf"))
    keys_E = tl.where(logits_E == logits_E, logits_E, float("-inf"))
    exps_E = tl.exp(logits_E - tl.max(keys_E, axis=0))
    ids_K = tl.zeros((K,), dtype=tl.int32)
    exps_K = tl.zeros((K,), dtype=tl.float32)
    for k in range(TOP_K):
        largest = tl.max(tl.where(left_E, keys_E, float("-inf")), axis=0)
        chosen = tl.min(tl.where(left_E & (keys_E == largest), at_E, E), axis=0)
        left_E = left_E & (at_E != chosen)
        ids_K = tl.where(at_K == k, chosen, ids_K)
        exps_K = tl.where(at_K == k, tl.sum(tl.where(at_E == chosen, exps_E, 0.0), axis=0), exps_K)
    # A NaN among all of them spoils the sum, whichever were chosen.
    weights_K = exps_K / tl.sum(exps_E, axis=0)
    if NORMALIZE:
        weights_K /= tl.sum(weights_K, axis=0)
    tl.store(ids + token * TOP_K + at_K, ids_K, mask=at_K < TOP_K)
    tl.store(weights + token * TOP_K + at_K, weights_K, mask=at_K < TOP_K)


def embed(table: DeviceMatrices, token_ids_T: Tensor) -> Tensor:
    """Rows [T, D] float32 of the table, just as its format says."""
    x_TD = torch.empty(len(token_ids_T), table.columns, device=table.values.device)
    _embed[(len(token_ids_T), triton.cdiv(table.columns, _EMBED_COLUMNS))](
        table.values,
        table.scales,
        table.tensor_scales,
        token_ids_T,
        x_TD,
        table.columns,
        FORMAT=table.tiling.format,
        D=_EMBED_COLUMNS,
        **LAUNCH,
    )
    return x_TD


@triton.jit
def _embed(values, scales, tensor_scales, token_ids, x, columns, FORMAT: tl.constexpr, D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids + token)
    group, lane = (row // 16).to(tl.int64), row % 16
    at_D = tl.program_id(1) * D + tl.arange(0, D)
    mask = at_D < columns
    if FORMAT >= BF16:
        WORD: tl.constexpr = 2 if FORMAT == BF16 else 1
        first = values + group * (columns + columns % WORD) * 16 + lane * WORD
        x_D = tl.load(first + (at_D // WORD) * (16 * WORD) + at_D % WORD, mask=mask, other=0.0).to(tl.float32)
    else:
        BLOCK: tl.constexpr = 16 if FORMAT == NVFP4 else 32
        stored_D = tl.load(
            scales + group * (columns // BLOCK) * 16 + lane + at_D // BLOCK * 16, mask=mask, other=0
        )
        scale_D = block_scales(stored_D, FORMAT)
        if FORMAT == INT8:
            codes = values + group * columns * 16 + lane * 4 + (at_D // 4) * 64 + at_D % 4
            x_D = (tl.load(codes, mask=mask, other=0).to(tl.int32) - 128).to(tl.float32) * scale_D
        else:
            codes = values + group * columns * 8 + lane * 4 + (at_D // 8) * 64 + at_D % 4
            codes_D = tl.load(codes, mask=mask, other=0).to(tl.int32) >> (at_D & 4)
            x_D = e2m1(codes_D) * scale_D
            if FORMAT == NVFP4:
                x_D *= tl.load(tensor_scales + group)
    tl.store(x + token * columns + at_D, x_D, mask=mask)
