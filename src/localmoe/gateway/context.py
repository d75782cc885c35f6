"""What every route needs, passed in once."""

from collections.abc import Mapping
from dataclasses import dataclass

from localmoe.core.errors import ModelNotFoundError
from localmoe.core.events import EventBus
from localmoe.core.protocols import Generator, Inspectable
from localmoe.gateway.config import GatewayConfig
from localmoe.text.text_model import TextModel


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model under its public name."""

    id: str
    created: int
    """Unix time in seconds."""
    text: TextModel
    context_tokens: int
    """Prompt and answer together may not be longer."""
    generator: Generator
    inspectable: Inspectable | None = None
    """The same engine, where it can be looked into."""


@dataclass(frozen=True, kw_only=True)
class GatewayContext:
    """Shared by all routes of one app."""

    models: Mapping[str, ServedModel]
    config: GatewayConfig
    bus: EventBus

    def model(self, model_id: str) -> ServedModel:
        """The served model of this name.

        Raises:
            ModelNotFoundError: it is not served here.
        """
        served = self.models.get(model_id)
        if served is None:
            names = ", ".join(self.models) or "none"
            raise ModelNotFoundError(f"model {model_id[:200]!r} is not served here; served models: {names}")
        return served
