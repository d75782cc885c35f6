"""Attention over the paged cache: heads' norm and rotation with the cache's writes, then a flash-style product.

Online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022) over tiles of 64 keys, of 32 in float32. The keys of a
sequence are cut every 512 positions; each piece is summed up for itself, and the pieces are merged in order of
position. Where tokens are few and the context is long, the pieces are computed side by side and merged by a launch of
their own, by the same formula: so a token's result is the same bits in any batch, in a prompt's chunk or alone.

Queries and probabilities meet a bfloat16 cache rounded to bfloat16, a float32 cache in float32; sums are float32.
What is not a finite number spoils the tokens that see it and no other.

Shape suffixes: T tokens, H heads, G key-value heads, d head size, N cache blocks, B tokens per block; in kernels also
M (query token, head) pairs of a tile, L keys of a tile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.base import AttentionWeights, PagedStep
from localmoe.kernels.triton.product import LAUNCH, DeviceMatrices, Tiling, dot, store_input, to_bf16, to_device
from localmoe.kernels.triton.rows import normed_input, rms_scale
from localmoe.kernels.triton.sizes import MAX_PARTS_SIZE, PIECE_TOKENS

_TILE_PAIRS = 64
_TILE_KEYS = 64
_EXACT_TILE_KEYS = 32
_ENOUGH_PROGRAMS = 512
"""With fewer, pieces are computed side by side: some four for each multiprocessor of a large device."""

_NO_NORM = tl.constexpr(0)
_HEAD_NORM = tl.constexpr(1)
_PROJECTION_NORM = tl.constexpr(2)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceStep:
    """A `PagedStep` on the device; copied once for all layers."""

    slots_T: Tensor
    """int64; a token whose slot is -1 is stored nowhere"""
    spans_S3: Tensor
    """int32"""
    tables_SN: Tensor
    """int32"""
    cosines_Td: Tensor
    sines_Td: Tensor
    tiles_Q2: Tensor
    """int32, of each tile of queries: its sequence, and its first token within that sequence's."""
    tile_queries: int
    """Tokens of a tile."""
    num_pieces: int
    """Of the longest sequence that the tables have room for."""

    @classmethod
    def of(cls, step: PagedStep, block_tokens: int, heads_per_group: int, device: torch.device) -> Self:
        """Copy a step; the host does not wait for it."""
        tile_size = tile_queries(heads_per_group)
        counts_S = -(-step.spans_S3[:, 1] // tile_size)
        sequences_Q = np.repeat(np.arange(len(counts_S)), counts_S)
        firsts_Q = (np.arange(counts_S.sum()) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)) * tile_size
        return cls(
            slots_T=to_device(step.slots_T, device),
            spans_S3=to_device(step.spans_S3, device),
            tables_SN=to_device(step.tables_SN, device),
            cosines_Td=to_device(step.cosines_Td, device),
            sines_Td=to_device(step.sines_Td, device),
            tiles_Q2=to_device(np.stack([sequences_Q, firsts_Q], axis=1).astype(np.int32), device),
            tile_queries=tile_size,
            num_pieces=num_pieces(step.tables_SN.shape[1], block_tokens),
        )


