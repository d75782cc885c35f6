"""OpenAI's own client, unmodified, for responses against a real server."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import EngineFaultError
from localmoe.core.request import Grammar, Request
from localmoe.gateway.answering.grammar_checks import GrammarChecker
from localmoe.gateway.config import GatewayConfig
from localmoe.text.text_model import TextModel
from support.live_server import LiveServer
from support.tiny_text import encode, gateway_app, served_model

CALL = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


class City(BaseModel):
    name: str


@pytest.fixture
def backend(text_model: TextModel) -> ScriptedBackend:
    def script(request: Request) -> list[int]:
        prompt = text_model.tokenizer.decode(request.prompt_ids)
        if "forever" in prompt:
            return [60] * 100_000
        if "city?" in prompt:
            return encode(text_model, '{"name": "Ulm"}')
        return encode(text_model, CALL if "weather?" in prompt else "Hello 世界!")

    return ScriptedBackend(script, delay_s=0.001)


@pytest.fixture
def sdk(text_model: TextModel, backend: ScriptedBackend) -> Iterator[openai.OpenAI]:
    app = gateway_app(served_model(text_model, backend, context_tokens=2000))
    with (
        LiveServer(app, backend.start) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_create_retrieve_continue_list_and_delete(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(model="tiny", input="hi", instructions="be kind", metadata={"a": "b"})
    assert response.output_text == "Hello 世界!"
    assert (response.status, response.error, response.metadata) == ("completed", None, {"a": "b"})
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert sdk.responses.retrieve(response.id) == response
    following = sdk.responses.create(model="tiny", input="more", previous_response_id=response.id)
    assert following.usage is not None
    assert following.usage.input_tokens > response.usage.input_tokens
    items = list(sdk.responses.input_items.list(response.id))
    assert [item.content[0].text for item in items if item.type == "message"] == ["hi"]  # type: ignore[union-attr]
    sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)


def test_what_came_can_go_back(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(model="tiny", input="weather?", tools=[TOOL], store=False)
    call = response.output[-1]
    assert call.type == "function_call"
    turns: Any = [
        {"role": "user", "content": "weather?"},
        *response.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    assert sdk.responses.create(model="tiny", input=turns, tools=[TOOL], store=False).status == "completed"


def test_streams(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="tiny", input="hi") as stream:
        said = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(said) == final.output_text == "Hello 世界!"
    raw = sdk.responses.create(model="tiny", input="hi", stream=True)
    kinds = [event.type for event in raw]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


def test_tools(sdk: openai.OpenAI) -> None:
    whole = sdk.responses.create(model="tiny", input="weather?", tools=[TOOL])
    with sdk.responses.stream(model="tiny", input="weather?", tools=[TOOL]) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        call = response.output[-1]
        assert call.type == "function_call"
        assert (call.name, call.arguments.replace(" ", "")) == ("weather", '{"city":"Ulm"}')


def test_structured_output(sdk: openai.OpenAI) -> None:
    parsed = sdk.responses.parse(model="tiny", input="city?", text_format=City)
    assert parsed.output_parsed == City(name="Ulm")


def test_background_and_cancel(sdk: openai.OpenAI, backend: ScriptedBackend) -> None:
    queued = sdk.responses.create(model="tiny", input="forever", background=True, max_output_tokens=1500)
    assert queued.status in ("queued", "in_progress")
    deadline_s = time.monotonic() + 10
    while sdk.responses.retrieve(queued.id).status == "queued":
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert sdk.responses.cancel(queued.id).status == "cancelled"
    assert (backend.num_running, backend.num_cancelled) == (0, 1)


def test_errors(sdk: openai.OpenAI, backend: ScriptedBackend) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.responses.create(model="tiny", input="hi", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="other", input="hi")
    backend._failure = ScriptedFailure(error=EngineFaultError("broken"), after_tokens=2)
    events = list(sdk.responses.create(model="tiny", input="hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.message == "broken"


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_engine(sdk: openai.OpenAI, backend: ScriptedBackend, stream: bool) -> None:
    if stream:
        answer = sdk.responses.create(model="tiny", input="forever", stream=True, max_output_tokens=1500)
        for _, _event in zip(range(6), answer, strict=False):
            pass
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            sdk.with_options(timeout=0.5).responses.create(model="tiny", input="forever", max_output_tokens=1500)
    deadline_s = time.monotonic() + 5
    while backend.num_running and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert (backend.num_running, backend.num_cancelled) == (0, 1)


@pytest.mark.parametrize("where", ["engine", "before"])
def test_failures_after_a_keep_alive_and_before_an_answer(
    text_model: TextModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The stream has begun, so they are events; and the client takes none before that of a response's creation."""

    async def fail_slowly(checker: GrammarChecker, grammar: Grammar, *, param: str) -> None:
        await asyncio.sleep(0.1)
        raise EngineFaultError("broken")

    if where == "before":
        monkeypatch.setattr(GrammarChecker, "check", fail_slowly)
    failure = ScriptedFailure(error=EngineFaultError("broken"))
    backend = ScriptedBackend([5], delay_s=0.1, failure=failure)
    served = served_model(text_model, backend, context_tokens=2000)
    app = gateway_app(served, config=GatewayConfig(keepalive_s=0.02))
    with (
        LiveServer(app, backend.start) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        client.responses.stream(model="tiny", input="hi", text={"format": {"type": "json_object"}}) as stream,
    ):
        created, in_progress, failed = stream
    assert created.type == "response.created"
    assert in_progress.type == "response.in_progress"
    assert failed.type == "response.failed"
    assert (created.response.id, created.response.status) == (failed.response.id, "in_progress")
    assert failed.response.error is not None
    assert failed.response.error.message == "broken"
    assert (created.response.to_dict()["store"], failed.response.to_dict()["store"]) == (False, False)
