"""`/v1/embeddings`: shapes, bounds, and what becomes of it when something fails."""

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.cli.answer_cache import LeveledAnswerCache
from localmoe.core.current import Current
from localmoe.core.errors import BackendUnavailableError, EngineFaultError, OverloadedError
from localmoe.core.events import Event, EventBus, RequestFinished
from localmoe.core.request import FinishReason, Request, TokenChunk
from localmoe.gateway.app import create_app
from localmoe.gateway.cache.config import CacheConfig
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel
from localmoe.gateway.openai import embeddings
from localmoe.text.text_model import TextModel
from support.stateful import stateful_gateway
from support.tiny_text import gateway_app, make_services, served_model


class FakeEmbedder(ScriptedBackend):
    """Notes what it is asked, and how much at a time."""

    def __init__(self, failure: ScriptedFailure | None = None) -> None:
        super().__init__([], failure=failure, delay_s=0.001)
        self.asked: list[Request] = []
        self.most_running = 0

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        self.asked.append(request)
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                self.most_running = max(self.most_running, self.num_running)
                yield chunk


@pytest.fixture
def backend() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
async def client(serve: Any, backend: FakeEmbedder) -> AsyncIterator[httpx2.AsyncClient]:
    async with serve(backend) as found:
        yield found


async def embed(client: httpx2.AsyncClient, given: Any, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": given, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(client: httpx2.AsyncClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": "hi", **fields})
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def counted(token_ids: list[int]) -> list[float]:
    """What the scripted engine makes of a prompt."""
    counts = [sum(token_id % 8 == place for token_id in token_ids) for place in range(8)]
    return list(struct.unpack("<8f", struct.pack("<8f", *(count / math.hypot(*counts) for count in counts))))


async def test_each_kind_of_input(client: httpx2.AsyncClient, text_model: TextModel) -> None:
    hello, world = (text_model.tokenizer.encode(text, add_special_tokens=True) for text in ("hello", "world!"))
    for given, prompts in (
        ("hello", [hello]),
        (["hello", "world!"], [hello, world]),
        (hello, [hello]),
        ([hello, world], [hello, world]),
    ):
        found = await embed(client, given)
        num_tokens = sum(map(len, prompts))
        assert found == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": counted(prompt)}
                for index, prompt in enumerate(prompts)
            ],
            "model": "tiny",
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }


async def test_the_engine_is_asked_for_no_tokens(client: httpx2.AsyncClient, backend: FakeEmbedder) -> None:
    await embed(client, "hello")
    [request] = backend.asked
    assert request.embed
    assert request.sampling.max_tokens == 0
    assert request.source is not None
    assert request.source.text == "hello"


async def test_base64_is_the_same_numbers(client: httpx2.AsyncClient) -> None:
    [as_numbers] = (await embed(client, "hello", encoding_format="float"))["data"]
    [as_base64] = (await embed(client, "hello", encoding_format="base64"))["data"]
    assert list(struct.unpack("<8f", base64.b64decode(as_base64["embedding"]))) == as_numbers["embedding"]


async def test_fewer_dimensions_are_the_first_ones_and_of_length_1(client: httpx2.AsyncClient) -> None:
    [whole] = (await embed(client, "hello world"))["data"]
    [short] = (await embed(client, "hello world", dimensions=5))["data"]
    length = math.hypot(*whole["embedding"][:5])
    assert short["embedding"] == pytest.approx([value / length for value in whole["embedding"][:5]], abs=1e-6)
    assert math.hypot(*short["embedding"]) == pytest.approx(1.0, abs=1e-6)
    error = await refused(client, dimensions=9)
    assert error["param"] == "dimensions"
    assert "have 8" in error["message"]


async def test_the_user_is_ignored_and_named(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": "hi", "user": "anna"})
    assert answer.status_code == 200
    assert answer.headers["x-localmoe-ignored"] == "user"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [5, "a"]}, "input[1]"),
        ({"input": [[5], []]}, "input[1]"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [5, 10**6]}, "input"),
        ({"input": [[5], [10**6]]}, "input[1]"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": [5] * 257}, "input"),
        ({"input": ["a", "xyz " * 1000]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[5]] * 2049}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 10**9}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"stream": True}, "stream"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx2.AsyncClient, backend: FakeEmbedder, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"model": "tiny", "input": "hi", **fields})
    answer = await client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert backend.asked == []


