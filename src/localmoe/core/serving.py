"""What is to be served, and by which engines."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from localmoe.core.model import WeightFormat

AnswerFormatName = Literal[
    "hermes", "qwen3_coder", "mistral", "mistral_args", "llama3", "deepseek", "deepseek_v31", "harmony"
]

ADAPTING_ENGINES = ("vllm", "remote")
"""Kinds of engines that add adapters to a model."""
_MAX_NAMES = 256
_MAX_NAME_CHARS = 512

ENGINE_KINDS = ("native", "vllm", "deepspeed", "remote")
"""Of this package."""
ENTRY_POINTS = "localmoe.engines"
"""The group of entry points by which installed packages add others."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine of a model."""

    engine: str = "native"
    """Its kind: `native`, `vllm`, `deepspeed`, `remote`, or one that an installed package adds."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Settings of its own, over those of the block that its kind has."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One served model."""

    model: str
    """A name of `localmoe models list`; of a model that only remote engines have, any."""
    served_model_name: str | tuple[str, ...] = ()
    """The name, or names, that clients use; answers show the first. None: the model's."""
    weights: WeightFormat = WeightFormat.NVFP4
    """Format of the experts, for native engines."""
    answer_format: AnswerFormatName | None = None
    """How it writes tool calls; None: as its chat template shows."""
    engines: tuple[EngineSpec, ...] = (EngineSpec(),)
    """That share its requests; started in this order."""
    fallbacks: tuple[str, ...] = ()
    """Names of served models that answer in its place where no engine of its own can, the first that is able."""
    chat_template: str | None = None
    """A file with a Jinja template in place of the model's own."""
    adapters: Mapping[str, str | None] = field(default_factory=dict)
    """Low-rank weights (LoRA), served as models of their own by these names: each a directory as PEFT writes it, or
    null where only servers elsewhere have it, by that name. For engines of kind vllm and remote."""

    def __post_init__(self) -> None:
        if not self.engines:
            raise ValueError("engines is empty; it must name one at least")
        for setting, names in (("served_model_name", self.served_names), ("adapters", tuple(self.adapters))):
            if len(names) > _MAX_NAMES or not all(0 < len(name) <= _MAX_NAME_CHARS for name in names):
                raise ValueError(
                    f"{setting} has names that are empty, longer than {_MAX_NAME_CHARS} characters, or more than "
                    f"{_MAX_NAMES}"
                )
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(f"served_model_name and adapters have {twice[0]!r} twice; names must differ")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that clients use for the model itself."""
        names = self.served_model_name
        return (names,) if isinstance(names, str) else names or (self.model,)

    @property
    def served_name(self) -> str:
        """The one of them that answers show."""
        return self.served_names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it takes, those of its adapters last."""
        return (*self.served_names, *self.adapters)

    @property
    def has_idle_adapters(self) -> bool:
        """Whether it has adapters that no engine of its own adds."""
        return bool(self.adapters) and not any(engine.engine in ADAPTING_ENGINES for engine in self.engines)
