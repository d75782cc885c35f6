"""A tiny text model and clients of a gateway over a scripted backend."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from unittest.mock import Mock

import httpx2
import pytest
import tokenizers
from fastapi import FastAPI

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.text.fill_in_middle import FillInMiddle
from localmoe.text.text_model import TextModel
from localmoe.text.tokenizer import Tokenizer
from support.tiny_text import (
    EOS,
    gateway_app,
    make_services,
    served_model,
    tiny_byte_level_tokenizer,
    write_tiny_text_model,
)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(write_tiny_text_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def coder(text_model: TextModel) -> TextModel:
    """A model that was made to fill in."""
    marks = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
    backend = tiny_byte_level_tokenizer()
    backend.add_special_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": EOS})
    return replace(
        text_model,
        tokenizer=tokenizer,
        fill_in_middle=FillInMiddle.find(tokenizer),
        vocab_size=tokenizer.vocab_size,
    )


@pytest.fixture
def serve(text_model: TextModel):
    """`async with serve(backend) as client`: a started backend behind a gateway."""

    @asynccontextmanager
    async def serve_backend(
        backend: ScriptedBackend,
        *,
        config: GatewayConfig | None = None,
        bus: EventBus | None = None,
        text: TextModel | None = None,
        context_tokens: int = 256,
    ) -> AsyncIterator[httpx2.AsyncClient]:
        await backend.start()
        served = served_model(text or text_model, backend, context_tokens=context_tokens)
        app = gateway_app(served, config=config, bus=bus)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    return serve_backend


@pytest.fixture
def complete_app(text_model: TextModel) -> FastAPI:
    """With every route that there may be. What it needs of others is not used."""
    bus = EventBus()
    served = served_model(text_model, ScriptedBackend([5]))
    services = replace(make_services(bus), jobs=Mock(), configuration=Mock())
    return create_app({"tiny": served}, services=services, config=Current(GatewayConfig()), bus=bus)
