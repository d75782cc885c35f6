"""What the kernels' tests share: random weights, paged steps, and a reference that rounds inputs as C++ does."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import QkNorm, WeightFormat
from localmoe.formats.fp4 import Mxfp4Matrix, Nvfp4Matrix
from localmoe.formats.int8 import Int8Matrix
from localmoe.formats.packed import PackedMatrix, pack_int8, pack_matrix, pack_mxfp4, pack_nvfp4
from localmoe.formats.store import ExpertWeights
from localmoe.kernels import reference
from localmoe.kernels.base import AttentionWeights, Kernels, PagedStep, RouterWeights

HIDDEN = 64
"""Hidden size of `attention_weights`."""
MIXED = [(0, 21), (37, 1), (130, 9), (0, 1), (15, 1), (16, 2)]
"""(cached, new) tokens of some sequences."""
QUANTIZED = (WeightFormat.MXFP4, WeightFormat.NVFP4, WeightFormat.INT8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ints(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int32, from low to high - 1."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def random_codes(weights: WeightFormat, rows: int, columns: int, seed: int = 0) -> PackedMatrix:
    """A matrix of any codes a store can hold, scales included; those of MXFP4 are from 2^-12 to 2^12."""
    if weights is WeightFormat.MXFP4:
        codes = random_ints(0, 256, rows, columns // 2, seed=seed).byte()
        scales = random_ints(115, 140, rows, columns // 32, seed=seed + 1).byte()
        return pack_mxfp4(Mxfp4Matrix(codes=codes, scales=scales))
    if weights is WeightFormat.NVFP4:
        codes = random_ints(0, 256, rows, columns // 2, seed=seed).byte()
        scales = random_ints(0, 127, rows, columns // 16, seed=seed + 1).byte()
        return pack_nvfp4(Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=0.375))
    if weights is WeightFormat.INT8:
        codes = random_ints(-128, 128, rows, columns, seed=seed).to(torch.int8)
        return pack_int8(Int8Matrix(codes=codes, scales=random(rows, columns // 32, seed=seed + 1).half()))
    return pack_matrix(random(rows, columns, seed=seed), weights)


@cache
def weight_matrix(weights: WeightFormat, rows: int, columns: int, seed: int = 0) -> PackedMatrix:
    """A matrix that gives outputs of the size of its inputs."""
    return pack_matrix(random(rows, columns, seed=seed) / math.sqrt(columns), weights)


def rounded(x_TC: Tensor) -> Tensor:
    """Inputs as quantised weights meet them, float64: int8 in blocks of 32, scale max|x| / 127."""
    blocks = x_TC.reshape(len(x_TC), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 1e-30, blocks * (127 / largest), 0).round()
    return (codes.double() * (largest / 127).double()).view(x_TC.shape)


@contextmanager
def reference_rounding_inputs(weights: WeightFormat) -> Iterator[None]:
    """Within, the reference rounds what meets quantised weights."""
    with pytest.MonkeyPatch.context() as patch:
        if weights in QUANTIZED:
            patch.setattr(reference, "project", lambda x, weight: (rounded(x) @ weight.double().T).float())
        yield


def scattered_tables(lengths: Sequence[int], block_tokens: int, seed: int = 0) -> tuple[NDArray[np.int32], int]:
    """Block tables [S, N] of sequences of these lengths, padded with -1, and the number of blocks of the cache, of
    which two are nobody's."""
    counts = [-(-length // block_tokens) for length in lengths]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).numpy()
    tables_SN = np.full((len(lengths), max(counts)), -1, np.int32)
    for table, count, first in zip(tables_SN, counts, np.cumsum([0, *counts]), strict=False):
        table[:count] = order[first : first + count]
    return tables_SN, num_blocks


def paged_step(
    spans: Sequence[tuple[int, int]], tables_SN: NDArray[np.int32], block_tokens: int, head_dim: int
) -> PagedStep:
    """The step of sequences with (cached, new) tokens, found token by token."""
    slots: list[int] = []
    positions: list[int] = []
    spans_S3: list[tuple[int, int, int]] = []
    for (cached, new), table in zip(spans, tables_SN, strict=True):
        spans_S3.append((len(slots), new, cached))
        for position in range(cached, cached + new):
            slots.append(int(table[position // block_tokens]) * block_tokens + position % block_tokens)
            positions.append(position)
    frequencies = 1e4 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    angles = np.array(positions)[:, None] * frequencies
    return PagedStep(
        slots_T=np.array(slots, np.int64),
        spans_S3=np.array(spans_S3, np.int32),
        tables_SN=tables_SN,
        cosines_Td=np.cos(angles).astype(np.float32),
        sines_Td=np.sin(angles).astype(np.float32),
    )


def cache_with(
    cached: Sequence[int],
    tables_SN: NDArray[np.int32],
    shape_NGdB: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Keys [N, G, d, B] and values [N, G, B, d], random at the cached positions and NaN everywhere else."""
    num_blocks, num_groups, head_dim, block_tokens = shape_NGdB
    keys = torch.full((num_blocks, num_groups, head_dim, block_tokens), torch.nan, dtype=dtype)
    values = torch.full((num_blocks, num_groups, block_tokens, head_dim), torch.nan, dtype=dtype)
    for index, (count, table) in enumerate(zip(cached, tables_SN, strict=True)):
        k, v = (random(count, num_groups, head_dim, seed=1000 + 2 * index + i).to(dtype) for i in range(2))
        for position in range(count):
            block, offset = int(table[position // block_tokens]), position % block_tokens
            keys[block, :, :, offset] = k[position]
            values[block, :, offset] = v[position]
    return keys, values


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))


def router_weights(rows_ED: Tensor, top_k: int, *, normalize: bool, weights: WeightFormat) -> RouterWeights:
    return RouterWeights(
        norm_D=random(rows_ED.shape[1], seed=9),
        router=pack_matrix(rows_ED, weights),
        top_k=top_k,
        normalize=normalize,
        eps=1e-5,
    )


def expert_weights(weights: WeightFormat, num_experts: int, hidden: int, width: int) -> list[ExpertWeights]:
    return [
        ExpertWeights(
            gate=weight_matrix(weights, width, hidden, 3 * e),
            up=weight_matrix(weights, width, hidden, 3 * e + 1),
            down=weight_matrix(weights, hidden, width, 3 * e + 2),
        )
        for e in range(num_experts)
    ]


def random_routes(num_tokens: int, num_experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct experts of each token, and weights."""
    scores = random(num_tokens, num_experts, seed=seed)
    shares, ids = scores.softmax(-1).topk(top_k)
    return ids.int(), shares


def attention_weights(
    weights: WeightFormat, num_heads: int, num_groups: int, head_dim: int, norm: QkNorm | None = None
) -> AttentionWeights:
    q_size, k_size = num_heads * head_dim, num_groups * head_dim
    one = norm is QkNorm.HEAD
    return AttentionWeights(
        norm_D=1 + random(HIDDEN, seed=1) / 4,
        q=weight_matrix(weights, q_size, HIDDEN, 2),
        k=weight_matrix(weights, k_size, HIDDEN, 3),
        v=weight_matrix(weights, k_size, HIDDEN, 4),
        o=weight_matrix(weights, HIDDEN, q_size, 5),
        q_norm=None if norm is None else 1 + random(head_dim if one else q_size, seed=6) / 4,
        k_norm=None if norm is None else 1 + random(head_dim if one else k_size, seed=7) / 4,
        num_heads=num_heads,
        num_kv_heads=num_groups,
        eps=1e-5,
    )


class Batch:
    """Sequences of (cached, new) tokens over scattered blocks; what no sequence has written is NaN."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        weights: AttentionWeights,
        *,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        head_dim = weights.q.rows // weights.num_heads
        tables, num_blocks = scattered_tables([cached + new for cached, new in spans], block_tokens)
        self.step = paged_step(spans, tables, block_tokens, head_dim)
        shape = (num_blocks, weights.num_kv_heads, head_dim, block_tokens)
        self.cache = cache_with([cached for cached, _ in spans], tables, shape, dtype)
        self.x_TD = random(len(self.step.slots_T), HIDDEN, seed=8)

    def parts(self, sizes: Sequence[int]) -> list[tuple[slice, PagedStep]]:
        """Every sequence alone, and in chunks of these sizes, in turn."""
        parts: list[tuple[slice, PagedStep]] = []
        for (row, new, cached), table in zip(self.step.spans_S3.tolist(), self.step.tables_SN, strict=True):
            done = 0
            while done < new:
                count = min(sizes[len(parts) % len(sizes)], new - done)
                rows = slice(row + done, row + done + count)
                part = replace(
                    self.step,
                    slots_T=self.step.slots_T[rows],
                    spans_S3=np.array([[0, count, cached + done]], np.int32),
                    tables_SN=table[None],
                    cosines_Td=self.step.cosines_Td[rows],
                    sines_Td=self.step.sines_Td[rows],
                )
                parts.append((rows, part))
                done += count
        return parts

    def run(
        self, kernels: Kernels, weights: AttentionWeights, sizes: Sequence[int] = (), device: str = "cpu"
    ) -> tuple[Tensor, ...]:
        """(x, keys, values) after the step, at once or in parts, computed on the kernels' device."""
        attend, x = kernels.attention(weights), self.x_TD.clone().to(device)
        keys, values = (cache.clone().to(device) for cache in self.cache)
        for rows, step in self.parts(sizes) if sizes else [(slice(None), self.step)]:
            attend(x[rows], keys, values, step)
        return x.cpu(), keys.cpu(), values.cpu()
