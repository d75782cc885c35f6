"""What `/v1/completions` answers: prompts in four forms, and scoring by `echo` and `logprobs`."""

import asyncio
import json
import threading
from typing import Any

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import EngineFaultError
from localmoe.core.request import Request, TokenChunk
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.openai.completions_schema import Completion
from localmoe.text.text_model import TextModel
from localmoe.text.tokenizer import Tokenizer
from support.tiny_text import BOS, encode, write_tiny_text_model

URL = "/v1/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", **fields}


def events(raw: str) -> list[dict[str, Any]]:
    lines = raw.removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_the_four_forms_of_a_prompt(serve, text_model: TextModel) -> None:
    hello, fox = encode(text_model, "hello", end=False), encode(text_model, "fox", end=False)
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, f"{request.id.rsplit('-')[-1]}")

    forms: list[tuple[Any, list[list[int]]]] = [
        ("hello", [hello]),
        (["hello", "fox"], [hello, fox]),
        (hello, [hello]),
        ([hello, fox], [hello, fox]),
    ]
    async with serve(ScriptedBackend(script)) as client:
        for prompt, expected in forms:
            seen.clear()
            answer = (await client.post(URL, json=body(prompt=prompt, n=2))).json()
            Completion.model_validate(answer, extra="forbid")
            assert [request.prompt_ids for request in seen] == [ids for ids in expected for _ in range(2)]
            assert [choice["text"] for choice in answer["choices"]] == [str(i) for i in range(2 * len(expected))]
            assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_an_answer_without_logprobs(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, " world"))) as client:
        answer = (await client.post(URL, json=body(max_tokens=1))).json()
        echoed = (await client.post(URL, json=body(echo=True))).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": " world", "logprobs": None, "finish_reason": "length"}]
    assert echoed["choices"][0]["text"] == "hello world"


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_scoring_a_prompt(serve, text_model: TextModel, as_ids: bool, stream: bool) -> None:
    text = "hello 世 fox"
    ids = encode(text_model, text, end=False)
    prompt = ids if as_ids else text
    async with serve(ScriptedBackend([9])) as client:
        response = await client.post(
            URL, json=body(prompt=prompt, max_tokens=0, echo=True, logprobs=1, stream=stream)
        )
    if stream:
        first, last = (event["choices"][0] for event in events(response.text))
        assert (first["text"], first["finish_reason"]) == (text, None)
        assert last == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
        logprobs = first["logprobs"]
    else:
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert response.json()["usage"]["completion_tokens"] == 0
        logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert all(top == {token: -0.5} for token, top in list(zip(*_columns(logprobs), strict=True))[1:])
    assert len(logprobs["tokens"]) == len(ids)
    assert "bytes:\\xe4" in logprobs["tokens"]
    whole = [i for i, token in enumerate(logprobs["tokens"]) if not token.startswith("bytes:")]
    for i in whole:
        offset = logprobs["text_offset"][i]
        assert text[offset:].startswith(logprobs["tokens"][i])


def _columns(logprobs: dict[str, Any]) -> tuple[list[str], list[Any]]:
    return logprobs["tokens"], logprobs["top_logprobs"]


async def test_lm_evaluation_harness_reads_a_loglikelihood(serve, text_model: TextModel) -> None:
    # As its TemplateAPI does: context and continuation as ids, one more token, and all but that one summed.
    context, continuation = encode(text_model, "hello", end=False), encode(text_model, " fox dog", end=False)
    eos = text_model.defaults.eos_token_ids[0]
    async with serve(ScriptedBackend([eos])) as client:
        answer = (
            await client.post(
                URL,
                json=body(
                    prompt=[context + continuation] * 2, max_tokens=1, logprobs=1, seed=1, echo=True, temperature=0
                ),
            )
        ).json()
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        start, end = len(context), -1
        assert len(logprobs["token_logprobs"]) == len(context) + len(continuation) + 1
        assert sum(logprobs["token_logprobs"][start:end]) == pytest.approx(-0.5 * len(continuation))
        for logprob, top in zip(
            logprobs["token_logprobs"][start:end], logprobs["top_logprobs"][start:end], strict=True
        ):
            assert logprob == max(top.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_prompt_and_answer_join(serve, text_model: TextModel, stream: bool) -> None:
    async with serve(ScriptedBackend(encode(text_model, " world, fox"))) as client:
        response = await client.post(URL, json=body(echo=True, logprobs=3, stream=stream))
    if stream:
        choices = [event["choices"][0] for event in events(response.text)]
        text = "".join(choice["text"] for choice in choices)
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    else:
        choice = response.json()["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text == "hello world, fox"
    *tokens, end = logprobs["tokens"]
    assert ("".join(tokens), end) == (text, "<|im_end|>")
    offsets = [len("".join(tokens[:i])) for i in range(len(tokens) + 1)]
    assert logprobs["text_offset"] == offsets
    assert all(len(top) == 3 for top in logprobs["top_logprobs"][1:])


async def test_zero_alternatives_still_report_the_token_itself(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, " fox", end=False))) as client:
        answer = (await client.post(URL, json=body(logprobs=0))).json()
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{" fox": -0.5}]


