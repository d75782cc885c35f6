"""The demo model as a newcomer meets it, through the official SDK, unmodified."""

import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from localmoe.catalog.catalog import DEMO_NAME
from support.server import running_server

pytestmark = pytest.mark.slow
REVERSE = "Write a Python function that reverses a string."


@pytest.fixture(scope="module")
def client(demo_home: Path) -> Iterator[openai.OpenAI]:
    with (
        running_server(demo_home, DEMO_NAME, "nvfp4") as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client,
    ):
        yield client


def check_reverses(answer: str) -> None:
    """Run the answer's first function on strings and see what it does."""
    block = re.search(r"```python\n(.*?)```", answer, re.DOTALL)
    assert block, answer
    code = re.match(r"def (\w+)\(.*?(?=^\S(?!ef )|\Z)", block[1], re.DOTALL | re.MULTILINE)
    assert code, answer
    namespace: dict[str, object] = {}
    exec(code[0], namespace)
    function = namespace[code[1]]
    assert callable(function)
    for text in ("", "a", "hello", "été"):
        assert function(text) == text[::-1]


def test_chat_writes_working_code_streamed_and_not(client: openai.OpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": REVERSE}]
    whole = client.chat.completions.create(model=DEMO_NAME, messages=messages, temperature=0)
    assert whole.choices[0].finish_reason == "stop"
    answer = whole.choices[0].message.content
    assert answer
    check_reverses(answer)
    chunks = client.chat.completions.create(
        model=DEMO_NAME, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for chunk in chunks:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == answer
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_completions_streamed_and_not(client: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    whole = client.completions.create(model=DEMO_NAME, prompt=prompt, max_tokens=8, temperature=0)
    assert "Paris" in whole.choices[0].text
    chunks = client.completions.create(model=DEMO_NAME, prompt=prompt, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEMO_NAME]