async def test_all_inputs_together_are_bounded(
    client: httpx2.AsyncClient, backend: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "MAX_INPUT_TOKENS", 500)
    await embed(client, [[5] * 250] * 2)
    error = await refused(client, input=[[5] * 250, [5] * 250, [5]])
    assert (error["param"], len(backend.asked)) == ("input", 2)
    assert "500 tokens" in error["message"]


async def test_a_model_that_is_not_served(client: httpx2.AsyncClient) -> None:
    error = await refused(client, 404, model="other")
    assert error["code"] == "model_not_found"


async def test_many_inputs_are_in_order_and_some_are_under_way_at_a_time(
    client: httpx2.AsyncClient, backend: FakeEmbedder
) -> None:
    prompts = [[token % 300, token * 7 % 300, 9] for token in range(2048)]
    found = await embed(client, prompts)
    assert [item["index"] for item in found["data"]] == list(range(2048))
    assert [item["embedding"] for item in found["data"]] == [counted(prompt) for prompt in prompts]
    assert found["usage"]["prompt_tokens"] == 3 * 2048
    assert 1 < backend.most_running <= 16


async def test_what_it_took_is_told(serve: Any, backend: FakeEmbedder) -> None:
    events: list[Event] = []
    bus = EventBus()
    bus.subscribe(events.append)
    async with serve(backend, bus=bus) as client:
        await embed(client, [[5, 6, 7], [8]])
        backend._failure = ScriptedFailure(error=EngineFaultError("broken"))
        await refused(client, 500)
    finished = [event for event in events if isinstance(event, RequestFinished)]
    assert [(event.api, event.outcome) for event in finished] == [
        ("embeddings", "stop"),
        ("embeddings", "stop"),
        ("embeddings", "error"),
    ]
    assert sorted(event.prompt_tokens for event in finished[:2]) == [1, 3]
    assert all(event.completion_tokens == 0 and event.time_to_first_token_s is None for event in finished)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("the queue is full"), 503),
        (BackendUnavailableError("no engine is ready"), 503),
        (EngineFaultError("not a number"), 500),
    ],
)
async def test_one_input_that_fails_fails_them_all_and_ends_the_others(
    serve: Any, error: Any, status: int
) -> None:
    backend = FakeEmbedder(ScriptedFailure(error=error))
    async with serve(backend) as client:
        told = await refused(client, status, input=["a"] * 100)
    assert str(error) in told["message"]
    assert len(backend.asked) <= 16
    assert backend.num_running == 0


async def test_inputs_still_under_way_when_one_fails_are_given_up(serve: Any) -> None:
    class FakeStuck(FakeEmbedder):
        async def _pause(self, index: int) -> None:
            if self.num_running < 16:
                await asyncio.Event().wait()
            raise EngineFaultError("the last to come fails")

    backend = FakeStuck()
    async with serve(backend) as client, asyncio.timeout(10):
        await refused(client, 500, input=["a"] * 100)
        assert (backend.num_running, backend.num_cancelled) == (0, 15)


async def test_an_engine_that_knows_of_no_embeddings_is_found_out(serve: Any) -> None:
    class FakeOld(ScriptedBackend):
        async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
            yield TokenChunk(request_id=request.id, finish_reason=FinishReason.LENGTH)

    async with serve(FakeOld([])) as client:
        assert "sent no embedding" in (await refused(client, 500))["message"]


async def test_a_client_that_leaves_ends_all_that_is_under_way(serve: Any) -> None:
    started = asyncio.Event()

    class FakeSlow(FakeEmbedder):
        async def _pause(self, index: int) -> None:
            started.set()
            await asyncio.Event().wait()

    backend = FakeSlow()
    events: list[Event] = []
    bus = EventBus()
    bus.subscribe(events.append)
    async with serve(backend, bus=bus) as client:
        asking = asyncio.create_task(embed(client, ["a"] * 40))
        await started.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert (backend.num_running, backend.num_cancelled) == (0, 16)
    assert {event.outcome for event in events if isinstance(event, RequestFinished)} == {"abort"}


