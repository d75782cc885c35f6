"""The C++ kernels behind the operations of `base`: one wrapper each, which gives the arrays their types.

Arithmetic, on one machine the same bits at every level of instructions, for every batch and number of threads:

- Weights in MXFP4, NVFP4 and INT8 meet inputs rounded to int8 in blocks of 32, scale max|x| / 127. Products within a
  weight's block are exact integers; blocks are added in float32 in order of columns. Against the exact product, the
  error of an output is at most `sum over blocks of max|x| / 254 * sum|w|`, and float32 rounding.
- Weights in BF16 and F32 meet float32 inputs, added in order of columns.
- A token with an input that is NaN or infinite gets outputs that are not finite numbers. A block of inputs below
  1e-30 counts as zeros. Products with MXFP4 scales from 2^111 on may overflow where their sum would not.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from localmoe import _cpu
from localmoe.core.errors import EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store import ExpertWeights
from localmoe.kernels.base import (
    Attention,
    AttentionWeights,
    Draws,
    Embedding,
    Experts,
    Head,
    Norm,
    PagedStep,
    Router,
    RouterWeights,
)


class CpuKernels:
    """The kernels of one level of instructions on threads of their own.

    Args:
        level: one of `_cpu.levels()`.
        num_threads: the caller's own included.
        pin: keep each thread on one processor.

    Raises:
        ValueError: the machine does not run this level.
    """

    def __init__(self, level: str, num_threads: int, *, pin: bool) -> None:
        self._runtime = _cpu.Runtime(level, num_threads, pin)
        self.level = level
        self.name = f"{level}, {num_threads} threads"

    def linear(self, weights: PackedMatrix) -> Callable[[Tensor], Tensor]:
        """x [T, C] → `x @ weights.T` [T, R]; for tests and benchmarks, a decoder needs only what is fused."""
        runtime, matrix = self._runtime, _matrix(weights)

        def multiply(x_TC: Tensor) -> Tensor:
            out_TR = torch.empty(len(x_TC), weights.rows)
            runtime.linear(matrix, x_TC.numpy(), out_TR.numpy())
            return out_TR

        return multiply

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def in_place(self) -> bool:
        return True

    def memory_bytes(self, stored_bytes: int, num_weights: int) -> int:
        return stored_bytes  # used where the file is mapped

    def embedding(self, weights: PackedMatrix) -> Embedding:
        runtime, matrix = self._runtime, _matrix(weights)

        def embed(token_ids_T: Tensor) -> Tensor:
            x_TD = torch.empty(len(token_ids_T), weights.columns)
            runtime.embed(matrix, token_ids_T.numpy(), x_TD.numpy())
            return x_TD

        return embed

    def attention(self, weights: AttentionWeights) -> Attention:
        runtime = self._runtime
        bound = _cpu.Attention(
            norm=weights.norm_D.numpy(),
            q=_matrix(weights.q),
            k=_matrix(weights.k),
            v=_matrix(weights.v),
            o=_matrix(weights.o),
            q_norm=None if weights.q_norm is None else weights.q_norm.numpy(),
            k_norm=None if weights.k_norm is None else weights.k_norm.numpy(),
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            eps=weights.eps,
        )

        def attend(x_TD: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: PagedStep) -> None:
            num_blocks = len(keys_NGdB)
            runtime.attention(
                bound,
                keys_NGdB.view(num_blocks, -1).view(torch.uint8).numpy(),
                values_NGBd.view(num_blocks, -1).view(torch.uint8).numpy(),
                keys_NGdB.dtype == torch.bfloat16,
                keys_NGdB.shape[3],
                step.spans_S3,
                step.tables_SN,
                step.slots_T,
                step.cosines_Td,
                step.sines_Td,
                x_TD.numpy(),
            )

        return attend

    def router(self, weights: RouterWeights) -> Router:
        runtime, norm, eps = self._runtime, weights.norm_D.numpy(), weights.eps
        matrix, top_k, normalize = weights.router, weights.top_k, weights.normalize
        if matrix is None:
            normed = self.norm(weights.norm_D, eps)

            def all_to_one(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                h_TD = normed(x_TD)
                return h_TD, torch.zeros(len(x_TD), 1, dtype=torch.int32), torch.ones(len(x_TD), 1)

            return all_to_one
        if top_k > _cpu.MAX_TOP_K:
            raise EngineStartError(
                f"the model sends a token to {top_k} experts, {_cpu.MAX_TOP_K} are most for the C++ kernels; "
                f"set cpu_level to 'reference'"
            )
        bound = _matrix(matrix)

        def route(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h_TD = torch.empty_like(x_TD)
            ids_TK = torch.empty(len(x_TD), top_k, dtype=torch.int32)
            weights_TK = torch.empty(len(x_TD), top_k)
            runtime.route(
                norm, eps, bound, normalize, x_TD.numpy(), h_TD.numpy(), ids_TK.numpy(), weights_TK.numpy()
            )
            return h_TD, ids_TK, weights_TK

        return route

    def experts(self, num_experts: int, hidden_size: int, expert_size: int, weights: WeightFormat) -> Experts:
        return _CpuExperts(self._runtime, _cpu.Experts(weights.value, num_experts, hidden_size, expert_size))

    def norm(self, norm_D: Tensor, eps: float) -> Norm:
        runtime, weights_D = self._runtime, norm_D.numpy()

        def normed(x_TD: Tensor) -> Tensor:
            h_TD = torch.empty_like(x_TD)
            runtime.norm(weights_D, eps, x_TD.numpy(), h_TD.numpy())
            return h_TD

        return normed

    def head(self, norm_D: Tensor, weights: PackedMatrix, eps: float) -> Head:
        runtime, norm, matrix = self._runtime, norm_D.numpy(), _matrix(weights)

        def score(x_SD: Tensor) -> Tensor:
            logits_SV = torch.empty(len(x_SD), weights.rows)
            runtime.logits(norm, eps, matrix, x_SD.numpy(), logits_SV.numpy())
            return logits_SV

        return score

    def draw(self, logits_SV: Tensor, draws: Draws) -> list[int]:
        ids_S = np.empty(len(logits_SV), np.int32)
        self._runtime.draw(
            logits_SV.numpy(),
            draws.temperatures_S,
            draws.top_k_S,
            draws.top_p_S,
            draws.min_p_S,
            draws.uniforms_S,
            ids_S,
        )
        return ids_S.tolist()

    def read(self, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Read a buffer once with all threads: what bandwidth is measured with."""
        self._runtime.read(data)


