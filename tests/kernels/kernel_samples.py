"""What the kernels' tests share: random weights, paged steps, and a reference that rounds inputs as C++ does."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import WeightFormat
from localmoe.formats.fp4 import Mxfp4Matrix, Nvfp4Matrix
from localmoe.formats.int8 import Int8Matrix
from localmoe.formats.packed import PackedMatrix, pack_int8, pack_matrix, pack_mxfp4, pack_nvfp4
from localmoe.kernels import reference
from localmoe.kernels.base import PagedStep

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
