"""A tiny byte-level model directory and a gateway over it, for tests that need text but no weights."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, trainers

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.current import Current
from localmoe.core.errors import ModelNotFoundError
from localmoe.core.events import EventBus
from localmoe.core.protocols import Generator, ModelOperations
from localmoe.core.serving import ModelSpec
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel, Services
from localmoe.gateway.middleware.stack import Guard
from localmoe.gateway.responses.store import MemoryResponseStore
from localmoe.hardware.meter import HardwareMeter
from localmoe.observability.metrics import Metrics
from localmoe.observability.performance import Performance
from localmoe.text.text_model import TextModel

BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRAINING_TEXT = ["hello world, the quick brown fox jumps over the lazy dog. Hello again, world!"] * 4


def tiny_byte_level_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with all 256 bytes, some merges and two special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def write_tiny_text_model(
    directory: Path,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """The text files of a model directory; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, **(tokenizer_config or {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    return directory


def encode(text_model: TextModel, text: str, *, end: bool = True) -> list[int]:
    """An answer's token ids, with the end token unless told otherwise."""
    ids = text_model.tokenizer.encode(text, add_special_tokens=False)
    return [*ids, *text_model.defaults.eos_token_ids[:1]] if end else ids


def served_model(
    text_model: TextModel, generator: Generator, *, model_id: str = "tiny", context_tokens: int = 256
) -> ServedModel:
    """A served model of fixed creation time."""
    return ServedModel(
        id=model_id, created=1_700_000_000, text=text_model, context_tokens=context_tokens, generator=generator
    )


class FakeOperations:
    """Knows no model to load."""

    async def load(self, spec: ModelSpec) -> None:
        raise ModelNotFoundError(f"model {spec.model!r} is not here")

    async def unload(self, name: str) -> None:
        raise ModelNotFoundError(f"model {name!r} is not here")

    async def switch(self, name: str | None, spec: ModelSpec) -> None:
        raise ModelNotFoundError(f"model {spec.model!r} is not here")


def make_services(bus: EventBus, *, operations: ModelOperations | None = None) -> Services:
    """As `localmoe serve` has them, but without a fleet."""
    return Services(
        operations=operations or FakeOperations(),
        performance=Performance(bus),
        memory=HardwareMeter(),
        render_metrics=Metrics(bus).render,
        responses=MemoryResponseStore(),
    )


def gateway_app(
    *models: ServedModel,
    config: GatewayConfig | None = None,
    bus: EventBus | None = None,
    guard: Guard | None = None,
) -> FastAPI:
    """A gateway that serves these models, whose backends are the caller's to start."""
    bus = bus or EventBus()
    return create_app(
        {model.id: model for model in models},
        services=make_services(bus),
        config=Current(config or GatewayConfig()),
        bus=bus,
        guard=guard or Guard(),
    )


def scripted_app(
    text_model: TextModel,
    backend: ScriptedBackend,
    *,
    config: GatewayConfig | None = None,
    bus: EventBus | None = None,
    guard: Guard | None = None,
) -> FastAPI:
    """A gateway that serves one scripted model named `tiny`. The backend is the caller's to start."""
    return gateway_app(served_model(text_model, backend), config=config, bus=bus, guard=guard)