def tile_queries(heads_per_group: int) -> int:
    """Tokens of a tile."""
    heads: int = triton.next_power_of_2(heads_per_group)
    return max(1, _TILE_PAIRS // heads)


def num_pieces(table_blocks: int, block_tokens: int) -> int:
    """Of a sequence that fills so many cache blocks."""
    return -(-table_blocks * block_tokens // PIECE_TOKENS)


class GpuAttention:
    """A layer's attention block, see `base.Attention`.

    Raises:
        ValueError: queries, keys and values are not of one format.
    """

    def __init__(self, weights: AttentionWeights, device: torch.device) -> None:
        self._qkv = DeviceMatrices([weights.q, weights.k, weights.v], device)
        self._o = DeviceMatrices([weights.o], device)
        self._norm_D = weights.norm_D.to(device)
        self._num_heads, self._num_groups = weights.num_heads, weights.num_kv_heads
        self._head_dim = weights.q.rows // weights.num_heads
        self._eps = weights.eps
        assert (weights.q_norm is None) == (weights.k_norm is None)
        self._q_norm = self._k_norm = self._norm_D
        self._norm_kind: int = _NO_NORM.value
        if weights.q_norm is not None and weights.k_norm is not None:
            self._q_norm, self._k_norm = weights.q_norm.to(device), weights.k_norm.to(device)
            one = len(weights.q_norm) == self._head_dim
            self._norm_kind = _HEAD_NORM.value if one else _PROJECTION_NORM.value

    @property
    def heads_per_group(self) -> int:
        return self._num_heads // self._num_groups

    def __call__(self, x_TD: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: DeviceStep) -> None:
        """Add the block's output to x [T, D] float32, contiguous."""
        qkv_TR = x_TD.new_empty(len(x_TD), self._qkv.rows)
        self._qkv.multiply(normed_input(x_TD, self._norm_D, self._eps, self._qkv.tiling), qkv_TR)
        q_THd = x_TD.new_empty(len(x_TD), self._num_heads, self._head_dim)
        self._place_heads(qkv_TR, q_THd, keys_NGdB, values_NGBd, step)
        out_TR = _attend(q_THd, keys_NGdB, values_NGBd, step, self._o.tiling)
        self._o.multiply(out_TR, x_TD, add=True)

    def _place_heads(
        self, qkv_TR: Tensor, q_THd: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: DeviceStep
    ) -> None:
        """Norm and rotate queries, scaled for softmax, and keys; store keys and values at their slots."""
        _, k_offset, v_offset = self._qkv.offsets
        columns = self._head_dim if self._norm_kind == _HEAD_NORM.value else self._num_heads * self._head_dim
        _heads[(len(qkv_TR), self._num_heads + 2 * self._num_groups)](
            qkv_TR,
            self._q_norm,
            self._k_norm,
            step.cosines_Td,
            step.sines_Td,
            step.slots_T,
            q_THd,
            keys_NGdB,
            values_NGBd,
            self._qkv.rows,
            k_offset,
            v_offset,
            self._eps,
            self._head_dim**-0.5,
            HEADS=self._num_heads,
            GROUPS=self._num_groups,
            SIZE=self._head_dim,
            BLOCK=keys_NGdB.shape[3],
            NORM=self._norm_kind,
            C=triton.next_power_of_2(columns),
            HALF=triton.next_power_of_2(self._head_dim // 2),
            **LAUNCH,
        )


def _attend(q_THd: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: DeviceStep, tiling: Tiling) -> Tensor:
    """Attention of queries that are scaled already; [T, H * d], as a product's input."""
    num_tokens, num_heads, head_dim = q_THd.shape
    num_groups, block_tokens = keys_NGdB.shape[1], keys_NGdB.shape[3]
    num_tiles = len(step.tiles_Q2)
    # Of each piece of each token's heads: sums, their largest score and their total weight.
    parts_size = step.num_pieces * num_tokens * num_heads * (head_dim + 2)
    split = step.num_pieces > 1 and num_tiles * num_groups < _ENOUGH_PROGRAMS and parts_size <= MAX_PARTS_SIZE
    num_parts = step.num_pieces if split else 1
    out_TR = q_THd.new_empty(num_tokens, num_heads * head_dim, dtype=tiling.input_dtype)
    parts = q_THd.new_empty(parts_size if split else 0)
    heads_per_group = num_heads // num_groups
    exact = keys_NGdB.dtype == torch.float32
    sizes = {
        "HEADS": num_heads,
        "PER_GROUP": heads_per_group,
        "SIZE": head_dim,
        "FP4": tiling.fp4,
        "D": max(16, triton.next_power_of_2(head_dim)),
    }
    _flash[(num_tiles, num_groups, num_parts)](
        q_THd, keys_NGdB, values_NGBd, step.tiles_Q2, step.spans_S3, step.tables_SN, parts, out_TR, num_tokens,
        step.tables_SN.shape[1],
        GROUPS=num_groups, BLOCK=block_tokens, EXACT=exact, SPLIT=split, Q=step.tile_queries,
        P=triton.next_power_of_2(heads_per_group), L=_EXACT_TILE_KEYS if exact else _TILE_KEYS, PIECE=PIECE_TOKENS,
        num_stages=1 if exact or head_dim > 128 else 2, **sizes, **LAUNCH | {"num_warps": 4 if exact else 8},
    )  # fmt: skip
    if split:
        _merge_parts[(num_tokens, num_heads)](parts, out_TR, num_tokens, num_parts, **sizes, **LAUNCH)
    return out_TR


@triton.jit
def _heads(
    qkv, q_norm, k_norm, cosines, sines, slots, q, keys, values, row_size, k_offset, v_offset, eps, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token: queries first, then keys, then values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    block, offset = slot // BLOCK, slot % BLOCK
    at = tl.arange(0, HALF)
    mask = at < SIZE // 2
    stored = at < tl.where(slot >= 0, SIZE // 2, 0)
    row = qkv + token * row_size
    cosines += token * (SIZE // 2)
    sines += token * (SIZE // 2)
    if head < HEADS:
        first, second = _turned(row, head, q_norm, HEADS, cosines, sines, eps, SIZE, NORM, C, HALF)
        q_to = q + (token * HEADS + head) * SIZE + at
        tl.store(q_to, first * scale, mask=mask)
        tl.store(q_to + SIZE // 2, second * scale, mask=mask)
    elif head < HEADS + GROUPS:
        group = head - HEADS
        first, second = _turned(row + k_offset, group, k_norm, GROUPS, cosines, sines, eps, SIZE, NORM, C, HALF)
        key_to = keys + ((block * GROUPS + group) * SIZE + at) * BLOCK + offset
        _store_cache(key_to, first, stored)
        _store_cache(key_to + (SIZE // 2) * BLOCK, second, stored)
    else:
        group = head - HEADS - GROUPS
        source = row + v_offset + group * SIZE + at
        value_to = values + ((block * GROUPS + group) * BLOCK + offset) * SIZE + at
        _store_cache(value_to, tl.load(source, mask=mask, other=0.0), stored)
        _store_cache(value_to + SIZE // 2, tl.load(source + SIZE // 2, mask=mask, other=0.0), stored)


@triton.jit
def _turned(
    projection, head, norm, HEADS: tl.constexpr, cosines, sines, eps,
    SIZE: tl.constexpr, NORM: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of one of the heads of a projection, normed and rotated (Su et al., 2021)."""
    at = tl.arange(0, HALF)
    mask = at < SIZE // 2
    first = tl.load(projection + head * SIZE + at, mask=mask, other=0.0)
    second = tl.load(projection + head * SIZE + SIZE // 2 + at, mask=mask, other=0.0)
    if NORM != _NO_NORM:
        at_C = tl.arange(0, C)
        if NORM == _HEAD_NORM:
            rms = rms_scale(tl.load(projection + head * SIZE + at_C, mask=at_C < SIZE, other=0.0), SIZE, eps)
        else:
            columns: tl.constexpr = HEADS * SIZE
            rms = rms_scale(tl.load(projection + at_C, mask=at_C < columns, other=0.0), columns, eps)
            norm += head * SIZE
        first = tl.load(norm + at, mask=mask, other=0.0) * (first * rms)
        second = tl.load(norm + SIZE // 2 + at, mask=mask, other=0.0) * (second * rms)
    cos = tl.load(cosines + at, mask=mask, other=0.0)
    sin = tl.load(sines + at, mask=mask, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_cache(to, x, mask):
    if to.dtype.element_ty == tl.bfloat16:
        tl.store(to, to_bf16(x), mask=mask)
    else:
        tl.store(to, x, mask=mask)


@triton.jit
def _base(largest):
    """What scores are taken relative to: the largest, or zero where there is none yet."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _merge(sums, largest, total, part_sums, part_largest, part_total):
    """Two softmax sums, of values, and of weights relative to their largest score, as one. Minus infinity is the
    largest score of nothing at all."""
    new = tl.maximum(largest, part_largest)
    kept, added = tl.exp(largest - _base(new)), tl.exp(part_largest - _base(new))
    return sums * kept[:, None] + part_sums * added[:, None], new, total * kept + part_total * added


@triton.jit
def _piece(
    q_MD, position_M, keys, values, table, first, end, group, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, EXACT: tl.constexpr, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Softmax sums over the keys at positions from `first` to before `end`: see `_merge`."""
    at_D = tl.arange(0, D)
    in_D = at_D < SIZE
    sums_MD = tl.zeros((M, D), dtype=tl.float32)
    largest_M = tl.full((M,), float("-inf"), dtype=tl.float32)
    total_M = tl.zeros((M,), dtype=tl.float32)
    for start in range(first, end, L):
        position_L = start + tl.arange(0, L)
        in_L = position_L < end
        head_L = tl.load(table + position_L // BLOCK, mask=in_L, other=0).to(tl.int64) * GROUPS + group
        # 16 divides a block, so that neighbours in it are read at once.
        key_L = tl.max_contiguous(tl.multiple_of(head_L * (SIZE * BLOCK) + position_L % BLOCK, 16), 16)
        k_DL = tl.load(
            keys + key_L[None, :] + at_D[:, None] * BLOCK, mask=in_D[:, None] & in_L[None, :], other=0.0
        )
        value_L = (head_L * BLOCK + position_L % BLOCK) * SIZE
        v_LD = tl.load(values + value_L[:, None] + at_D[None, :], mask=in_L[:, None] & in_D[None, :], other=0.0)

        visible_ML = (position_L[None, :] <= position_M[:, None]) & in_L[None, :]
        scores_ML = dot(q_MD, k_DL, tl.zeros((M, L), dtype=tl.float32), EXACT)
        scores_ML = tl.where(visible_ML, scores_ML, float("-inf"))
        new_M = tl.maximum(largest_M, tl.max(scores_ML, axis=1))
        base_M = _base(new_M)
        kept_M = tl.exp(largest_M - base_M)
        p_ML = tl.exp(scores_ML - base_M[:, None])
        total_M = total_M * kept_M + tl.sum(p_ML, axis=1)
        # What is not visible is multiplied by zero, which does not do for a value that is not a finite number.
        bad_LD = v_LD.to(tl.float32) * 0.0 != 0.0
        bad_L = tl.max(bad_LD.to(tl.int32), axis=1) > 0
        spoilt_M = tl.max((visible_ML & bad_L[None, :]).to(tl.int32), axis=1) > 0
        total_M = tl.where(spoilt_M, float("nan"), total_M)
        v_LD = tl.where(bad_LD, 0.0, v_LD.to(tl.float32)).to(values.dtype.element_ty)
        if EXACT:
            sums_MD = dot(p_ML, v_LD, sums_MD * kept_M[:, None], EXACT)
        else:
            sums_MD = dot(to_bf16(p_ML), v_LD, sums_MD * kept_M[:, None], EXACT)
        largest_M = new_M
    return sums_MD, largest_M, total_M


@triton.jit(do_not_specialize=["num_tokens", "table_size"])
def _flash(
    q, keys, values, tiles, spans, tables, parts, out, num_tokens, table_size,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr, Q: tl.constexpr,
    P: tl.constexpr, L: tl.constexpr, PIECE: tl.constexpr, HEADS: tl.constexpr, PER_GROUP: tl.constexpr,
    SIZE: tl.constexpr, FP4: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A tile of Q queries of a sequence and the P heads that share a key head; with SPLIT, one piece of the keys."""
    M: tl.constexpr = Q * P
    tile, group = tl.program_id(0), tl.program_id(1)
    sequence, first = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    row, count = tl.load(spans + sequence * 3), tl.load(spans + sequence * 3 + 1)
    start = tl.load(spans + sequence * 3 + 2)
    end = start + tl.minimum(first + Q, count)
    table = tables + sequence * table_size
    query_M, head_M = first + tl.arange(0, M) // P, tl.arange(0, M) % P
    at_D = tl.arange(0, D)
    mask = ((query_M < count) & (head_M < PER_GROUP))[:, None] & (at_D < SIZE)[None, :]
    head_M += group * PER_GROUP
    token_M = (row + query_M).to(tl.int64)
    q_MD = tl.load(q + (token_M * HEADS + head_M)[:, None] * SIZE + at_D[None, :], mask=mask, other=0.0)
    if not EXACT:
        q_MD = to_bf16(q_MD)
    position_M = start + query_M
    if SPLIT:
        piece = tl.program_id(2)
        sums_MD, largest_M, total_M = _piece(
            q_MD, position_M, keys, values, table, piece * PIECE, tl.minimum(end, (piece + 1) * PIECE), group,
            GROUPS, SIZE, BLOCK, EXACT, M, D, L,
        )  # fmt: skip
        to_M = parts + ((piece * num_tokens + token_M) * HEADS + head_M) * (SIZE + 2)
        in_M = (query_M < count) & (tl.arange(0, M) % P < PER_GROUP)
        tl.store(to_M[:, None] + at_D[None, :], sums_MD, mask=mask)
        tl.store(to_M + SIZE, largest_M, mask=in_M)
        tl.store(to_M + SIZE + 1, total_M, mask=in_M)
    else:
        sums_MD = tl.zeros((M, D), dtype=tl.float32)
        largest_M = tl.full((M,), float("-inf"), dtype=tl.float32)
        total_M = tl.zeros((M,), dtype=tl.float32)
        for piece_start in range(0, end, PIECE):
            part_MD, part_largest_M, part_total_M = _piece(
                q_MD, position_M, keys, values, table, piece_start, tl.minimum(end, piece_start + PIECE), group,
                GROUPS, SIZE, BLOCK, EXACT, M, D, L,
            )  # fmt: skip
            sums_MD, largest_M, total_M = _merge(
                sums_MD, largest_M, total_M, part_MD, part_largest_M, part_total_M
            )
        column_MD = head_M[:, None] * SIZE + at_D[None, :]
        to_M = out + token_M * (HEADS * SIZE)
        store_input(to_M[:, None], column_MD, sums_MD / total_M[:, None], mask, FP4)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def _merge_parts(
    parts, out, num_tokens, num_parts, HEADS: tl.constexpr, PER_GROUP: tl.constexpr, SIZE: tl.constexpr,
    FP4: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The pieces of one token's head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_D = tl.arange(0, D)
    mask = at_D < SIZE
    sums_D = tl.zeros((1, D), dtype=tl.float32)
    largest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    at_1 = tl.arange(0, 1)
    for part in range(num_parts):
        source = parts + ((part * num_tokens + token) * HEADS + head) * (SIZE + 2)
        part_D = tl.load(source + at_D, mask=mask, other=0.0)[None, :]
        part_largest, part_total = tl.load(source + SIZE + at_1), tl.load(source + SIZE + 1 + at_1)
        sums_D, largest, total = _merge(sums_D, largest, total, part_D, part_largest, part_total)
    out_D = tl.reshape(sums_D / total[:, None], (D,))
    store_input(out + token * (HEADS * SIZE), head * SIZE + at_D, out_D, mask, FP4)
