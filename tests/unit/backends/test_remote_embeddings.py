"""Another server's embeddings."""

import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from localmoe.backends.deepspeed import DeepSpeedBackend
from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.remote import RemoteBackend
from localmoe.backends.remote_config import RemoteConfig
from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.events import EventBus
from localmoe.core.request import FinishReason, PromptSource, Request, SamplingParams, TokenChunk, Usage
from support.fake_openai import FakeOpenAI

GOOD = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8, 0]}],
    "model": "there",
    "usage": {"prompt_tokens": 5, "total_tokens": 5},
}


def request(source: PromptSource | None) -> Request:
    sampling = SamplingParams(max_tokens=0, temperature=0.0)
    return Request(id="r", model="m", prompt_ids=[1, 2], sampling=sampling, source=source, embed=True)


def says(body: Any, status: int = 200) -> FakeOpenAI:
    async def respond(request: web.Request) -> web.StreamResponse:
        if isinstance(body, str):
            return web.Response(status=status, text=body, content_type="application/json")
        return web.json_response(body, status=status)

    return FakeOpenAI(respond=respond)


@asynccontextmanager
async def remote(server: FakeOpenAI) -> AsyncIterator[RemoteBackend]:
    async with server.running():
        backend = RemoteBackend(config=RemoteConfig(url=server.url, model="there", connect_timeout_s=2.0))
        await backend.start()
        try:
            yield backend
        finally:
            await backend.stop()


async def answer(backend: RemoteBackend) -> list[TokenChunk]:
    async with aclosing(backend.generate(request(PromptSource(text="hi")))) as chunks:
        return [chunk async for chunk in chunks]


async def test_it_is_asked_for_and_comes_as_one_chunk() -> None:
    server = says(GOOD)
    async with remote(server) as backend:
        [chunk] = await answer(backend)
    assert chunk.embedding == struct.pack("<3f", 0.6, -0.8, 0)
    assert chunk.finish_reason is FinishReason.LENGTH
    assert chunk.usage == Usage(prompt_tokens=5, completion_tokens=0)
    assert server.bodies == [("/v1/embeddings", {"model": "there", "input": "hi", "encoding_format": "float"})]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "no embedding"),
        ('{"data": [{"embedding": [1, 2', "no embedding"),
        ({"data": []}, "no embedding"),
        ({"data": [{"embedding": []}]}, "no embedding"),
        ({"data": [{"embedding": ["1"]}]}, "no embedding"),
        ({"data": [{"embedding": [1e300]}]}, "no embedding"),
        ({"data": [{"embedding": [0.5] * (2**16 + 1)}]}, "no embedding"),
        ({"data": [{"embedding": [1.0]}, {"embedding": [1.0]}]}, "no embedding"),
        (" " * (2**22 + 1) + '{"data": [{"embedding": [1.0]}]}', "no embedding"),
    ],
)
async def test_what_is_none_is_the_servers_fault(body: Any, message: str) -> None:
    async with remote(says(body)) as backend:
        with pytest.raises(EngineFaultError, match=message):
            await answer(backend)


async def test_a_stream_is_none_either() -> None:
    async with remote(FakeOpenAI([b"data: [DONE]\n\n"])) as backend:
        with pytest.raises(EngineFaultError, match="no JSON"):
            await answer(backend)


async def test_a_server_that_has_none_says_so() -> None:
    async with remote(says({"error": {"message": "this model has no embeddings"}}, status=400)) as backend:
        with pytest.raises(InvalidRequestError, match="this model has no embeddings"):
            await answer(backend)


def test_it_embeds_texts_only() -> None:
    backend = RemoteBackend(config=RemoteConfig(url="http://localhost/v1", model="there"))
    assert backend.refusal(request(PromptSource(text="hi"))) is None
    assert "token ids" in (backend.refusal(request(None)) or "")
    assert "texts" in (backend.refusal(request(PromptSource(messages=[{"role": "user", "content": "x"}]))) or "")


def test_deepspeed_has_none() -> None:
    backend = DeepSpeedBackend(
        model="m", model_path=Path("m"), config=DeepSpeedConfig(), python=Path("python"), bus=EventBus()
    )
    assert "native" in (backend.refusal(request(None)) or "")
