"""What `/v1/chat/completions` answers and what it asks of the engine."""

import json
import threading
from typing import Any

import httpx2
import msgspec
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.events import EventBus, RequestFinished
from localmoe.core.request import Request, SamplingParams
from localmoe.gateway.openai.chat_schema import ChatCompletion, ChatCompletionChunk
from localmoe.text.chat_template import ChatTemplate
from localmoe.text.text_model import TextModel
from support.tiny_text import encode, gateway_app, served_model, write_tiny_text_model

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI, **fields}


def data_lines(raw: str) -> list[Any]:
    """Decoded events of a stream; the format itself is checked byte by byte below."""
    events = raw.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def capture(answer: list[int]) -> tuple[ScriptedBackend, list[Request]]:
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return answer

    return ScriptedBackend(script), seen


async def test_an_answer_in_one_piece(serve, text_model: TextModel) -> None:
    backend, seen = capture(encode(text_model, "Hello 世界!"))
    async with serve(backend) as client:
        response = await client.post(URL, json=body())
    assert response.status_code == 200
    answer = response.json()
    ChatCompletion.model_validate(answer, extra="forbid")
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = text_model.tokenizer.encode(prompt, add_special_tokens=False)
    assert seen[0].prompt_ids == prompt_ids
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello 世界!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    completion_tokens = len(encode(text_model, "Hello 世界!"))
    assert answer["usage"] == {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": completion_tokens,
        "total_tokens": len(prompt_ids) + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_stream_byte_by_byte(serve, text_model: TextModel) -> None:
    backend = ScriptedBackend(encode(text_model, "fox 世"))
    async with serve(backend) as client:
        response = await client.post(URL, json=body(stream=True))
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    head = (
        f'{{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
        '"model":"tiny","choices":[{"index":0,"delta":'
    )
    tail = '"logprobs":null,"finish_reason":'
    pieces = [text_model.tokenizer.token_text(i) for i in encode(text_model, "fox ", end=False)]
    expected = "".join(
        f"data: {head}{delta},{tail}{reason}}}]}}\n\n"
        for delta, reason in [
            ('{"role":"assistant","content":""}', "null"),
            *((f'{{"content":"{piece}"}}', "null") for piece in [*pieces, "世"]),
            ("{}", '"stop"'),
        ]
    )
    assert response.content == f"{expected}data: [DONE]\n\n".encode()


async def test_usage_in_a_stream(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "fox"))) as client:
        raw = await client.post(URL, json=body(stream=True, stream_options={"include_usage": True}))
        plain = await client.post(URL, json=body(stream=True))
    chunks = data_lines(raw.text)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, extra="forbid")
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(encode(text_model, "fox"))
    assert all("usage" not in chunk for chunk in data_lines(plain.text))


