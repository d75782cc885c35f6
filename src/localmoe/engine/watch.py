"""What watches a decoder's experts."""

from typing import Protocol

from torch import Tensor

from localmoe.core.protocols import ExpertExecutor


class Watch(ExpertExecutor[Tensor], Protocol):
    """Experts that somebody watches, layer by layer or, after a step that was replayed, all of it at once."""

    @property
    def watched(self) -> ExpertExecutor[Tensor]:
        """What computes."""
        ...

    @property
    def needs_each_layer(self) -> bool:
        """Whether it must see a layer before the next is computed."""
        ...

    def replayed(self, ids_LTK: Tensor) -> None:
        """A step that has begun went past it: these are its choices, its own to keep."""
        ...
