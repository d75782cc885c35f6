"""Several names of one model, and adapters that are models to clients."""

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.core.request import Request
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel
from localmoe.text.text_model import TextModel
from support.tiny_text import make_services, served_model

HI = [{"role": "user", "content": "hi"}]


class Recorder:
    """Says `5` and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> list[int]:
        self.requests.append(request)
        return [5]


@pytest.fixture
def asked() -> Recorder:
    return Recorder()


@pytest.fixture
async def client(text_model: TextModel, asked: Recorder) -> AsyncIterator[httpx2.AsyncClient]:
    backend = ScriptedBackend(asked)
    await backend.start()
    base = served_model(text_model, backend, model_id="chat")
    adapter = replace(base, id="chat-lora", adapter="chat-lora", parent="chat")
    models: dict[str, ServedModel] = {"chat": base, "gpt-4o": base, "chat-lora": adapter}
    bus = EventBus()
    app = create_app(models, services=make_services(bus), config=Current(GatewayConfig()), bus=bus)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        yield client


async def test_all_are_listed(client: httpx2.AsyncClient) -> None:
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("chat", "chat", None),
        ("gpt-4o", "chat", None),
        ("chat-lora", "chat-lora", "chat"),
    ]
    assert (await client.get("/v1/models/gpt-4o")).json() == cards[1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
async def test_any_name_is_answered_and_the_first_is_shown(
    client: httpx2.AsyncClient, asked: Recorder, path: str, body: dict[str, object]
) -> None:
    for name, shown, adapter in (("chat", "chat", None), ("gpt-4o", "chat", None), ("chat-lora",) * 3):
        answer = await client.post(path, json={**body, "model": name})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == shown
        if path != "/v1/embeddings":  # the scripted engine does not recite one
            assert (asked.requests[-1].adapter, asked.requests[-1].model) == (adapter, shown)
