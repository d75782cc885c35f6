"""Anthropic's own client, unmodified, against a real server."""

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import EngineFaultError, OverloadedError
from localmoe.core.request import Request
from localmoe.text.text_model import TextModel
from support.live_server import LiveServer
from support.tiny_text import encode, gateway_app, served_model

CALL = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
TOOL: Any = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def backend(text_model: TextModel) -> ScriptedBackend:
    def script(request: Request) -> list[int]:
        prompt = text_model.tokenizer.decode(request.prompt_ids)
        if "forever" in prompt:
            return [60] * 100_000
        return encode(text_model, CALL if "weather?" in prompt else "Hello 世界!")

    return ScriptedBackend(script, delay_s=0.001)


@pytest.fixture
def sdk(text_model: TextModel, backend: ScriptedBackend) -> Iterator[anthropic.Anthropic]:
    app = gateway_app(served_model(text_model, backend, context_tokens=2000))
    with (
        LiveServer(app, backend.start) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


def test_messages_and_counts(sdk: anthropic.Anthropic) -> None:
    message = sdk.messages.create(
        model="tiny", max_tokens=64, messages=HI, system="be kind", extra_body={"top_k": 5}
    )
    assert [block.text for block in message.content if block.type == "text"] == ["Hello 世界!"]
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", "tiny")
    assert message._request_id
    counted = sdk.messages.count_tokens(model="tiny", messages=HI, system="be kind")
    assert counted.input_tokens == message.usage.input_tokens
    # What came can go back.
    again: Any = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": "more"}]
    assert sdk.messages.create(model="tiny", max_tokens=64, messages=again).stop_reason == "end_turn"


def test_streams(sdk: anthropic.Anthropic) -> None:
    with sdk.messages.stream(model="tiny", max_tokens=64, messages=HI) as stream:
        assert "".join(stream.text_stream) == "Hello 世界!"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 1
    raw = sdk.messages.create(model="tiny", max_tokens=64, messages=HI, stream=True)
    kinds = [event.type for event in raw]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])


def test_tools(sdk: anthropic.Anthropic) -> None:
    ask: Any = [{"role": "user", "content": "weather?"}]
    whole = sdk.messages.create(model="tiny", max_tokens=500, messages=ask, tools=[TOOL])
    with sdk.messages.stream(model="tiny", max_tokens=500, messages=ask, tools=[TOOL]) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        text, use = message.content
        assert text.type == "text"
        assert use.type == "tool_use"
        assert (use.name, use.input) == ("weather", {"city": "Ulm"})
    result = {"type": "tool_result", "tool_use_id": whole.content[1].id, "content": "rain"}  # type: ignore[union-attr]
    turns: Any = [*ask, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = sdk.messages.create(model="tiny", max_tokens=500, messages=turns, tools=[TOOL])
    assert after.type == "message"


def test_errors(sdk: anthropic.Anthropic, backend: ScriptedBackend) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        sdk.messages.create(model="tiny", max_tokens=5, messages=HI, extra_body={"temperature": 9})
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(model="other", max_tokens=5, messages=HI)
    backend._failure = ScriptedFailure(error=OverloadedError("the queue is full"))
    with pytest.raises(anthropic.APIStatusError) as busy:
        sdk.messages.create(model="tiny", max_tokens=5, messages=HI)
    assert busy.value.status_code == 529
    backend._failure = ScriptedFailure(error=EngineFaultError("broken"), after_tokens=2)
    with pytest.raises(anthropic.APIStatusError, match="broken"):
        list(sdk.messages.create(model="tiny", max_tokens=64, messages=HI, stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_engine(sdk: anthropic.Anthropic, backend: ScriptedBackend, stream: bool) -> None:
    ask: Any = [{"role": "user", "content": "forever"}]
    if stream:
        with sdk.messages.stream(model="tiny", max_tokens=1500, messages=ask) as answer:
            for _, _event in zip(range(5), answer, strict=False):
                pass
    else:
        with pytest.raises(anthropic.APITimeoutError):
            sdk.with_options(timeout=0.5).messages.create(model="tiny", max_tokens=1500, messages=ask)
    deadline_s = time.monotonic() + 5
    while backend.num_running and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert (backend.num_running, backend.num_cancelled) == (0, 1)
