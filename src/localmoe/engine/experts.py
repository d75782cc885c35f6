"""Computes routed experts whose weights are all in memory."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
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


class HostResidentExperts(ResidentExperts):
    """Every expert of a store, used where its file is mapped, and lent to a device: see `hybrid_experts.HostExperts`.

    An expert whose home is on the device stays here, too: its pages are the system's, and cost nothing.

    Args:
        store: its mapping outlives it.

    Raises:
        StoreError: a blob is damaged or cannot be read.
    """

    def __init__(self, store: Store, kernels: Kernels) -> None:
        shape = store.shape
        experts = [[ExpertId(layer, e) for e in range(shape.num_experts)] for layer in range(shape.num_layers)]
        super().__init__(
            [placed_experts(kernels, [store.read_expert(expert) for expert in layer]) for layer in experts]
        )
        self._blobs = {expert: store.expert_blob(expert) for layer in experts for expert in layer}
        self._present_LE = np.ones((shape.num_layers, shape.num_experts), np.bool_)

    stall_s = 0.0
    prefetch_layers = 0

    def present(self) -> NDArray[np.bool_]:
        return self._present_LE

    def lend(self, expert: ExpertId) -> Tensor | None:
        return self._blobs[expert]

    def return_loan(self, expert: ExpertId) -> None:
        pass  # nothing moves

    def give_up(self, expert: ExpertId) -> None:
        pass

    def room_for(self, expert: ExpertId) -> Tensor | None:
        return None  # it is here already

    def received(self, expert: ExpertId) -> None:
        raise AssertionError("there was no room")
