"""What the codecs of the block formats share: checks of their arguments, and how they cut up their work."""

from collections.abc import Iterator

import torch

from localmoe.core.errors import CheckpointError

CHUNK_ELEMENTS = (1 << 15) - 1
"""Elements worked on at once: scratch stays in the cache, and torch keeps an operation of fewer than 2^15 elements
on one thread. Thousands of operations that each wait for all threads take minutes when the machine is busy."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Cut a matrix into runs of rows, each small enough to work on at once."""
    step = max(1, CHUNK_ELEMENTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def check_values(values_RC: torch.Tensor, block_size: int, codec: str) -> tuple[int, int]:
    """Rows and columns. Raises CheckpointError unless this is a float matrix of whole blocks."""
    if values_RC.dim() != 2 or not values_RC.is_floating_point() or values_RC.numel() == 0:
        raise CheckpointError(
            f"{codec} needs a matrix of floats, this is {values_RC.dtype} of shape {tuple(values_RC.shape)}"
        )
    rows, columns = values_RC.shape
    if columns % block_size:
        raise CheckpointError(f"{columns} columns do not divide into {codec} blocks of {block_size}")
    return rows, columns


def check_finite(amax: torch.Tensor, codec: str) -> None:
    """Refuse blocks by their maxima: NaN and infinity survive the maximum, so that each value has been looked at."""
    if not torch.isfinite(amax).all():
        raise CheckpointError(f"NaN or infinite values cannot be quantised to {codec}")