class _CpuExperts:
    """A layer's experts, used where their bytes lie."""

    def __init__(self, runtime: _cpu.Runtime, bound: _cpu.Experts) -> None:
        self._runtime = runtime
        self._bound = bound

    def place(self, expert: int, weights: ExpertWeights) -> None:
        self._bound.place(expert, _matrix(weights.gate), _matrix(weights.up), _matrix(weights.down))

    def remove(self, expert: int) -> None:
        self._bound.remove(expert)

    def __call__(self, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, x_TD: Tensor) -> None:
        self._runtime.moe(self._bound, h_TD.numpy(), ids_TK.numpy(), weights_TK.numpy(), x_TD.numpy())

    def begin(self, h_TD: Tensor, ids_TK: Tensor) -> None:
        self._runtime.moe_begin(self._bound, h_TD.numpy(), ids_TK.numpy())

    def compute(self, experts: Sequence[int]) -> None:
        self._runtime.moe_compute(self._bound, experts)

    def finish(self, weights_TK: Tensor, x_TD: Tensor) -> None:
        self._runtime.moe_finish(self._bound, weights_TK.numpy(), x_TD.numpy())


def _matrix(packed: PackedMatrix) -> _cpu.Matrix:
    return _cpu.Matrix(
        packed.format.value,
        packed.rows,
        packed.columns,
        packed.values.numpy(),
        packed.scales.numpy(),
        packed.tensor_scale,
    )
