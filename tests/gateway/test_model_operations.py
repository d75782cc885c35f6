"""Loading, switching and unloading over HTTP; answers that other models give; headers that say how to dispatch."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping

import httpx2
import pytest
from fastapi import FastAPI

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.current import Current
from localmoe.core.errors import (
    BackendUnavailableError,
    ConflictError,
    EngineFaultError,
    EngineStartError,
    InsufficientMemoryError,
    LocalMoEError,
    ModelNotFoundError,
)
from localmoe.core.events import EventBus
from localmoe.core.model import WeightFormat
from localmoe.core.request import FinishReason, Request, TokenChunk, Usage
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel
from localmoe.text.text_model import TextModel
from support.tiny_text import encode, gateway_app, make_services, served_model


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test")


class RecordedOperations:
    """Does what it is told to models of scripted engines."""

    def __init__(self, models: dict[str, ServedModel], make: Callable[[str], ServedModel]) -> None:
        self._models = models
        self._make = make
        self.asked: list[object] = []
        self.failure: LocalMoEError | None = None

    async def load(self, spec: ModelSpec) -> None:
        self._note("load", spec)
        self._models[spec.served_name] = self._make(spec.model)

    async def unload(self, name: str) -> None:
        self._note("unload", name)
        del self._models[name]

    async def switch(self, name: str | None, spec: ModelSpec) -> None:
        await asyncio.sleep(0.05)
        self._note("switch", name, spec)
        self._models[name or "tiny"] = self._models[spec.served_name] = self._make(spec.model)

    def _note(self, *what: object) -> None:
        self.asked.append(what)
        if self.failure is not None:
            raise self.failure


def app_over(models: Mapping[str, ServedModel], operations: RecordedOperations) -> FastAPI:
    bus = EventBus()
    return create_app(
        models, services=make_services(bus, operations=operations), config=Current(GatewayConfig()), bus=bus
    )


@pytest.fixture
def operations(text_model: TextModel) -> RecordedOperations:
    def make(name: str) -> ServedModel:
        return served_model(text_model, ScriptedBackend([5]), model_id=name)

    return RecordedOperations({"tiny": make("tiny")}, make)


@pytest.fixture
def app(operations: RecordedOperations) -> FastAPI:
    return app_over(operations._models, operations)


async def test_load_switch_unload(app: FastAPI, operations: RecordedOperations) -> None:
    async with client_of(app) as client:
        names = ["second", "third"]
        body = {"model": "b", "served_model_name": names, "weights": "int8", "answer_format": "llama3"}
        loaded = await client.post("/v1/models/load", json=body)
        assert loaded.status_code == 200
        assert (loaded.json()["id"], loaded.json()["root"]) == ("second", "b")
        switched = await client.post(
            "/v1/models/switch",
            json={"model_name": "c", "tensor_parallel_size": 4, "engines": ["vllm"], "replace": "tiny"},
        )
        assert switched.json()["id"] == "c"
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert names == ["tiny", "second", "c"]
        gone = await client.post("/v1/models/unload", json={"model": "second"})
        assert gone.json() == {"id": "second", "object": "model", "unloaded": True}
    vllm = EngineSpec(engine="vllm", settings={"tensor_parallel_size": 4})
    assert operations.asked == [
        (
            "load",
            ModelSpec(
                model="b",
                served_model_name=("second", "third"),
                weights=WeightFormat.INT8,
                answer_format="llama3",
            ),
        ),
        ("switch", "tiny", ModelSpec(model="c", engines=(vllm,))),
        ("unload", "second"),
    ]


@pytest.mark.parametrize("field", ["name", "served_model_name"])
async def test_one_name_is_a_text(app: FastAPI, operations: RecordedOperations, field: str) -> None:
    async with client_of(app) as client:
        loaded = await client.post("/v1/models/load", json={"model": "b", field: "second"})
    assert loaded.json()["id"] == "second"
    assert operations.asked == [("load", ModelSpec(model="b", served_model_name="second"))]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ConflictError("busy"), 409, "conflict"),
        (InsufficientMemoryError("too big"), 409, "insufficient_memory"),
        (EngineStartError("damaged"), 422, "model_load_failed"),
        (ModelNotFoundError("no b"), 404, "model_not_found"),
    ],
)
async def test_failures_are_named(
    app: FastAPI, operations: RecordedOperations, error: LocalMoEError, status: int, code: str
) -> None:
    operations.failure = error
    async with client_of(app) as client:
        for path in ("load", "switch", "unload"):
            response = await client.post(f"/v1/models/{path}", json={"model": "b"})
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert response.json()["error"]["message"] == str(error)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "b", "model_name": "b"},
        {"model": "b", "engines": []},
        {"model": "b", "engines": ["--x"]},
        {"model": "b", "engines": ["native"] * 65},
        {"model": "b", "tensor_parallel_size": 0},
        {"model": "b", "gpu_devices": [-1]},
        {"model": "b", "served_model_name": []},
        {"model": "b", "served_model_name": ["x", ""]},
        {"model": "b", "served_model_name": ["x", "x"]},
        {"model": "b", "served_model_name": [f"n{index}" for index in range(65)]},
        {"model": "b", "served_model_name": "x", "name": "x"},
        {"model": "b", "adapters": {"x": "/etc"}},
        {"model": "b", "chat_template": "/etc/passwd"},
        {"model": "b", "trust_remote_code": True},
        {"model": "b", "weights": "fp4"},
    ],
)
async def test_bad_requests_are_400_and_change_nothing(
    app: FastAPI, operations: RecordedOperations, body: object
) -> None:
    async with client_of(app) as client:
        response = await client.post("/v1/models/load", json=body)
    assert response.status_code == 400
    assert operations.asked == []


def unavailable() -> ScriptedFailure:
    return ScriptedFailure(error=BackendUnavailableError("down"))


async def ask(app: FastAPI, model: str, **fields: object) -> httpx2.Response:
    messages = [{"role": "user", "content": "hi"}]
    async with client_of(app) as client:
        return await client.post(
            "/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 9, **fields}
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_another_model_answers_where_one_cannot(text_model: TextModel, stream: bool) -> None:
    down = ScriptedBackend([5], failure=unavailable())
    faulty = ScriptedBackend([5], failure=ScriptedFailure(error=EngineFaultError("broken")))
    works = ScriptedBackend(encode(text_model, "hello"))
    for backend in (down, faulty, works):
        await backend.start()
    first = dataclasses.replace(served_model(text_model, down, model_id="a"), fallbacks=("x", "b", "c"))
    app = gateway_app(
        first, served_model(text_model, faulty, model_id="b"), served_model(text_model, works, model_id="c")
    )
    response = await ask(app, "a", stream=stream)
    assert response.status_code == 200
    assert '"model":"c"' in response.text
    assert "hello" in response.text
    assert '"model":"a"' not in response.text


async def test_if_none_can_the_first_ones_failure_is_told(text_model: TextModel) -> None:
    down = ScriptedBackend([5], failure=unavailable())
    await down.start()
    first = dataclasses.replace(served_model(text_model, down, model_id="a"), fallbacks=("b",))
    small = served_model(text_model, ScriptedBackend([5]), model_id="b", context_tokens=1)
    response = await ask(gateway_app(first, small), "a")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "down"


async def test_an_answer_that_has_begun_is_not_begun_again(text_model: TextModel) -> None:
    failure = ScriptedFailure(error=BackendUnavailableError("down"), after_tokens=1)
    breaks = ScriptedBackend(encode(text_model, "hello world"), failure=failure)
    works = ScriptedBackend(encode(text_model, "hello"))
    for backend in (breaks, works):
        await backend.start()
    first = dataclasses.replace(served_model(text_model, breaks, model_id="a"), fallbacks=("b",))
    response = await ask(gateway_app(first, served_model(text_model, works, model_id="b")), "a", stream=True)
    assert '"message":"down"' in response.text
    assert '"model":"b"' not in response.text


async def test_a_model_that_was_switched_while_its_prompt_was_read(text_model: TextModel) -> None:
    models: dict[str, ServedModel] = {}
    works = ScriptedBackend(encode(text_model, "hello"))

    class FakeStoppedBackend(ScriptedBackend):
        async def generate(self, request: Request):
            models["a"] = served_model(text_model, works, model_id="new")
            raise BackendUnavailableError("stopped")
            yield

    models["a"] = served_model(text_model, FakeStoppedBackend([5]), model_id="a")
    await works.start()
    operations = RecordedOperations(models, lambda name: models[name])
    app = app_over(models, operations)
    response = await ask(app, "a")
    assert response.json()["choices"][0]["message"]["content"] == "hello"
    assert response.json()["model"] == "new"


class FakeRecordingBackend(ScriptedBackend):
    """Keeps the requests it gets."""

    def __init__(self) -> None:
        super().__init__([5])
        self.asked: list[Request] = []

    async def generate(self, request: Request):
        self.asked.append(request)
        async for chunk in super().generate(request):
            yield chunk


async def test_headers_say_how_to_dispatch(text_model: TextModel) -> None:
    backend = FakeRecordingBackend()
    await backend.start()
    app = gateway_app(served_model(text_model, backend))
    body = {"model": "tiny", "prompt": "hi", "stop": "x"}
    async with client_of(app) as client:
        for headers in (
            {},
            {"x-localmoe-engine": "auto"},
            {"x-localmoe-engine": "vllm", "x-localmoe-timeout-s": "2.5"},
        ):
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        for headers in (
            {"x-localmoe-timeout-s": "0"},
            {"x-localmoe-timeout-s": "nan"},
            {"x-localmoe-timeout-s": "soon"},
            {"x-localmoe-engine": "e" * 65},
        ):
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == next(iter(headers))
    assert [request.engine for request in backend.asked] == [None, None, "vllm"]
    assert [request.timeout_s for request in backend.asked[:2]] == [None, None]
    assert backend.asked[2].timeout_s == pytest.approx(2.5, abs=1.0)  # less what it took so far
    source = backend.asked[0].source
    assert source is not None
    assert (source.text, source.messages, source.stop) == ("hi", None, ("x",))


async def test_a_model_whose_tokenizer_is_elsewhere(text_model: TextModel) -> None:
    backend = FakeRecordingBackend()
    await backend.start()
    model = dataclasses.replace(served_model(text_model, backend), text=None, context_tokens=None)
    app = gateway_app(model)
    async with client_of(app) as client:
        for path, body in (
            ("tokenize", {"prompt": "hi"}),
            ("detokenize", {"tokens": [1]}),
            ("completions", {"prompt": [1, 2]}),
        ):
            response = await client.post(f"/v1/{path}", json={"model": "tiny", **body})
            assert response.status_code == 400
            assert "its tokenizer is not here" in response.json()["error"]["message"]
        for field, value in (("ignore_eos", True), ("stop_token_ids", [5])):
            response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", field: value})
            assert response.status_code == 400
        card = (await client.get("/v1/models/tiny")).json()
    assert card["max_model_len"] is None


class FakeTextBackend(ScriptedBackend):
    """Answers in text, as servers with tokenizers of their own do."""

    async def generate(self, request: Request):
        yield TokenChunk(request_id=request.id, text="hello, wor")
        usage = Usage(prompt_tokens=4, completion_tokens=7)
        yield TokenChunk(
            request_id=request.id, text="ld STOP and more", finish_reason=FinishReason.LENGTH, usage=usage
        )


@pytest.mark.parametrize("stop", [None, "STOP"])
async def test_answers_in_text(text_model: TextModel, stop: str | None) -> None:
    backend = FakeTextBackend([])
    await backend.start()
    model = dataclasses.replace(served_model(text_model, backend), text=None, context_tokens=None)
    answer = (await ask(gateway_app(model), "tiny", stop=stop)).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"] == ("hello, world " if stop else "hello, world STOP and more")
    assert choice["finish_reason"] == ("stop" if stop else "length")
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, 7)