async def test_n_answers_run_together_and_have_their_own_seeds(serve, text_model: TextModel) -> None:
    words = ["hello", "fox", "dog"]
    seen: list[Request] = []

    def script(request: Request) -> list[int]:
        seen.append(request)
        return encode(text_model, words[int(request.id.rsplit("-")[-1])])

    async with serve(ScriptedBackend(script)) as client:
        whole = (await client.post(URL, json=body(n=3, seed=2**63 - 1))).json()
        stream = data_lines((await client.post(URL, json=body(n=3, stream=True))).text)
    assert [choice["message"]["content"] for choice in whole["choices"]] == words
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed or 0 for request in seen[:3]) == [0, 1, 2**63 - 1]
    assert len({request.id for request in seen}) == 6
    lengths = [len(encode(text_model, word)) for word in words]
    assert whole["usage"]["completion_tokens"] == sum(lengths)
    assert whole["usage"]["prompt_tokens"] == len(seen[0].prompt_ids)
    for index, word in enumerate(words):
        own = [chunk["choices"][0] for chunk in stream if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == word
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ("wor", "hello ", "stop"),
        (["zzz", "lo w"], "hel", "stop"),
        ("o world, hel", "hell", "stop"),
        ("世x", "hello world, hello 世", "stop"),
        ([], "hello world, hello 世", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_across_tokens(
    serve, text_model: TextModel, stop: Any, expected: str, reason: str, stream: bool
) -> None:
    backend = ScriptedBackend(encode(text_model, "hello world, hello 世"))
    async with serve(backend) as client:
        response = await client.post(URL, json=body(stop=stop, stream=stream))
    if stream:
        chunks = data_lines(response.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert (text, finish) == (expected, reason)
    assert backend.num_running == 0


async def test_a_stop_token_ends_the_answer_without_its_text(serve, text_model: TextModel) -> None:
    fox, dog = (encode(text_model, word, end=False) for word in ("fox", " dog"))
    async with serve(ScriptedBackend([*fox, *dog, *fox])) as client:
        answer = (await client.post(URL, json=body(stop_token_ids=dog))).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("fox", "stop")
    assert answer["usage"]["completion_tokens"] == len(fox) + 1


async def test_a_stop_string_closes_the_engines_stream(serve, text_model: TextModel) -> None:
    backend = ScriptedBackend(encode(text_model, "hello world" * 10))
    async with serve(backend) as client:
        answer = (await client.post(URL, json=body(stop="world"))).json()
    assert backend.num_cancelled == 1
    assert answer["usage"]["completion_tokens"] == len(encode(text_model, "hello world", end=False))


async def test_a_text_held_back_for_a_stop_string_is_sent_at_the_end(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "hello wor"))) as client:
        answer = (await client.post(URL, json=body(stop="world"))).json()
    assert answer["choices"][0]["message"]["content"] == "hello wor"


async def test_an_unfinished_character_at_the_limit(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "世"))) as client:
        answer = (await client.post(URL, json=body(max_tokens=2))).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("\ufffd", "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(serve, text_model: TextModel, stream: bool) -> None:
    ids = encode(text_model, "fox 世")
    backend, seen = capture(ids)
    async with serve(backend) as client:
        response = await client.post(URL, json=body(logprobs=True, top_logprobs=2, stream=stream))
    assert seen[0].sampling.logprobs == 2
    if stream:
        choices = [chunk["choices"][0] for chunk in data_lines(response.text)]
        parts = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        entries = [entry for part in parts for entry in part]
    else:
        logprobs = response.json()["choices"][0]["logprobs"]
        assert logprobs["refusal"] is None
        entries = logprobs["content"]
    tokenizer = text_model.tokenizer
    assert [bytes(entry["bytes"]) for entry in entries] == [tokenizer.token_bytes(i) for i in ids]
    assert [entry["token"] for entry in entries] == [tokenizer.token_text(i) for i in ids]
    assert {entry["logprob"] for entry in entries} == {-0.5}
    assert all([top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5] for entry in entries)


async def test_logprobs_end_where_a_stop_string_cuts(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "hello fox dog"))) as client:
        answer = (await client.post(URL, json=body(logprobs=True, stop=" dog"))).json()
    tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens) == "hello fox"


async def test_omitted_fields_take_the_models_recommendations(serve, tmp_path) -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    text = TextModel.load(write_tiny_text_model(tmp_path, generation_config=config))
    backend, seen = capture(encode(text, "x"))
    async with serve(backend, text=text) as client:
        await client.post(URL, json=body())
        await client.post(
            URL,
            json=body(
                temperature=0,
                top_p=0.5,
                top_k=-1,
                min_p=0.1,
                repetition_penalty=1,
                presence_penalty=-1,
                frequency_penalty=2,
                logit_bias={"5": -100, "7": 1.5},
                seed=-1,
                stop_token_ids=[9],
                max_completion_tokens=7,
                ignore_eos=True,
            ),
        )
    prompt_tokens = len(seen[0].prompt_ids)
    assert seen[0].sampling == SamplingParams(
        max_tokens=256 - prompt_tokens,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.1,
        stop_token_ids=text.defaults.eos_token_ids,
    )
    assert seen[1].sampling == SamplingParams(
        max_tokens=7,
        temperature=0.0,
        top_p=0.5,
        min_p=0.1,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={5: -100.0, 7: 1.5},
        seed=2**63 - 1,
        stop_token_ids=(9,),
    )


async def test_harmless_fields_are_named_in_a_header(serve, text_model: TextModel) -> None:
    extra = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "verbosity": "low",
        "stream_options": {"include_obfuscation": False},
        "stream": True,
    }
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "audio": None}
    async with serve(ScriptedBackend(encode(text_model, "x"))) as client:
        response = await client.post(URL, json=body(**extra, **neutral))
        plain = await client.post(URL, json=body(**neutral))
    assert response.status_code == 200
    assert response.headers["x-localmoe-ignored"] == (
        "user, metadata, store, service_tier, verbosity, stream_options.include_obfuscation"
    )
    assert plain.status_code == 200
    assert "x-localmoe-ignored" not in plain.headers


