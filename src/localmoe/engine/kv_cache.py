"""The paged key-value cache's tensors, and where each token of a step lands in them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from localmoe.core.model import ModelShape
from localmoe.core.plans import SequenceStep
from localmoe.kernels.reference import PagedBatch, paged_attention


class KVCache:
    """Blocks of keys and values for every layer, float32 [N blocks, B tokens, G heads, d]."""

    def __init__(self, shape: ModelShape, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        size = (shape.num_layers, num_blocks, block_tokens, shape.num_kv_heads, shape.head_dim)
        self._keys, self._values = _lazy_zeros(size), _lazy_zeros(size)

    def attend(self, batch: PagedBatch, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Store the step's keys and values, then attend over everything cached; [T, H, d]."""
        keys, values = self._keys[layer], self._values[layer]
        keys.flatten(0, 1)[batch.slots_T] = k_TGd
        values.flatten(0, 1)[batch.slots_T] = v_TGd
        return paged_attention(q_THd, keys, values, batch)

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero what is not a finite number in these blocks: masked slots are multiplied by zero, not skipped, so one
        NaN would spread to whoever gets the block next."""
        index = torch.tensor(blocks)
        for cache in (self._keys, self._values):
            cache[:, index] = cache[:, index].nan_to_num(0.0, 0.0, 0.0)


def place(steps: list[SequenceStep], block_tokens: int) -> PagedBatch:
    """Addresses of a step's tokens. Sequences with several tokens come first in `steps`."""
    spans: list[tuple[int, int]] = []
    tables, lengths = [], []
    decodes = [step for step in steps if len(step.token_ids) == 1]
    slots, row = [], 0
    for step in steps:
        count = len(step.token_ids)
        table = torch.tensor(step.block_table)
        positions = torch.arange(step.start, step.start + count)
        slots.append(table[positions // block_tokens] * block_tokens + positions % block_tokens)
        if count > 1:
            assert row == sum(end - start for start, end in spans), "sequences with several tokens come first"
            spans.append((row, row + count))
            lengths.append(step.start + count)
            tables.append(table[: -(-lengths[-1] // block_tokens)])
        row += count
    decode_lengths = torch.tensor([step.start + 1 for step in decodes], dtype=torch.int64)
    width = max((-(-(step.start + 1) // block_tokens) for step in decodes), default=0)
    decode_blocks = torch.zeros(len(decodes), width, dtype=torch.int64)
    for i, step in enumerate(decodes):
        used = step.block_table[:width]
        decode_blocks[i, : len(used)] = torch.tensor(used)
    return PagedBatch(
        slots_T=torch.cat(slots),
        spans=tuple(spans),
        span_blocks=tuple(tables),
        span_lengths=tuple(lengths),
        decode_start=row - len(decodes),
        decode_blocks_SN=decode_blocks,
        decode_lengths_S=decode_lengths,
    )


def _lazy_zeros(size: tuple[int, ...]) -> Tensor:
    """Zeros whose pages come at first touch: NumPy allocates with calloc, torch would write them all."""
    return torch.from_numpy(np.zeros(size, np.float32))
