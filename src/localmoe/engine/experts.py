"""Computes routed experts whose weights are all in memory."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import ExpertId
from localmoe.core.protocols import ExpertExecutor, Routed
from localmoe.formats.store import Store
from localmoe.kernels.base import Experts, Kernels, placed_experts


class LocatedExperts(ExpertExecutor[Tensor], Protocol):
    """Experts that know where they are."""

    @property
    def stall_s(self) -> float:
        """Total time in which there was nothing to do but wait for experts."""
        ...

    def present(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] is in memory now, of whatever kind."""
        ...

    def on_device(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] is on a GPU now."""
        ...


class ResidentExperts:
    """Every expert of every layer, all placed.

    Args:
        on_device: whether that is in a GPU's memory.
    """

    stall_s = 0.0

    def __init__(self, layers: Sequence[Experts], num_experts: int, *, on_device: bool) -> None:
        self._layers = layers
        self._present_LE = np.ones((len(layers), num_experts), np.bool_)
        self._on_device_LE = np.full_like(self._present_LE, on_device)

    @classmethod
    def mapped(cls, store: Store, kernels: Kernels, *, on_device: bool = False) -> Self:
        """Those of a store, used where its file is mapped, or copied to a device.

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
            ],
            shape.num_experts,
            on_device=on_device,
        )

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        pass  # nothing moves

    def state(self) -> None:
        return None

    def present(self) -> NDArray[np.bool_]:
        return self._present_LE

    def on_device(self) -> NDArray[np.bool_]:
        return self._on_device_LE

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        self._layers[routed.layer](routed.h_TD, routed.ids_TK, routed.weights_TK, x_TD)
