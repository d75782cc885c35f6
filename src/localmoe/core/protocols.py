"""What one part needs of another that it may not import."""

from collections.abc import AsyncGenerator
from typing import Protocol, TypeVar

from localmoe.core.request import Request, TokenChunk

T_contra = TypeVar("T_contra", contravariant=True)


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


class ExpertExecutor(Protocol[T_contra]):
    """Computes the routed experts of a layer, wherever their weights are."""

    def __call__(
        self,
        layer: int,
        h_TD: T_contra,
        ids_TK: T_contra,
        weights_TK: T_contra,
        x_TD: T_contra,
    ) -> None:
        """Add `sum over k of weights[t, k] * expert[ids[t, k]](h[t])` to x in place; ids int32, the rest float32."""
        ...
