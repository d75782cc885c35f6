"""What every route needs, passed in once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localmoe.core.current import Current
from localmoe.core.errors import InvalidRequestError, ModelNotFoundError
from localmoe.core.events import EventBus
from localmoe.core.protocols import (
    ConfigOperations,
    Generator,
    Inspectable,
    MemoryMeter,
    ModelOperations,
    PerformanceStats,
    ResponseStore,
)
from localmoe.gateway.answering.grammar_checks import GrammarChecker
from localmoe.gateway.config import GatewayConfig
from localmoe.text.text_model import TextModel

if TYPE_CHECKING:
    from localmoe.gateway.jobs.services import JobServices


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model under its public name."""

    id: str
    created: int
    """Unix time in seconds."""
    text: TextModel | None
    """None where only its engine has the tokenizer; then requests take their text along, and answers come as text."""
    context_tokens: int | None
    """Prompt and answer together may not be longer; None: only its engine knows."""
    generator: Generator
    inspectables: Sequence[Inspectable] = ()
    """Its engines, those that can be looked into."""
    adapter: str | None = None
    """Low-rank weights that its engines add, by the name that they know them by; it is then another model to
    clients, with the `parent`'s engines."""
    parent: str | None = None
    fallbacks: Sequence[str] = ()
    """Names of models that answer where it cannot, in this order."""

    @property
    def local_text(self) -> TextModel:
        """Its tokenizer and template.

        Raises:
            InvalidRequestError: they are not here.
        """
        if self.text is None:
            raise InvalidRequestError(
                f"model {self.id!r} runs on another server, and its tokenizer is not here: send text, and do not ask "
                "for token ids or log-probabilities"
            )
        return self.text


@dataclass(frozen=True, kw_only=True)
class Services:
    """What routes ask of other parts of the server."""

    operations: ModelOperations
    performance: PerformanceStats
    memory: MemoryMeter
    render_metrics: Callable[[], tuple[bytes, str]]
    """What `/metrics` shows, with its content type."""
    responses: ResponseStore
    jobs: "JobServices | None" = None
    """None: nothing is answered later, and no files are kept."""
    configuration: ConfigOperations | None = None
    """None: it is not changed while the server serves."""


@dataclass(frozen=True, kw_only=True)
class GatewayContext:
    """Shared by all routes of one app."""

    models: Mapping[str, ServedModel]
    current: Current[GatewayConfig]
    bus: EventBus
    grammars: GrammarChecker = field(default_factory=GrammarChecker)

    @property
    def config(self) -> GatewayConfig:
        """Settings as they are now."""
        return self.current.now

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

    def holders(self, model_id: str) -> Iterator[ServedModel]:
        """The model of this name, then another that has got it meanwhile. Looked up only when the one before has
        failed.

        Raises:
            ModelNotFoundError: it is not served here.
        """
        served = self.model(model_id)
        yield served
        successor = self.models.get(model_id, served)
        if successor is not served:
            yield successor

    def candidates(self, model_id: str) -> Iterator[ServedModel]:
        """As `holders`, then those that may answer in its place."""
        served = self.model(model_id)
        yield from self.holders(model_id)
        for name in served.fallbacks:
            if name in self.models:
                yield self.models[name]
