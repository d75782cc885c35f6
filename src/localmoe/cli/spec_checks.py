"""What a model is to be served with, looked at before anything slow begins: its chat template and its adapters."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from localmoe.backends.vllm_config import LoraModule
from localmoe.core.errors import CheckpointError, ConfigError
from localmoe.core.serving import ADAPTING_ENGINES, ModelSpec
from localmoe.formats.files import read_json_object

_MAX_RANK = 2**16
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_specs(specs: Iterable[ModelSpec]) -> None:
    """Raises ConfigError for what is missing, or no engine can take."""
    for spec in specs:
        template_path(spec)
        lora_modules(spec)


def template_path(spec: ModelSpec) -> Path | None:
    """The file of its chat template; None: the model's own. Raises ConfigError."""
    if spec.chat_template is None:
        return None
    path = _absolute(spec.chat_template, "chat_template")
    if not path.is_file():
        raise ConfigError(f"chat_template is {str(path)!r}, which is no file; name one with a Jinja template")
    return path


def lora_modules(spec: ModelSpec) -> Mapping[str, LoraModule | None]:
    """Its adapters by name, and None for those that only servers elsewhere have. Raises ConfigError."""
    if spec.has_idle_adapters:
        raise ConfigError(
            f"{spec.served_name} has adapters, and no engine of kind {' or '.join(ADAPTING_ENGINES)}, which alone "
            "add them; give it one, or merge an adapter into the model's weights"
        )
    return {name: None if path is None else _lora_module(name, path) for name, path in spec.adapters.items()}


def _lora_module(name: str, said: str) -> LoraModule:
    setting = f"adapters.{name}"
    path = _absolute(said, setting)
    # Weights in other formats would have to be unpickled.
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise ConfigError(
                f"{setting} is {str(path)!r}, where there is no {file}; name a directory as PEFT writes it, with "
                "safetensors"
            )
    try:
        config = read_json_object(path / _CONFIG)
    except CheckpointError as error:
        raise ConfigError(f"{setting}: {error}") from error
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else (None,))]
    if not all(type(rank) is int and 0 < rank <= _MAX_RANK for rank in ranks):
        raise ConfigError(f"{setting}: {path / _CONFIG} says no rank (r); name a directory as PEFT writes it")
    return LoraModule(path=path, rank=max(ranks))


def _absolute(said: str, setting: str) -> Path:
    try:
        return Path(said).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"{setting} is {said!r}, and the home directory is not known here; write it out"
        ) from error
