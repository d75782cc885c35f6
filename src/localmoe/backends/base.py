"""The protocol that every backend implements."""

from typing import Protocol

from localmoe.core.protocols import Generator


class Backend(Generator, Protocol):
    """A `Generator` with a life: one engine, wherever it runs."""

    async def start(self) -> None:
        """Return once requests are admitted.

        Raises:
            EngineStartError: the engine cannot start; trying again without a change will fail again.
        """
        ...

    async def stop(self) -> None:
        """End the engine and free what it held. Requests that it still answers fail."""
        ...
