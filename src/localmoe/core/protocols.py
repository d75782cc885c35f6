"""What one part needs of another that it may not import."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from localmoe.core.events import TierState
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, TokenChunk

T = TypeVar("T")


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


class Inspectable(Protocol):
    """An engine that lets others see what its experts and memory are doing."""

    async def inspect(self) -> Inspection:
        """Everything as of now.

        Raises:
            BackendUnavailableError: there is no engine now, or it is too busy to say.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Routed(Generic[T]):
    """A layer's tokens on the way to their experts."""

    layer: int
    h_TD: T
    """[T, D] float32, what experts compute with."""
    ids_TK: T
    """[T, K] int32, the experts chosen, the likeliest first; -1 where nothing is to be computed for a place."""
    weights_TK: T
    """[T, K] float32."""
    ahead: Sequence[Callable[[T], T]]
    """One for each layer that follows: makes of the hidden state, as it is before this layer's experts, the ids
    [T, K] that the layer would choose. Of the next layer they are mostly right, of later ones less and less."""


class ExpertExecutor(Protocol[T]):
    """Computes the routed experts of a model, wherever their weights are."""

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        """A step begins; says of each of its tokens whether it is one of a prompt."""
        ...

    def state(self) -> TierState | None:
        """Where experts were found so far; None where all are in memory."""
        ...

    def __call__(self, routed: Routed[T], x_TD: T) -> None:
        """Add `sum over k of weights[t, k] * expert[ids[t, k]](h[t])` to the hidden state x, float32, in place."""
        ...