async def test_a_beginning_token_is_scored_but_not_shown(serve, tmp_path) -> None:
    text = TextModel.load(write_tiny_text_model(tmp_path, tokenizer_config={"add_bos_token": True}))
    async with serve(ScriptedBackend([9]), text=text) as client:
        answer = (await client.post(URL, json=body(max_tokens=0, echo=True, logprobs=0))).json()
    choice = answer["choices"][0]
    assert choice["text"] == "hello"
    assert choice["logprobs"]["tokens"] == [BOS, "hello"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


async def test_minus_infinity_is_written_as_a_number(serve, text_model: TextModel) -> None:
    class Certain(ScriptedBackend):
        async def generate(self, request: Request):
            async for chunk in super().generate(request):
                scored = [
                    type(entry)(entry.token_id, 0.0, [(entry.token_id, 0.0), (3, float("-inf"))])
                    for entry in chunk.logprobs
                ]
                yield TokenChunk(
                    request_id=chunk.request_id,
                    token_ids=chunk.token_ids,
                    logprobs=scored,
                    finish_reason=chunk.finish_reason,
                    usage=chunk.usage,
                )

    async with serve(Certain(encode(text_model, " fox", end=False))) as client:
        answer = (await client.post(URL, json=body(logprobs=2))).json()
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    assert sorted(top.values()) == [-9999.0, 0.0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_of_one_token_has_no_log_probabilities(serve, text_model: TextModel, stream: bool) -> None:
    # An answer that begins with a part of a character, so that nothing of it is seen at first.
    async with serve(ScriptedBackend(encode(text_model, "世"))) as client:
        response = await client.post(URL, json=body(prompt=[9], echo=True, logprobs=0, stream=stream))
    assert response.status_code == 200, response.text
    choices = [event["choices"][0] for event in events(response.text)] if stream else response.json()["choices"]
    assert choices[0]["logprobs"]["token_logprobs"][0] is None
    assert "".join(choice["text"] for choice in choices).endswith("世")


async def test_an_engine_that_does_not_score_is_at_fault(serve, text_model: TextModel) -> None:
    class Forgetful(ScriptedBackend):
        async def generate(self, request: Request):
            async for chunk in super().generate(request):
                yield TokenChunk(request_id=request.id, finish_reason=chunk.finish_reason, usage=chunk.usage)

    async with serve(Forgetful([9])) as client:
        response = await client.post(URL, json=body(max_tokens=0, echo=True, logprobs=0))
    assert response.status_code == 500
    assert "no log-probabilities" in response.json()["error"]["message"]
    assert EngineFaultError.__name__ not in response.text


async def test_a_prompt_may_fill_the_context_when_only_scored(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend([9])) as client:
        response = await client.post(URL, json=body(prompt=[5] * 256, max_tokens=0, echo=True, logprobs=0))
        assert response.status_code == 200
        response = await client.post(URL, json=body(prompt=[5] * 255))
        assert response.status_code == 200
        response = await client.post(URL, json=body(prompt=[5] * 257, max_tokens=0))
        assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_scored_once_for_all_its_answers(serve, text_model: TextModel, stream: bool) -> None:
    seen: list[Request] = []

    class FirstIsLast(ScriptedBackend):
        """The first answer to each prompt begins after the others have ended."""

        async def generate(self, request: Request):
            seen.append(request)
            if int(request.id.rsplit("-")[-1]) % 3 == 0:
                await asyncio.sleep(0.05)
            async for chunk in super().generate(request):
                yield chunk

    fields = {"prompt": ["hello", "fox dog"], "n": 3, "echo": True, "logprobs": 1, "max_tokens": 2}
    async with serve(FirstIsLast(encode(text_model, " world fox"))) as client:
        response = await client.post(URL, json=body(**fields, stream=stream))
    assert [request.sampling.prompt_logprobs for request in seen] == [1, None, None] * 2
    answer = [event["choices"][0] for event in events(response.text)] if stream else response.json()["choices"]
    for index in range(6):
        own = [choice for choice in answer if choice["index"] == index]
        text = fields["prompt"][index // 3]
        assert "".join(choice["text"] for choice in own).startswith(f"{text} world")
        parts = [choice["logprobs"] for choice in own if choice["logprobs"]]
        scores = [score for part in parts for score in part["token_logprobs"]]
        assert scores == [None] + [-0.5] * (len(encode(text_model, text, end=False)) - 1 + 2)
        assert own[-1]["finish_reason"] == "length"


async def test_the_log_probabilities_of_one_request_are_bounded(serve) -> None:
    fields = {"prompt": [[5] * 10] * 4, "n": 2, "echo": True, "logprobs": 4, "max_tokens": 3}
    num_entries = 4 * 2 * (10 + 3) * (4 + 1)
    backend = ScriptedBackend([9])
    async with serve(backend, config=GatewayConfig(max_logprobs=num_entries)) as client:
        assert (await client.post(URL, json=body(**fields))).status_code == 200
        assert (await client.post(URL, json=body(**{**fields, "max_tokens": 99, "logprobs": None}))).is_success
        for change in ({"logprobs": 5}, {"max_tokens": 4}, {"n": 3}, {"prompt": [[5] * 10] * 3 + [[5] * 11]}):
            response = await client.post(URL, json=body(**{**fields, **change}))
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "logprobs"
            assert f"at most {num_entries} are allowed" in response.json()["error"]["message"]
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        assert (await client.post("/v1/chat/completions", json=chat)).is_success
        chat["top_logprobs"] = 20
        assert (await client.post("/v1/chat/completions", json=chat)).is_success  # of a shorter answer
        response = await client.post("/v1/chat/completions", json={**chat, "max_tokens": 236})
    assert "logprobs: up to 236 tokens with 20 alternatives each are 4956" in response.json()["error"]["message"]


class Watched:
    """Notes in which threads texts are tokenized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_loop: list[bool] = []
        loop_thread = threading.get_ident()
        encode_text = Tokenizer.encode

        def watched(tokenizer: Tokenizer, text: str, **kwargs: Any) -> list[int]:
            self.in_loop.append(threading.get_ident() == loop_thread)
            return encode_text(tokenizer, text, **kwargs)

        monkeypatch.setattr(Tokenizer, "encode", watched)


async def test_many_small_texts_are_tokenized_off_the_event_loop(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    async with serve(ScriptedBackend([9])) as client:
        assert (await client.post(URL, json=body(prompt=["hi"] * 3))).is_success
        assert (await client.post(URL, json=body(prompt=["hi " * 40] * 100, max_tokens=1))).is_success
    assert watched.in_loop == [True] * 3 + [False] * 100


async def test_many_small_texts_to_fill_in_between_are_too(
    serve, coder: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    async with serve(ScriptedBackend([9]), text=coder) as client:
        fields = {"prompt": ["hi"] * 100, "suffix": "a" * 100, "max_tokens": 1}
        assert (await client.post(URL, json=body(**fields))).is_success
    assert watched.in_loop
    assert not any(watched.in_loop)


async def test_a_text_that_cannot_fit_is_not_tokenized(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    async with serve(ScriptedBackend([9])) as client:
        response = await client.post(URL, json=body(prompt="hello " * 2000))
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert watched.in_loop == []
        # All longest tokens, so many that one byte more could not fit.
        response = await client.post(URL, json=body(prompt=BOS * 256, max_tokens=0))
        assert response.is_success
        assert len(watched.in_loop) == 1
        response = await client.post(URL, json=body(prompt=BOS * 256 + "a", max_tokens=0))
    assert "are at least 257 tokens" in response.json()["error"]["message"]
    assert len(watched.in_loop) == 1


@pytest.mark.parametrize("url", [URL, "/v1/chat/completions", "/v1/tokenize"])
async def test_tokens_that_the_model_has_no_rows_for_are_refused(serve, tmp_path, url: str) -> None:
    write_tiny_text_model(tmp_path)
    serialized = json.loads((tmp_path / "tokenizer.json").read_text())
    extra = {"id": 400, "content": "<|extra|>", "single_word": False, "lstrip": False, "rstrip": False}
    serialized["added_tokens"].append({**extra, "normalized": False, "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(serialized))
    text = TextModel.load(tmp_path)
    token_id = text.tokenizer.encode("<|extra|>", add_special_tokens=False)[0]
    assert token_id >= text.vocab_size
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return [9]

    async with serve(ScriptedBackend(script), text=text) as client:
        content = "hello <|extra|>"
        fields = {"messages": [{"role": "user", "content": content}]} if "chat" in url else {"prompt": content}
        response = await client.post(url, json={"model": "tiny", **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert f"token id {token_id} ('<|extra|>') is not in the vocabulary of {text.vocab_size}" in error["message"]
    assert error["param"] == next(iter(fields))
    assert seen == []
