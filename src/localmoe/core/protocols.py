"""What one part needs of another that it may not import."""

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from localmoe.core.request import Request, TokenChunk

TensorT = TypeVar("TensorT")


class Generator(Protocol):
    """Anything that answers requests: one engine, or a dispatcher over many."""

    def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer. Closing the generator cancels the request and frees what it held.

        Raises:
            BackendUnavailableError: no engine can take it, or the engine died under it.
            EngineFaultError: the engine failed on this request.
        """
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted now."""
        ...


class ExpertExecutor(Protocol[TensorT]):
    """Computes the routed experts of a layer, wherever their weights are."""

    def __call__(self, layer: int, x_TD: TensorT, expert_ids_TK: TensorT, weights_TK: TensorT) -> TensorT:
        """Sum over k of `weights[t, k] * expert[expert_ids[t, k]](x[t])`, shape [T, D], dtype of x."""
        ...


class AttentionExecutor(Protocol[TensorT]):
    """Stores a step's keys and values and attends over everything cached so far."""

    def __call__(self, layer: int, q_THd: TensorT, k_TGd: TensorT, v_TGd: TensorT) -> TensorT:
        """Causal attention of each token over its own sequence, shape [T, H, d]; q and k are rotated already."""
        ...