async def test_a_fallback_does_not_answer_but_a_successor_does(text_model: TextModel) -> None:
    fails = FakeEmbedder(ScriptedFailure(error=BackendUnavailableError("it is not there")))
    works = FakeEmbedder()
    models: dict[str, ServedModel] = {}
    first = served_model(text_model, fails)
    models["tiny"] = ServedModel(**{**vars(first), "fallbacks": ("other",)})
    models["other"] = served_model(text_model, works, model_id="other")
    bus = EventBus()
    app = create_app(models, services=make_services(bus), config=Current(GatewayConfig()), bus=bus)
    await fails.start()
    await works.start()
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        assert "not there" in (await refused(client, 503))["message"]
        assert works.asked == []

        async def switched(request: Request) -> AsyncGenerator[TokenChunk, None]:
            models["tiny"] = models["other"]
            raise BackendUnavailableError("it is leaving")
            yield

        fails.generate = switched  # type: ignore[method-assign]
        assert (await embed(client, "hi"))["model"] == "other"


async def test_they_are_kept_and_found_again_one_by_one(
    text_model: TextModel, backend: FakeEmbedder, tmp_path: Path
) -> None:
    await backend.start()
    config = CacheConfig(enabled=True)
    cache = LeveledAnswerCache(config, home=tmp_path)
    await cache.start()
    served = served_model(text_model, cache.over(backend, text_model, version="1"))
    transport = httpx2.ASGITransport(app=gateway_app(served, config=GatewayConfig(cache=config)))

    async def seen(given: Any, **fields: Any) -> str:
        body = {"model": "tiny", "input": given, **fields}
        answer = await client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200
        told: str = answer.headers["x-localmoe-cache"]
        return told

    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            assert await seen(["a", "b"]) == "miss"
            assert await seen("b") == "hit; level=memory"
            assert await seen(["b", "c"]) == "miss"
            assert await seen(["c", "a"], dimensions=3, encoding_format="base64") == "hit; level=memory"
            assert len(backend.asked) == 3
            expected = counted(text_model.tokenizer.encode("c", add_special_tokens=True))
            assert (await embed(client, "c"))["data"][0]["embedding"] == expected
            # The same prompt to be continued is something else.
            body = {"model": "tiny", "prompt": "c", "max_tokens": 1, "temperature": 0}
            assert (await client.post("/v1/completions", json=body)).headers["x-localmoe-cache"] == "miss"
    finally:
        await cache.stop()


async def test_the_official_client_gets_them(client: httpx2.AsyncClient, text_model: TextModel) -> None:
    sdk = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client, max_retries=0)
    hello = text_model.tokenizer.encode("hello", add_special_tokens=True)
    found = await sdk.embeddings.create(model="tiny", input=["hello", "x"], user="anna")
    assert [item.index for item in found.data] == [0, 1]
    assert found.data[0].embedding == pytest.approx(counted(hello))
    assert found.usage.prompt_tokens == found.usage.total_tokens > 0
    plain = await sdk.embeddings.create(model="tiny", input=hello, encoding_format="float", dimensions=4)
    assert len(plain.data[0].embedding) == 4
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.embeddings.create(model="tiny", input="hello", dimensions=99)
    assert bad.value.param == "dimensions"


async def test_a_batch_of_them_is_answered(text_model: TextModel, backend: FakeEmbedder, tmp_path: Path) -> None:
    line = {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "tiny", "input": "hello"},
    }
    async with stateful_gateway(text_model, backend, tmp_path) as gateway, asyncio.timeout(30):
        sdk = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=gateway.client)
        file = await sdk.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = await sdk.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        while batch.status not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            batch = await sdk.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        output = json.loads((await sdk.files.content(batch.output_file_id)).text)
    assert output["response"]["status_code"] == 200
    hello = text_model.tokenizer.encode("hello", add_special_tokens=True)
    assert output["response"]["body"]["data"][0]["embedding"] == counted(hello)
