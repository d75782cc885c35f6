"""A tiny text model and clients of a gateway over a scripted backend."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.events import EventBus
from localmoe.gateway.config import GatewayConfig
from localmoe.text.text_model import TextModel
from support.tiny_text import scripted_app, write_tiny_text_model


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(write_tiny_text_model(tmp_path_factory.mktemp("tiny")))


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
    ) -> AsyncIterator[httpx2.AsyncClient]:
        await backend.start()
        app = scripted_app(text or text_model, backend, config=config, bus=bus)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    return serve_backend
