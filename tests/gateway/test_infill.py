"""`/infill` and `suffix`: text between two others."""

import json
from collections.abc import AsyncGenerator

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.request import Request, TokenChunk
from localmoe.text.text_model import TextModel
from support.tiny_text import encode

BODY = {"input_prefix": "a = ", "input_suffix": "\n", "prompt": "b"}


class FakeListeningBackend(ScriptedBackend):
    """Keeps the requests it gets."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(script)
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        async for chunk in super().generate(request):
            yield chunk


async def test_infill_in_one_piece(serve, coder: TextModel) -> None:
    backend = FakeListeningBackend(encode(coder, "hello world"))
    async with serve(backend, text=coder) as client:
        response = await client.post("/infill", json=BODY)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["content"], answer["stop"], answer["stop_type"]) == ("hello world", True, "eos")
    (request,) = backend.requests
    prompt = coder.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    assert prompt == "<|fim_prefix|>a = b<|fim_suffix|>\n<|fim_middle|>"
    assert coder.tokenizer.token_id("<|fim_pad|>") in request.sampling.stop_token_ids
    assert answer["tokens_evaluated"] == len(request.prompt_ids)
    assert answer["tokens_predicted"] == len(encode(coder, "hello world"))


async def test_infill_as_a_stream(serve, coder: TextModel) -> None:
    async with serve(ScriptedBackend(encode(coder, "hello world")), text=coder) as client:
        response = await client.post("/infill", json={**BODY, "stream": True, "n_predict": 2})
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.removesuffix("\n\n").split("\n\n")]
    assert [event["stop"] for event in events] == [*[False] * (len(events) - 1), True]
    assert events[-1]["stop_type"] == "limit"
    assert "hello world".startswith("".join(event["content"] for event in events))


async def test_a_stop_string_is_named(serve, coder: TextModel) -> None:
    async with serve(ScriptedBackend(encode(coder, "hello world")), text=coder) as client:
        response = await client.post("/infill", json={**BODY, "stop": ["wor"]})
    answer = response.json()
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == ("hello ", "word", "wor")


async def test_suffix_of_a_completion(serve, coder: TextModel) -> None:
    backend = FakeListeningBackend(encode(coder, "hello"))
    async with serve(backend, text=coder) as client:
        body = {"model": "tiny", "prompt": "a = ", "suffix": "\n"}
        response = await client.post("/v1/completions", json=body)
        echoed = await client.post("/v1/completions", json={**body, "echo": True})
        of_ids = await client.post("/v1/completions", json={**body, "prompt": [1, 2]})
    assert response.json()["choices"][0]["text"] == "hello"
    prompt = coder.tokenizer.decode(backend.requests[0].prompt_ids, skip_special_tokens=False)
    assert prompt == "<|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>"
    assert (echoed.status_code, echoed.json()["error"]["param"]) == (400, "echo")
    assert (of_ids.status_code, of_ids.json()["error"]["param"]) == (400, "suffix")


@pytest.mark.parametrize("path", ["/infill", "/v1/completions"])
async def test_a_model_that_was_not_made_for_it_says_so(serve, path: str) -> None:
    body = BODY if path == "/infill" else {"model": "tiny", "prompt": "a = ", "suffix": "\n"}
    async with serve(ScriptedBackend([5])) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    assert "was not made to fill in" in response.json()["error"]["message"]


async def test_what_llama_cpp_has_and_we_do_not_is_refused_by_name(serve, coder: TextModel) -> None:
    async with serve(ScriptedBackend([5]), text=coder) as client:
        refused = await client.post("/infill", json={**BODY, "mirostat": 2})
        ignored = await client.post("/infill", json={**BODY, "mirostat": 0, "cache_prompt": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mirostat")
    assert ignored.headers["x-localmoe-ignored"] == "cache_prompt"
