"""Computes routed experts whose weights are all in memory."""

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from localmoe.core.model import ExpertId
from localmoe.core.protocols import Routed
from localmoe.formats.store import Store
from localmoe.kernels.base import Experts, Kernels, placed_experts


class ResidentExperts:
    """Every expert of every layer, all placed."""

    def __init__(self, layers: Sequence[Experts]) -> None:
        self._layers = layers

    @classmethod
    def mapped(cls, store: Store, kernels: Kernels) -> Self:
        """Those of a store, used where its file is mapped.

        Raises:
            StoreError: a blob is damaged or cannot be read.
        """
        shape = store.shape
        return cls(
            [
                placed_experts(
                    kernels, [store.read_expert(ExpertId(layer, expert)) for expert in range(shape.num_experts)]
                )
                for layer in range(shape.num_layers)
            ]
        )

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        pass  # nothing moves

    def state(self) -> None:
        return None

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        self._layers[routed.layer](routed.h_TD, routed.ids_TK, routed.weights_TK, x_TD)
