"""Computes routed experts whose weights are all in memory."""

import torch
from torch import Tensor

from localmoe.core.model import ExpertId
from localmoe.formats.store import Store
from localmoe.kernels import reference as kernels


class ResidentExperts:
    """Every expert of a store, expanded to float32 at start.

    Args:
        store: each blob's checksum is verified as it is read.

    Raises:
        StoreError: a blob is damaged or cannot be read.
    """

    def __init__(self, store: Store) -> None:
        shape = store.shape
        self._gate_up: list[Tensor] = []
        self._down: list[Tensor] = []
        for layer in range(shape.num_layers):
            gate_up = torch.empty(shape.num_experts, 2 * shape.expert_size, shape.hidden_size)
            down = torch.empty(shape.num_experts, shape.hidden_size, shape.expert_size)
            for expert in range(shape.num_experts):
                gate, up, down_DF = store.read_expert(ExpertId(layer, expert)).dequantize(torch.float32)
                gate_up[expert, : shape.expert_size] = gate
                gate_up[expert, shape.expert_size :] = up
                down[expert] = down_DF
            self._gate_up.append(gate_up)
            self._down.append(down)

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return kernels.moe(x_TD, expert_ids_TK, weights_TK, self._gate_up[layer], self._down[layer])
