"""Decoder architectures, one file each, named after their `model_type`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from localmoe.core.errors import CheckpointError

if TYPE_CHECKING:
    from localmoe.models.decoder import Decoder

DECODERS = {"llama": "Llama", "mixtral": "Mixtral", "olmoe": "Olmoe", "qwen3_moe": "Qwen3Moe"}


def architecture(config: dict[str, Any]) -> "type[Decoder]":
    """The decoder class for a checkpoint's `config.json`.

    Raises:
        CheckpointError: the architecture is not one of `DECODERS`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DECODERS:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(DECODERS)}"
        )
    decoder: type[Decoder] = getattr(import_module(f"localmoe.models.{model_type}"), DECODERS[model_type])
    return decoder