async def test_text_parts_and_echoed_assistant_messages(serve, text_model: TextModel) -> None:
    backend, seen = capture(encode(text_model, "x"))
    echoed = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "annotations": [],
        "audio": None,
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "c", "prompt_cache_breakpoint": {}}]
    messages = [{"role": "user", "content": parts}, echoed, *HI]
    async with serve(backend) as client:
        response = await client.post(URL, json=body(messages=messages))
    assert response.status_code == 200
    assert response.headers["x-localmoe-ignored"] == "messages.content.prompt_cache_breakpoint"
    prompt = text_model.tokenizer.decode(seen[0].prompt_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>user\na\nc<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")


async def test_every_answer_is_published(serve, text_model: TextModel) -> None:
    events: list[Any] = []
    bus = EventBus()
    bus.subscribe(lambda event: events.append(event) if isinstance(event, RequestFinished) else None)
    ids = encode(text_model, "hello fox")
    async with serve(ScriptedBackend(ids), bus=bus) as client:
        await client.post(URL, json=body())
        await client.post(URL, json=body(max_tokens=1))
    stopped, limited = events
    assert isinstance(stopped, RequestFinished)
    assert (stopped.model, stopped.api, stopped.outcome) == ("tiny", "chat.completions", "stop")
    assert stopped.completion_tokens == len(ids)
    assert len(stopped.inter_token_s) == len(ids) - 1
    assert stopped.time_to_first_token_s is not None
    assert 0 < stopped.time_to_first_token_s <= stopped.e2e_s
    assert (limited.outcome, limited.completion_tokens, limited.inter_token_s) == ("length", 1, ())


async def test_a_large_conversation_leaves_the_event_loop_free(text_model: TextModel) -> None:
    import asyncio
    import time

    gaps: list[float] = []

    async def tick() -> None:
        while True:
            started_s = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - started_s)

    # Long enough that tokenizing it takes most of a second.
    messages = [{"role": "user", "content": "the quick brown fox " * 50_000}]
    # So long a context that only tokenizing tells that this does not fit.
    model = served_model(text_model, ScriptedBackend([9]), context_tokens=100_000)
    app = gateway_app(model)
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        ticker = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        started_s = time.monotonic()
        response = await client.post(URL, json=body(messages=messages))
        taken_s = time.monotonic() - started_s
        await asyncio.sleep(0.01)  # the ticker notes a gap when it ends
        ticker.cancel()
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert max(gaps) < taken_s / 2


@pytest.mark.parametrize("stop", ["world", None])
async def test_what_the_engine_says_first_counts_however_the_answer_ends(
    serve, text_model: TextModel, stop: str | None
) -> None:
    class Caching(ScriptedBackend):
        """Says what it found in its cache and how long it took; after the first chunk, the count again."""

        async def generate(self, request: Request):
            async for chunk in super().generate(request):
                if chunk.usage is not None:
                    times = {"cached_tokens": 16, "queue_s": 0.25, "prefill_s": 0.5}
                    chunk = msgspec.structs.replace(chunk, usage=msgspec.structs.replace(chunk.usage, **times))
                yield chunk

    finished: list[RequestFinished] = []
    bus = EventBus()
    bus.subscribe(lambda event: finished.append(event) if isinstance(event, RequestFinished) else None)
    async with serve(Caching(encode(text_model, "hello world, fox")), bus=bus) as client:
        whole = (await client.post(URL, json=body(stop=stop))).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = data_lines((await client.post(URL, json=body(stop=stop, **options))).text)
    for usage in (whole["usage"], stream[-1]["usage"]):
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    assert [(event.queue_s, event.prefill_s) for event in finished] == [(0.25, 0.5)] * 2


@pytest.mark.parametrize(("given", "used"), [(0, 0.0), (9.9e-6, 0.0), (1e-5, 1e-5), (0.7, 0.7), (None, 1.0)])
async def test_hardly_any_temperature_is_none(serve, given: float | None, used: float) -> None:
    backend, seen = capture([9])
    async with serve(backend) as client:
        await client.post(URL, json=body(temperature=given))
    assert seen[0].sampling.temperature == used


async def test_templates_are_rendered_off_the_event_loop(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    render = ChatTemplate.render

    def watched(template: ChatTemplate, messages: Any, **options: Any) -> str:
        threads.append(threading.get_ident())
        return render(template, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", watched)
    async with serve(ScriptedBackend([9])) as client:
        assert (await client.post(URL, json=body())).is_success
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
