"""Our own engine: a supervised process that serves one store."""

import sys
from collections.abc import Callable
from pathlib import Path

from localmoe.backends.worker import WorkerBackend
from localmoe.core.events import EventBus
from localmoe.core.inspection import Inspection
from localmoe.engine.config import EngineConfig
from localmoe.engine.launch import Launch


class NativeBackend(WorkerBackend):
    """One native engine.

    Args:
        model: the name it is served under.
        name: the engine's, where a model has several.
        store_path: the weights.
        tokenizer_path: directory of the model's tokenizer, for grammars; None: requests with one are refused.
        config: engine settings.
        available_memory: asked before each start for the bytes that the engine may count on.
        bus: where engine states and restarts are published.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "native",
        store_path: Path,
        tokenizer_path: Path | None = None,
        config: EngineConfig,
        available_memory: Callable[[], int],
        bus: EventBus,
    ) -> None:
        def launch(address: str) -> Launch:
            return Launch(
                address=address,
                model=model,
                store_path=str(store_path),
                tokenizer_path=None if tokenizer_path is None else str(tokenizer_path),
                config=config,
                available_memory_bytes=available_memory(),
            )

        super().__init__(
            model=model,
            name=name,
            config=config,
            command=[sys.executable, "-m", "localmoe.engine.process"],
            launch=launch,
            bus=bus,
        )

    async def inspect(self) -> Inspection:
        """See `core.protocols.Inspectable.inspect`."""
        return await self.current().inspect()
