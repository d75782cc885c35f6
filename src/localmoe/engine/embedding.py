"""A prompt's embedding: the mean of its hidden states after the last norm, scaled to length 1.

Chunks of a prompt are summed up in integers, whose sum is the same in any order: so an embedding is the same bits
however its prompt was cut, and whatever was computed beside it. What the sums are multiples of, and the number of
positions, cancel out in the end.

Shape suffixes: T tokens, D hidden size.
"""

import math
import struct
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_PER_UNIT = 2.0**32
"""Steps of the sums: of values near 1, finer than float32's own."""
_MAX_SUM = 2.0**31
"""More would leave the range of int64; no model's hidden states come near it."""


def hidden_sums(pieces_TD: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Sums of D columns over all rows of float32 hidden states that come in pieces; at least one does.

    None where they are not finite numbers, or out of all proportion.
    """
    totals_D, largest, num_rows = [], [], 0
    for piece_TD in pieces_TD:
        num_rows += len(piece_TD)
        largest.append(piece_TD.abs().max())
        totals_D.append((piece_TD.double() * _PER_UNIT).round_().long().sum(0))
    # Of the largest of numbers one of which is not a number, nothing is true.
    if not float(torch.stack(largest).max()) * num_rows < _MAX_SUM:
        return None
    return tuple(torch.stack(totals_D).sum(0).tolist())


def added(sums: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    """The sums of two chunks; of one that has none, the other's."""
    return tuple(a + b for a, b in zip(sums, more, strict=True)) if sums and more else sums or more


def embedding(sums: Sequence[int]) -> bytes:
    """See `TokenChunk.embedding`."""
    length = math.sqrt(sum(value * value for value in sums)) or 1.0
    return struct.pack(f"<{len(sums)}f", *(value / length for value in sums))
