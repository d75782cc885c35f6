"""Bad input gets a clear message: status, words and field of each case."""

import json
import math
from typing import Any

import pydantic
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.gateway.openai.completions_schema import CompletionRequest
from localmoe.text.text_model import TextModel
from support.tiny_text import write_tiny_text_model

HI = [{"role": "user", "content": "hi"}]
AUDIO = {"data": "aGk=", "format": "wav"}
LONG = 10**9


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "tiny", "messages": HI, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "tiny", "prompt": "hi", **fields}


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


CASES: list[tuple[tuple[str, Any], int, str, str | None]] = [
    # what, status, words in the message, field
    (chat(model="other"), 404, "model 'other' is not served here; served models: tiny", "model"),
    (chat(model=1), 400, "model: Input should be a valid string; got 1", "model"),
    (chat(model=None), 400, "valid string; got null", "model"),
    (chat(model="\ud800"), 400, "unicode string", "model"),
    (("/v1/chat/completions", {"messages": HI}), 400, "model is required", "model"),
    (("/v1/chat/completions", {"model": "tiny"}), 400, "messages is required", "messages"),
    (("/v1/chat/completions", []), 400, "the body must be a JSON object", None),
    (("/v1/chat/completions", "x"), 400, "the body must be a JSON object", None),
    (chat(messages=[]), 400, "at least 1 item", "messages"),
    (chat(messages="hi"), 400, "messages: Input should be a valid list", "messages"),
    (chat(messages=[1]), 400, "messages[0]", "messages[0]"),
    (chat(messages=HI * 5000), 400, "at most 4096 items", "messages"),
    (
        message(role="robot"),
        400,
        "'system', 'developer', 'user', 'assistant' or 'tool'; got \"robot\"",
        "messages[0].role",
    ),
    (message(role="tool", tool_call_id="x"), 400, "no earlier message", "messages[0].tool_call_id"),
    (message(role="tool"), 400, "required with role 'tool'", "messages[0].tool_call_id"),
    (message(role=None), 400, "got null", "messages[0].role"),
    (message(content=None), 400, "messages[0].content: required", "messages[0].content"),
    (message(content=7), 400, "valid string; got 7", "messages[0].content"),
    (message(content="\udc00"), 400, "lone surrogates", "messages[0].content"),
    (message(content=[]), 400, "at least 1 item", "messages[0].content"),
    (message(content=["hi"]), 400, "content parts are objects with a type", "messages[0].content[0].type"),
    (message(content=[{"type": "text"}]), 400, "text is required", "messages[0].content[0].text"),
    (
        message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]),
        400,
        "no content parts of type 'image_url'; send text",
        "messages[0].content[0].type",
    ),
    (
        message(content=[{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": AUDIO}]),
        400,
        "no content parts of type 'input_audio'; send text",
        "messages[0].content[1].type",
    ),
    (
        (
            "/v1/tokenize",
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
        ),
        400,
        "no content parts of type 'file'",
        "messages[0].content[0].type",
    ),
    (message(content=[{"type": "input_audio"}]), 400, "is required", "messages[0].content[0].input_audio"),
    (
        message(content=[{"type": "text", "text": "a", "x": 1}]),
        400,
        "not a field of this API",
        "messages[0].content[0].x",
    ),
    (message(tool_calls=[{"id": "a"}]), 400, "objects with a type", "messages[0].tool_calls[0].type"),
    (message(function_call={"name": "f"}), 400, "not supported", "messages[0].function_call"),
    (message(weight=1), 400, "messages[0].weight is not a field", "messages[0].weight"),
    (message(name=""), 400, "at least 1 character", "messages[0].name"),
    (chat(functions=[{}]), 400, "not supported", "functions"),
    (chat(function_call={"name": "f"}), 400, "not supported", "function_call"),
    (chat(modalities=["text", "audio"]), 400, "not supported", "modalities"),
    (chat(audio={"voice": "x"}), 400, "not supported", "audio"),
    (chat(moderation={"model": "x"}), 400, "not supported", "moderation"),
    (chat(web_search_options={}), 400, "not supported", "web_search_options"),
    (chat(store=True), 400, "not supported", "store"),
    (chat(best_of=2), 400, "not supported", "best_of"),
    (chat(best_of=True), 400, "not supported", "best_of"),
    (chat(temprature=1), 400, "temprature is not a field of this API", "temprature"),
    (chat(prompt="x"), 400, "prompt is not a field of this API", "prompt"),
    (chat(temperature="1"), 400, 'temperature: Input should be a valid number; got "1"', "temperature"),
    (chat(temperature=True), 400, "valid number; got true", "temperature"),
    (chat(temperature=-0.1), 400, "greater than or equal to 0; got -0.1", "temperature"),
    (chat(temperature=2.1), 400, "less than or equal to 2; got 2.1", "temperature"),
    (chat(temperature=math.nan), 400, "finite number", "temperature"),
    (chat(temperature=math.inf), 400, "temperature", "temperature"),
    (chat(temperature=10**400), 400, "temperature", "temperature"),
    (chat(top_p=0), 400, "greater than 0", "top_p"),
    (chat(top_p=1.01), 400, "less than or equal to 1", "top_p"),
    (chat(top_k=-2), 400, "greater than or equal to -1", "top_k"),
    (chat(top_k=1.5), 400, "valid integer", "top_k"),
    (chat(top_k=2**40), 400, "less than or equal to", "top_k"),
    (chat(min_p=-math.inf), 400, "min_p", "min_p"),
    (chat(repetition_penalty=0), 400, "greater than or equal to 0.01", "repetition_penalty"),
    (chat(repetition_penalty=0.009), 400, "greater than or equal to 0.01", "repetition_penalty"),
    (chat(repetition_penalty=100.1), 400, "less than or equal to 100", "repetition_penalty"),
    (chat(presence_penalty=3), 400, "less than or equal to 2", "presence_penalty"),
    (chat(frequency_penalty=-3), 400, "greater than or equal to -2", "frequency_penalty"),
    (chat(n=0), 400, "n: Input should be greater than or equal to 1; got 0", "n"),
    (chat(n=LONG), 400, "less than or equal to 64; got 1000000000", "n"),
    (chat(n=True), 400, "valid integer; got true", "n"),
    (chat(n="2"), 400, "valid integer", "n"),
    (chat(n=1.0), 400, "valid integer", "n"),
    (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"maximum": 2**64}}}]),
        400,
        "an integer of more than 64 bits",
        "tools[0].function.parameters",
    ),
    (chat(seed=2**63), 400, "seed", "seed"),
    (chat(seed=0.5), 400, "valid integer", "seed"),
    (chat(max_tokens=0), 400, "greater than or equal to 1", "max_tokens"),
    (chat(max_tokens=2**31), 400, "less than or equal to", "max_tokens"),
    (
        chat(max_tokens=LONG),
        400,
        "the model's context is 256 tokens; the prompt has 20 and max_tokens asks for 1000000000 more",
        "max_tokens",
    ),
    (chat(max_completion_tokens=250), 400, "270 in all", "max_completion_tokens"),
    (chat(max_tokens=5, max_completion_tokens=6), 400, "5 contradicts max_completion_tokens 6", "max_tokens"),
    (message(content="hi " * 400), 400, "needs room for at least 1 more", "messages"),
    (chat(logprobs=1), 400, "valid boolean", "logprobs"),
    (chat(top_logprobs=2), 400, "only allowed with logprobs: true", "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "less than or equal to 20", "top_logprobs"),
    (chat(logprobs=True, top_logprobs=-1), 400, "greater than or equal to 0", "top_logprobs"),
    (chat(stop=""), 400, "at least 1 character", "stop"),
    (chat(stop=["a", ""]), 400, "at least 1 character", "stop[1]"),
    (chat(stop=["a"] * 17), 400, "at most 16 items", "stop"),
    (chat(stop="a" * 257), 400, "at most 256 characters", "stop"),
    (chat(stop=5), 400, "stop: Input should be a valid string; got 5", "stop"),
    (chat(stop=[None]), 400, "valid string; got null", "stop[0]"),
    (chat(stop_token_ids=[-1]), 400, "greater than or equal to 0", "stop_token_ids[0]"),
    (chat(stop_token_ids=[1] * 65), 400, "at most 64 items", "stop_token_ids"),
    (chat(stop_token_ids=[0, 5000]), 400, "token id 5000 is not in the vocabulary", "stop_token_ids[1]"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias.x", "logit_bias.x"),
    (chat(logit_bias={"-1": 1}), 400, "match pattern", "logit_bias.-1"),
    (chat(logit_bias={"1": 101}), 400, "less than or equal to 100", "logit_bias.1"),
    (chat(logit_bias={"1": True}), 400, "valid number", "logit_bias.1"),
    (chat(logit_bias={"5000": 1}), 400, "token id 5000 is not in the vocabulary", "logit_bias"),
    (chat(logit_bias={str(i): 1 for i in range(1025)}), 400, "at most 1024 items", "logit_bias"),
    (chat(logit_bias=[1]), 400, "valid dictionary", "logit_bias"),
    (chat(ignore_eos="yes"), 400, "valid boolean", "ignore_eos"),
    (chat(stream=1), 400, "valid boolean", "stream"),
    (chat(stream_options={"include_usage": True}), 400, "only allowed with stream: true", "stream_options"),
    (
        chat(stream=True, stream_options={"include_usage": 1}),
        400,
        "valid boolean",
        "stream_options.include_usage",
    ),
    (chat(stream=True, stream_options={"x": 1}), 400, "not a field", "stream_options.x"),
    (completion(prompt=""), 400, "the prompt is empty", "prompt"),
    (completion(prompt=["a", ""]), 400, "the prompt is empty", "prompt[1]"),
    (completion(prompt=[]), 400, "at least 1 item", "prompt"),
    (completion(prompt=[[]]), 400, "at least 1 item", "prompt[0]"),
    (completion(prompt=None), 400, "valid string", "prompt"),
    (completion(prompt={"a": 1}), 400, "valid string; got an object", "prompt"),
    (completion(prompt=[1, "a"]), 400, "valid integer", "prompt[1]"),
    (completion(prompt=["a", 1]), 400, "valid string", "prompt[1]"),
    (completion(prompt=[1, True]), 400, "valid integer; got true", "prompt[1]"),
    (completion(prompt=[-1]), 400, "greater than or equal to 0", "prompt[0]"),
    (completion(prompt=[[1], [5000]]), 400, "token id 5000 is not in the vocabulary", "prompt[1]"),
    (completion(prompt=["a"] * 257), 400, "at most 256 items", "prompt"),
    (completion(prompt=["a"] * 100, n=3), 400, "300 choices; at most 256", "prompt"),
    (completion(prompt=[5] * 300), 400, "the prompt has 300", "prompt"),
    (completion(prompt=[5] * 256), 400, "needs room for at least 1 more", "prompt"),
    (completion(prompt=[5] * (2**20 + 1)), 400, "at most 1048576 items", "prompt"),
    (
        message(content="hello " * 2000),
        400,
        "context is 256 tokens; the prompt's 12050 bytes are at least 1005 tokens",
        "messages",
    ),
    (completion(prompt=["a", "世" * 2000]), 400, "6000 bytes are at least 500 tokens", "prompt[1]"),
    (("/v1/tokenize", {"model": "tiny", "prompt": "a" * 9999}), 400, "at least 834 tokens", "prompt"),
    (completion(suffix="x"), 400, "was not made to fill in", "suffix"),
    (completion(best_of=3), 400, "best_of: not supported", "best_of"),
    (completion(logprobs=21), 400, "less than or equal to 20", "logprobs"),
    (completion(logprobs=True), 400, "valid integer", "logprobs"),
    (completion(max_tokens=-1), 400, "greater than or equal to 0", "max_tokens"),
    (completion(echo="x"), 400, "valid boolean", "echo"),
    (completion(messages=HI), 400, "messages is not a field", "messages"),
    (("/v1/tokenize", {"model": "tiny"}), 400, "either prompt or messages", "prompt"),
    (("/v1/tokenize", {"model": "tiny", "prompt": "a", "messages": HI}), 400, "either", "prompt"),
    (("/v1/tokenize", {"model": "no", "prompt": "a"}), 404, "not served", "model"),
    (("/v1/detokenize", {"model": "tiny", "tokens": [5000]}), 400, "not in the vocabulary", "tokens"),
    (("/v1/detokenize", {"model": "tiny", "tokens": ["1"]}), 400, "valid integer", "tokens[0]"),
    (("/v1/detokenize", {"model": "tiny", "tokens": [-1]}), 400, "greater than", "tokens[0]"),
]


@pytest.mark.parametrize(
    ("request_", "status", "words", "param"), CASES, ids=[f"{i}-{case[3]}" for i, case in enumerate(CASES)]
)
async def test_bad_fields(serve, request_: tuple[str, Any], status: int, words: str, param: str | None) -> None:
    url, content = request_
    backend = ScriptedBackend([5, 6])
    async with serve(backend) as client:
        # json.dumps writes NaN, Infinity and lone surrogates, as careless clients do.
        response = await client.post(
            url, content=json.dumps(content), headers={"content-type": "application/json"}
        )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    assert response.headers["x-request-id"]


CODES = [
    (chat(n=0), "invalid_value"),
    (chat(n="1"), "invalid_type"),
    (chat(foo=1), "unknown_parameter"),
    (chat(functions=[1]), "unsupported_parameter"),
    (("/v1/completions", {"model": "tiny"}), "missing_required_parameter"),
    (chat(max_tokens=1000), "context_length_exceeded"),
    (chat(model="x"), "model_not_found"),
]


@pytest.mark.parametrize(("request_", "code"), CODES)
async def test_codes(serve, request_: tuple[str, Any], code: str) -> None:
    async with serve(ScriptedBackend([5])) as client:
        response = await client.post(request_[0], json=request_[1])
    assert response.json()["error"]["code"] == code


async def test_templates_errors_and_missing_templates_are_bad_requests(serve, tmp_path) -> None:
    refusing = TextModel.load(
        write_tiny_text_model(tmp_path / "a", chat_template="{{ raise_exception('no system role') }}")
    )
    without = TextModel.load(write_tiny_text_model(tmp_path / "b", chat_template=None))
    for text, words in ((refusing, "no system role"), (without, "no chat template")):
        async with serve(ScriptedBackend([5]), text=text) as client:
            response = await client.post(*chat()[:1], json=chat()[1])
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "messages"


def test_many_unknown_fields_cost_one_complaint() -> None:
    """A complaint about each of a million would stall every other client for seconds."""
    body = {"model": "tiny", "prompt": "x"} | {f"k{i}": 1 for i in range(1000)}
    with pytest.raises(pydantic.ValidationError) as caught:
        CompletionRequest.model_validate(body)
    assert [error["loc"] for error in caught.value.errors()] == [("k0",)]
