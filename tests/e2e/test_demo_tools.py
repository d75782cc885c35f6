"""Tools with the demo model, which was not made for them: described to it, and called because they must be."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from localmoe.catalog.catalog import DEMO_NAME
from support.server import running_server

pytestmark = pytest.mark.slow


class Booking(BaseModel):
    """Books a table."""

    model_config = ConfigDict(extra="forbid", strict=True)

    restaurant: str = Field(max_length=40)
    guests: int = Field(ge=1, le=20)
    when: Literal["noon", "evening"]
    outdoors: bool


class Farewell(BaseModel):
    """Says goodbye."""

    model_config = ConfigDict(extra="forbid", strict=True)

    words: list[Literal["bye", "see you"]] = Field(min_length=1, max_length=3)


KINDS = {"book": Booking, "farewell": Farewell}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "description": kind.__doc__, "parameters": kind.model_json_schema()},
    }
    for name, kind in KINDS.items()
]
QUESTION: list[Any] = [{"role": "user", "content": "A table at Luigi's for four this evening, outside, please."}]


@pytest.fixture(scope="module")
def client(demo_home: Path) -> Iterator[openai.OpenAI]:
    with (
        running_server(demo_home, DEMO_NAME, "nvfp4") as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0) as client,
    ):
        yield client


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_named_tool_is_called_with_valid_arguments(client: openai.OpenAI, name: str, temperature: float) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": named(name), "temperature": temperature, "seed": 7}
    whole = client.chat.completions.create(model=DEMO_NAME, messages=QUESTION, **options).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert call.type == "function"
    assert call.function.name == name
    KINDS[name].model_validate_json(call.function.arguments)
    with client.chat.completions.stream(model=DEMO_NAME, messages=QUESTION, **options) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls is not None
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


def test_some_tool_is_called_where_one_must_be(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=DEMO_NAME,
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1,
        n=3,
        seed=1,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls or ():
            assert call.type == "function"
            KINDS[call.function.name].model_validate_json(call.function.arguments)


def test_a_conversation_goes_on_after_its_calls(client: openai.OpenAI) -> None:
    forced = client.chat.completions.create(
        model=DEMO_NAME, messages=QUESTION, tools=TOOLS, tool_choice=named("book"), temperature=0
    )
    message = forced.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": json.dumps({"booked": True})}
    messages: list[Any] = [*QUESTION, message, result]
    after = client.chat.completions.create(
        model=DEMO_NAME, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=40, temperature=0
    )
    assert after.choices[0].message.content
    assert after.choices[0].message.tool_calls is None
