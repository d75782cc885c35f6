"""The Triton kernels behind the operations of `base`, on tensors of one device.

Hidden states, logits and the cache live on the device. Token ids, where tokens lie (`PagedStep`) and how they are
drawn are copied from the host; only drawn tokens go back, and no other operation waits for the device.

`triton.product` documents the arithmetic of products. Router weights in BF16 and F32 meet float32 inputs, so that the
choice of experts depends on rounding as little as with other kernels. Results are the same bits for every batch.
"""

import torch
from torch import Tensor

from localmoe.core.model import WeightFormat
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store_layout import expert_layout
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
from localmoe.kernels.triton import rows, sampling
from localmoe.kernels.triton.attention import DeviceStep, GpuAttention
from localmoe.kernels.triton.experts import ExpertSlab, ResidentExperts
from localmoe.kernels.triton.product import DeviceMatrices
from localmoe.kernels.triton.static_step import StaticStep


class GpuKernels:
    """The kernels on one CUDA device.

    Args:
        device: a CUDA device of compute capability 8.0 (Ampere) or higher; `cpu` where Triton's interpreter runs
            the kernels, for tests.
    """

    def __init__(self, device: torch.device) -> None:
        self.level = "triton"
        self.name = self.level
        if device.type == "cuda":
            self.name = f"{self.level}, {torch.cuda.get_device_name(device)}"
        self._device = device
        self._copied: tuple[PagedStep, DeviceStep] | None = None
        """The last step: every layer asks for the same."""

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def in_place(self) -> bool:
        return False

    def memory_bytes(self, stored_bytes: int, num_weights: int) -> int:
        return stored_bytes

    def embedding(self, weights: PackedMatrix) -> Embedding:
        table = DeviceMatrices([weights], self._device)
        return lambda token_ids_T: rows.embed(table, token_ids_T.to(self._device, non_blocking=True))

    def attention(self, weights: AttentionWeights) -> Attention:
        attention = GpuAttention(weights, self._device)

        def attend(x_TD: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: PagedStep) -> None:
            on_device = self._on_device(step, keys_NGdB.shape[3], attention.heads_per_group)
            attention(x_TD, keys_NGdB, values_NGBd, on_device)

        return attend

    def router(self, weights: RouterWeights) -> Router:
        norm_D, device = weights.norm_D.to(self._device), self._device
        if weights.router is None:

            def all_to_one(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                ids_TK = torch.zeros(len(x_TD), 1, dtype=torch.int32, device=device)
                return rows.normed(x_TD, norm_D, weights.eps), ids_TK, torch.ones(len(x_TD), 1, device=device)

            return all_to_one
        matrix = weights.router
        exact = matrix.format in (WeightFormat.BF16, WeightFormat.F32)
        router = DeviceMatrices([matrix], device, exact=exact)

        def route(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h_TD = rows.normed(x_TD, norm_D, weights.eps)
            logits_TE = torch.empty(len(x_TD), matrix.rows, device=device)
            router.multiply(h_TD if exact else rows.prepare(h_TD, router.tiling), logits_TE)
            ids_TK, weights_TK = rows.choose_experts(logits_TE, weights.top_k, normalize=weights.normalize)
            return h_TD, ids_TK, weights_TK

        return route

    def experts(self, num_experts: int, hidden_size: int, expert_size: int, weights: WeightFormat) -> Experts:
        """A layer's experts, with room for all of them on the device; where there is not, see `SlotExperts`."""
        layout = expert_layout(hidden_size, expert_size, weights)
        return ResidentExperts(ExpertSlab.allocate(layout, num_experts, self._device), num_experts)

    def norm(self, norm_D: Tensor, eps: float) -> Norm:
        norm_D = norm_D.to(self._device)
        return lambda x_TD: rows.normed(x_TD, norm_D, eps)

    def head(self, norm_D: Tensor, weights: PackedMatrix, eps: float) -> Head:
        norm_D, matrix = norm_D.to(self._device), DeviceMatrices([weights], self._device)

        def score(x_SD: Tensor) -> Tensor:
            logits_SV = torch.empty(len(x_SD), weights.rows, device=self._device)
            matrix.multiply(rows.normed_input(x_SD, norm_D, eps, matrix.tiling), logits_SV)
            return logits_SV

        return score

    def draw(self, logits_SV: Tensor, draws: Draws) -> list[int]:
        """Waits for the device."""
        token_ids: list[int] = sampling.draw(logits_SV, draws).tolist()
        return token_ids

    def _on_device(self, step: PagedStep, block_tokens: int, heads_per_group: int) -> DeviceStep:
        if isinstance(step, StaticStep):
            return step.on_device
        if self._copied is None or self._copied[0] is not step:
            self._copied = step, DeviceStep.of(step, block_tokens, heads_per_group, self._device)
        return self._copied[1]
