"""The protocol that every backend implements."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from localmoe.core.events import EventBus
from localmoe.core.protocols import Generator
from localmoe.core.request import Request


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """What an engine of another package is told when it is made; see docs/adding-an-engine.md."""

    model: str
    """The name that the model is served under."""
    name: str
    """The engine's, unique among those of the model; for logs and metrics."""
    model_path: Path | None
    """The directory of the model's configuration and tokenizer; None where the model is not on this machine."""
    home: Path
    """`LOCALMOE_HOME`."""
    bus: EventBus
    """Gets events, such as the engine's state."""


class Backend(Generator, Protocol):
    """A `Generator` with a life: one engine, wherever it runs.

    `generate` goes on after `Request.resumed_ids`, where there are any, and sends what follows only. An engine that
    has no embeddings refuses `Request.embed`.
    """

    capacity: int
    """Requests that it computes at once; more would wait in it."""

    async def start(self) -> None:
        """Return once requests are admitted.

        Raises:
            EngineStartError: the engine cannot start; trying again without a change will fail again.
        """
        ...

    async def stop(self) -> None:
        """End the engine and free what it held. Requests that it still answers fail."""
        ...

    def refusal(self, request: Request) -> str | None:
        """Why this engine could not give the answer that is asked for; None if it can. Must be quick."""
        ...
