"""Tools and structured answers with clients as people have them: OpenAI's own and LangChain's, both unmodified."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.request import Request
from localmoe.text.text_model import TextModel
from support.live_server import LiveServer
from support.tiny_text import encode, gateway_app, served_model, write_tiny_text_model

TEMPLATE = (
    "{{ tools | tojson }}{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{{ message.tool_calls }}{% endfor %}<assistant>{{ '<tool_call>' if false }}"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


@tool
def get_weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"sunny in {city} for {days} days"


class Weather(BaseModel):
    """What the weather is like."""

    city: str
    days: int


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    text = TextModel.load(write_tiny_text_model(tmp_path, chat_template=TEMPLATE))

    def script(request: Request) -> list[int]:
        prompt = text.tokenizer.decode(request.prompt_ids)
        if "sunny in Paris" in prompt:
            return encode(text, "Take no umbrella.")
        if "as JSON" in prompt:
            return encode(text, '{"city": "Paris", "days": 2}')
        return encode(text, CALL.replace("get_weather", "Weather") if '"Weather"' in prompt else CALL)

    backend = ScriptedBackend(script)
    app = gateway_app(served_model(text, backend, context_tokens=50_000))
    with LiveServer(app, backend.start) as url:
        yield f"{url}/v1"


def test_openai_calls_a_tool_and_goes_on(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "Weather?"}]
        first = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL]).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.tool_calls is not None
        call = first.message.tool_calls[0]
        assert call.type == "function"
        assert call.function.arguments == '{"city": "Paris", "days": 2}'
        messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny in Paris"}]
        second = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL]).choices[0]
        assert (second.message.content, second.message.tool_calls) == ("Take no umbrella.", None)


def test_openai_puts_a_stream_together(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        question: list[Any] = [{"role": "user", "content": "Weather?"}]
        with client.chat.completions.stream(model="tiny", messages=question, tools=[TOOL]) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.name == "get_weather"
    assert final.message.tool_calls[0].function.arguments == '{"city": "Paris", "days": 2}'


def langchain(url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="tiny", base_url=url, api_key="none", max_retries=0, **options)  # type: ignore[arg-type]


def test_langchain_calls_a_tool_and_goes_on(url: str) -> None:
    model = langchain(url).bind_tools([get_weather])
    messages: list[BaseMessage] = [HumanMessage("Weather?")]
    first = model.invoke(messages)
    assert isinstance(first, AIMessage)
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [
        ("get_weather", {"city": "Paris", "days": 2})
    ]
    result = get_weather.invoke(first.tool_calls[0])
    assert isinstance(result, ToolMessage)
    assert model.invoke([*messages, first, result]).content == "Take no umbrella."


def test_langchain_puts_a_stream_together(url: str) -> None:
    whole: Any = None
    for chunk in langchain(url).bind_tools([get_weather], parallel_tool_calls=False).stream("Weather?"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        ("get_weather", {"city": "Paris", "days": 2})
    ]


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_langchain_gets_structured_output(url: str, method: Any) -> None:
    question = "Weather?" if method == "function_calling" else "Weather, as JSON"
    structured = langchain(url).with_structured_output(Weather, method=method)
    assert structured.invoke(question) == Weather(city="Paris", days=2)
