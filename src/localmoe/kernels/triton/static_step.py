"""Where decode steps of one size lie on the device: always in the same memory, as captured graphs need it.

A decode step is one token for each of S sequences. Rows that a step does not fill repeat its first row, so that they
choose experts that are read anyway, but have slot -1: what they compute is stored nowhere.

Shape suffixes: S sequences, N cache blocks of a sequence, d head size (here always half of it).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.kernels.base import PagedStep
from localmoe.kernels.triton.attention import DeviceStep, num_pieces, tile_queries

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticStep(PagedStep):
    """A step that is filled again and again; its arrays are views of one buffer, copied to the device at once."""

    token_ids_S: NDArray[np.int32]
    device_token_ids_S: Tensor
    on_device: DeviceStep
    host: Tensor
    """uint8, not pinned, so that it may be filled again while a step is under way."""
    device: Tensor

    @classmethod
    def allocate(
        cls,
        *,
        num_seqs: int,
        table_blocks: int,
        head_dim: int,
        heads_per_group: int,
        block_tokens: int,
        device: torch.device,
    ) -> Self:
        """Room for so many sequences of so many cache blocks each."""
        sizes = {
            "slots_T": ((num_seqs,), torch.int64),
            "token_ids_S": ((num_seqs,), torch.int32),
            "spans_S3": ((num_seqs, 3), torch.int32),
            "tables_SN": ((num_seqs, table_blocks), torch.int32),
            "cosines_Td": ((num_seqs, head_dim // 2), torch.float32),
            "sines_Td": ((num_seqs, head_dim // 2), torch.float32),
        }
        host = torch.zeros(sum(_padded_bytes(*size) for size in sizes.values()), dtype=torch.uint8)
        there = torch.zeros_like(host, device=device)
        arrays: dict[str, NDArray[Any]] = {}
        tensors: dict[str, Tensor] = {}
        start = 0
        for name, (size, dtype) in sizes.items():
            end = start + np.prod(size).item() * dtype.itemsize
            arrays[name] = host[start:end].view(dtype).view(size).numpy()
            tensors[name] = there[start:end].view(dtype).view(size)
            start += _padded_bytes(size, dtype)
        arrays["spans_S3"][:] = [(row, 1, 0) for row in range(num_seqs)]
        arrays["slots_T"][:] = -1
        tiles_Q2 = torch.tensor([(sequence, 0) for sequence in range(num_seqs)], dtype=torch.int32, device=device)
        token_ids_S = tensors.pop("token_ids_S")
        on_device = DeviceStep(
            **tensors,
            tiles_Q2=tiles_Q2,
            tile_queries=tile_queries(heads_per_group),
            num_pieces=num_pieces(table_blocks, block_tokens),
        )
        return cls(**arrays, device_token_ids_S=token_ids_S, on_device=on_device, host=host, device=there)

    def fill(self, token_ids_T: NDArray[np.int32], step: PagedStep) -> None:
        """Take a step of one token for each of up to S sequences; the host does not wait for the copy."""
        count, width = step.tables_SN.shape
        self.slots_T[:count] = step.slots_T
        self.slots_T[count:] = -1
        self.tables_SN[:count, :width] = step.tables_SN
        self.tables_SN[count:, :width] = step.tables_SN[0]
        starts_S = self.spans_S3[:, 2]
        for to, source in (
            (self.token_ids_S, token_ids_T),
            (starts_S, step.spans_S3[:, 2]),
            (self.cosines_Td, step.cosines_Td),
            (self.sines_Td, step.sines_Td),
        ):
            to[:count], to[count:] = source, source[0]
        # What is copied from is torch's, which keeps it as it is until the copy has ended.
        self.device.copy_(self.host.pin_memory() if self.device.is_cuda else self.host, non_blocking=True)


def _padded_bytes(size: tuple[int, ...], dtype: torch.dtype) -> int:
    num_bytes: int = np.prod(size).item() * dtype.itemsize
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
