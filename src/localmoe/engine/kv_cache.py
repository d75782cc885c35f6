"""The paged key-value cache's tensors, and where each token of a step lands in them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import ModelShape
from localmoe.core.plans import SequenceStep
from localmoe.kernels.base import PagedStep


class KVCache:
    """Blocks of keys and values for every layer.

    Keys are [N blocks, G heads, d, B tokens], so that a kernel's lanes are neighbouring tokens; values [N, G, B, d].
    """

    def __init__(
        self, shape: ModelShape, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_tokens = block_tokens
        heads, layers = (num_blocks, shape.num_kv_heads), range(shape.num_layers)
        self.keys = [_zeros((*heads, shape.head_dim, block_tokens), dtype, device) for _ in layers]
        self.values = [_zeros((*heads, block_tokens, shape.head_dim), dtype, device) for _ in layers]

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero what is not a finite number in these blocks, before they go to another sequence."""
        index = torch.tensor(blocks, device=self.keys[0].device)
        for cache in (*self.keys, *self.values):
            cache[index] = cache[index].nan_to_num(0.0, 0.0, 0.0)


def place(steps: Sequence[SequenceStep], block_tokens: int, frequencies_d: NDArray[np.float32]) -> PagedStep:
    """Addresses and rotary angles of a step's tokens, in the order of `steps`."""
    counts = np.array([len(step.token_ids) for step in steps])
    starts = np.array([step.start for step in steps])
    widths = -(-(starts + counts) // block_tokens)
    tables_SN = np.zeros((len(steps), int(widths.max())), np.int32)
    for row, step, width in zip(tables_SN, steps, widths, strict=True):
        row[:width] = step.block_table[:width]
    first_rows = np.cumsum(counts) - counts
    sequence_T = np.repeat(np.arange(len(steps)), counts)
    positions_T = np.arange(counts.sum()) - np.repeat(first_rows - starts, counts)
    blocks_T = tables_SN[sequence_T, positions_T // block_tokens].astype(np.int64)
    angles_Td = positions_T[:, None].astype(np.float32) * frequencies_d
    return PagedStep(
        slots_T=blocks_T * block_tokens + positions_T % block_tokens,
        spans_S3=np.stack([first_rows, counts, starts], axis=1).astype(np.int32),
        tables_SN=tables_SN,
        cosines_Td=np.cos(angles_Td),
        sines_Td=np.sin(angles_Td),
    )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In RAM, their pages come at first touch: NumPy allocates with calloc, torch would write them all."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    words = np.zeros(size, np.int16 if dtype == torch.bfloat16 else np.int32)
    return torch.from_numpy(words).view(dtype)
