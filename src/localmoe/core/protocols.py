"""What one part needs of another that it may not import."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, TypeVar

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


class ExpertExecutor(Protocol[T]):
    """Computes the routed experts of a model, wherever their weights are."""

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        """A step begins; says of each of its tokens whether it is one of a prompt."""
        ...

    def state(self) -> TierState | None:
        """Where experts were found so far; None where all are in memory."""
        ...

    def __call__(
        self, layer: int, h_TD: T, ids_TK: T, weights_TK: T, x_TD: T, ahead: Sequence[Callable[[T], T]]
    ) -> None:
        """Add `sum over k of weights[t, k] * expert[ids[t, k]](h[t])` to x in place; ids int32, the rest float32.

        Args:
            ahead: one for each layer that follows: makes of x, as it is given, the ids [T, K] that the layer would
                choose for it. Of the next layer they are mostly right, of later ones less and less.
        """
        ...
