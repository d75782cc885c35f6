"""Computes routed experts whose weights are all in memory."""

from torch import Tensor

from localmoe.core.model import ExpertId
from localmoe.formats.store import Store
from localmoe.kernels.base import Kernels, placed_experts


class ResidentExperts:
    """Every expert of a store, used where the store's file is mapped.

    Args:
        store: each blob's checksum is verified at its first read.
        kernels: what computes.

    Raises:
        StoreError: a blob is damaged or cannot be read.
    """

    def __init__(self, store: Store, kernels: Kernels) -> None:
        shape = store.shape
        self._layers = [
            placed_experts(
                kernels, [store.read_expert(ExpertId(layer, expert)) for expert in range(shape.num_experts)]
            )
            for layer in range(shape.num_layers)
        ]

    def __call__(self, layer: int, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, x_TD: Tensor) -> None:
        self._layers[layer](h_TD, ids_TK, weights_TK, x_TD)
