"""OpenAI's own client, unmodified, against a real server; and what loading the gateway drags in."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import EngineFaultError, OverloadedError
from localmoe.core.request import Request
from localmoe.text.text_model import TextModel
from support.live_server import LiveServer
from support.tiny_text import encode, scripted_app


@pytest.fixture
def backend(text_model: TextModel) -> ScriptedBackend:
    def script(request: Request) -> list[int]:
        prompt = text_model.tokenizer.decode(request.prompt_ids)
        return [60] * 100_000 if "forever" in prompt else encode(text_model, "Hello 世界!")

    return ScriptedBackend(script, delay_s=0.001)


@pytest.fixture
def sdk(text_model: TextModel, backend: ScriptedBackend) -> Iterator[openai.OpenAI]:
    with (
        LiveServer(scripted_app(text_model, backend), backend.start) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_the_sdk_works_unmodified(sdk: openai.OpenAI, text_model: TextModel) -> None:
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").owned_by == "localmoe"
    whole = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        user="me",
        extra_body={"top_k": 5},
    )
    assert whole.choices[0].message.content == "Hello 世界!"
    assert whole.choices[0].logprobs is not None
    assert whole._request_id
    again = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}, whole.choices[0].message, {"role": "user", "content": "x"}],  # type: ignore[list-item]
    )
    assert again.choices[0].finish_reason == "stop"
    completion = sdk.completions.create(model="tiny", prompt=["a", "b"], echo=True, logprobs=1)
    assert [choice.text for choice in completion.choices] == ["aHello 世界!", "bHello 世界!"]
    stream = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello 世界!"
    assert chunks[-1].usage is not None
    with sdk.chat.completions.stream(model="tiny", messages=[{"role": "user", "content": "hi"}]) as accumulated:
        final = accumulated.get_final_completion()
    assert final.choices[0].message.content == "Hello 世界!"
    assert final.choices[0].finish_reason == "stop"


def test_the_sdk_understands_our_errors(sdk: openai.OpenAI, backend: ScriptedBackend) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model="tiny", prompt="a", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")
    backend._failure = ScriptedFailure(error=OverloadedError("the queue is full"))
    with pytest.raises(openai.InternalServerError) as busy:
        sdk.completions.create(model="tiny", prompt="a", stream=True)
    assert busy.value.status_code == 503
    backend._failure = ScriptedFailure(error=EngineFaultError("broken"))
    asked: list[Request] = []

    def script(request: Request) -> list[int]:
        asked.append(request)
        return [5]

    backend._script = script
    with pytest.raises(openai.InternalServerError, match="broken"):
        sdk.with_options(max_retries=2).completions.create(model="tiny", prompt="a")
    assert len(asked) == 1
    backend._script = lambda _: [5] * 3
    backend._failure = ScriptedFailure(error=EngineFaultError("broken"), after_tokens=2)
    with pytest.raises(openai.APIError, match="broken"):
        list(sdk.completions.create(model="tiny", prompt="a", stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_engine(
    sdk: openai.OpenAI, backend: ScriptedBackend, text_model: TextModel, stream: bool
) -> None:
    if stream:
        answer = sdk.completions.create(model="tiny", prompt="forever", stream=True, max_tokens=200)
        for _, _chunk in zip(range(3), answer, strict=False):
            pass
        answer.close()
    else:
        backend._delay_s = 0.02
        with pytest.raises(openai.APITimeoutError):
            sdk.with_options(timeout=0.5).completions.create(model="tiny", prompt="forever", max_tokens=200)
    deadline_s = time.monotonic() + 5
    while backend.num_running and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert (backend.num_running, backend.num_cancelled) == (0, 1)


TORCH_FREE = """
import asyncio, sys
from pathlib import Path
import httpx2
from support.live_server import LiveServer
from support.tiny_text import encode, scripted_app
from localmoe.backends.scripted import ScriptedBackend
from localmoe.text.text_model import TextModel

async def main():
    text = TextModel.load(Path(sys.argv[1]))
    backend = ScriptedBackend(encode(text, "fox"))
    await backend.start()
    transport = httpx2.ASGITransport(app=scripted_app(text, backend))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == "fox"

asyncio.run(main())
print([name for name in ("torch", "transformers", "numpy", "localmoe.engine") if name in sys.modules])
"""


def test_serving_a_chat_loads_no_torch(tmp_path: Path) -> None:
    from support.tiny_text import write_tiny_text_model

    result = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, str(write_tiny_text_model(tmp_path))],
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
