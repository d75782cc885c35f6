"""vLLM's client against a server that speaks as vLLM does, and against one that misbehaves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from localmoe.backends.vllm_answers import Metrics
from localmoe.backends.vllm_client import VllmClient
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    InvalidRequestError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.request import FinishReason, Request, SamplingParams, TokenChunk
from support.fake_vllm import METRICS, VOCAB_SIZE, FakeVllm, fake_vllm, piece, refuses, says


@pytest.fixture
async def fake() -> AsyncIterator[FakeVllm]:
    async with fake_vllm() as server:
        yield server


@pytest.fixture
async def client(fake: FakeVllm) -> AsyncIterator[VllmClient]:
    made = VllmClient(url=fake.url, vocab_size=VOCAB_SIZE)
    yield made
    await made.close()


def request(max_tokens: int = 3, resumed_ids: list[int] | None = None, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **sampling})
    return Request(id="a", model="m", prompt_ids=[5, 6, 7], resumed_ids=resumed_ids or [], sampling=params)


async def chunks_of(client: VllmClient, asked: Request) -> list[TokenChunk]:
    async with asyncio.timeout(10):
        return [chunk async for chunk in client.generate(asked, "m")]


async def test_tokens_go_in_and_come_out_with_usage_at_the_end(client: VllmClient) -> None:
    chunks = await chunks_of(client, request())
    assert [chunk.token_ids for chunk in chunks] == [[7], [8], [9]]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.LENGTH]
    assert [chunk.usage is not None for chunk in chunks] == [False, False, True]
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 3)
    assert chunks[-1].usage.cached_tokens == 2
    assert {chunk.request_id for chunk in chunks} == {"a"}


async def test_a_piece_may_hold_several_tokens_and_blank_ones_are_left_out(
    client: VllmClient, fake: FakeVllm
) -> None:
    fake.answer = says(piece([1, 2]), piece([]), piece([3], "stop"))
    chunks = await chunks_of(client, request())
    assert [chunk.token_ids for chunk in chunks] == [[1, 2], [3]]
    assert chunks[-1].finish_reason is FinishReason.STOP


async def test_a_request_in_vllms_words(client: VllmClient, fake: FakeVllm) -> None:
    await chunks_of(
        client,
        request(
            4, temperature=0.5, top_k=0, min_p=0.1, seed=-1, logit_bias={4: 1.5}, stop_token_ids=(2,), top_p=0.9
        ),
    )
    asked = fake.questions[0]
    assert asked["prompt"] == [5, 6, 7]
    assert (asked["max_tokens"], asked["top_k"], asked["min_p"], asked["top_p"]) == (4, 0, 0.1, 0.9)
    assert asked["logit_bias"] == {"4": 1.5}
    assert (asked["stop_token_ids"], asked["ignore_eos"]) == ([2], True)
    # To vLLM -1 is no seed.
    assert asked["seed"] == 2**63 - 1


async def test_an_answer_goes_on_after_what_was_generated_before(client: VllmClient, fake: FakeVllm) -> None:
    chunks = await chunks_of(client, request(5, resumed_ids=[50, 51], temperature=1.0, seed=3))
    assert [token for chunk in chunks for token in chunk.token_ids] == [51, 52, 53]
    assert fake.questions[0]["prompt"] == [5, 6, 7, 50, 51]
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 5)
    await chunks_of(client, request(5, temperature=1.0, seed=3))
    assert fake.questions[0]["seed"] != fake.questions[1]["seed"] == 3
    with pytest.raises(InvalidRequestError, match="2 tokens were generated already, of at most 2"):
        await chunks_of(client, request(2, resumed_ids=[50, 51]))


async def test_log_probabilities_by_token_id(client: VllmClient, fake: FakeVllm) -> None:
    # The likeliest first, and the token itself only where it is one of them.
    logprobs = {
        "tokens": ["token_id:9"],
        "token_logprobs": [-3.0],
        "top_logprobs": [{"token_id:9": -3.0, "token_id:4": -0.5, "token_id:8": -1.0}],
    }
    fake.answer = says(piece([9], "length", logprobs=logprobs))
    (chunk,) = await chunks_of(client, request(1, logprobs=2))
    (found,) = chunk.logprobs
    assert (found.token_id, found.logprob, found.top) == (9, -3.0, [(4, -0.5), (8, -1.0)])
    assert fake.questions[0]["return_tokens_as_token_ids"] is True


async def test_log_probabilities_of_the_prompt_come_with_a_whole_answer(
    client: VllmClient, fake: FakeVllm
) -> None:
    prompt = [None, {"6": {"logprob": -2.0}, "1": {"logprob": -0.1}}, {"7": {"logprob": -0.3}}]
    body = {**piece([9, 10], "length", prompt_logprobs=prompt), "usage": {"prompt_tokens": 3}}
    fake.answer = refuses(200, body)
    (chunk,) = await chunks_of(client, request(2, prompt_logprobs=1))
    assert fake.questions[0]["stream"] is False
    assert chunk.token_ids == [9, 10]
    assert chunk.prompt_logprobs is not None
    assert [(it.token_id, it.logprob, it.top) for it in chunk.prompt_logprobs] == [
        (6, -2.0, [(1, -0.1)]),
        (7, -0.3, [(7, -0.3)]),
    ]


async def test_only_scoring_asks_for_a_token_and_drops_it(client: VllmClient, fake: FakeVllm) -> None:
    (chunk,) = await chunks_of(client, request(0))
    assert fake.questions[0]["max_tokens"] == 1
    assert (chunk.token_ids, chunk.finish_reason) == ([], FinishReason.LENGTH)
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 0


async def test_closing_an_answer_leaves_the_server(client: VllmClient, fake: FakeVllm) -> None:
    async def slow(asked: Any, body: dict[str, Any]) -> Any:
        response = await says(piece([1]), done=False)(asked, body)
        await asyncio.sleep(60)
        return response

    fake.answer = slow
    async with aclosing(client.generate(request(), "m")) as chunks:
        await anext(chunks)
        assert client.hang_clock.silent_s > 0.0
    assert client.hang_clock.silent_s == 0.0
    async with asyncio.timeout(5):
        while fake.num_left == 0:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def test_those_who_wait_hear_at_once_that_the_server_is_gone(client: VllmClient, fake: FakeVllm) -> None:
    fake.answers_at_all = False
    waiting = [asyncio.create_task(chunks_of(client, request())) for _ in range(3)]
    while len(fake.questions) < 3:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.01)
    client.fail("it hangs")
    for task in waiting:
        with pytest.raises(EngineDiedError, match="it hangs"):
            await asyncio.wait_for(task, 1)
    with pytest.raises(EngineDiedError, match="it hangs"):
        await chunks_of(client, request())


def error_in_stream(code: object) -> Any:
    return says(piece([1]), {"error": {"message": "said why", "type": "x", "param": None, "code": code}})


@pytest.mark.parametrize(
    ("answer", "kind", "says_"),
    [
        (refuses(400, {"error": {"message": "said why", "code": 400}}), InvalidRequestError, "said why"),
        (refuses(422, {"detail": "no"}), InvalidRequestError, "detail"),
        (refuses(404, {"error": {"message": "no such model"}}), BackendUnavailableError, "no such model"),
        (refuses(401, {"error": "Unauthorized"}), BackendUnavailableError, "Unauthorized"),
        (refuses(429, {"error": {"message": "busy"}}), OverloadedError, "busy"),
        (refuses(503, {"error": {"message": "busy"}}), OverloadedError, "busy"),
        (refuses(500, {"error": {"message": "broke"}}), EngineFaultError, "broke"),
        (error_in_stream(400), InvalidRequestError, "said why"),
        (error_in_stream(503), OverloadedError, "said why"),
        (error_in_stream(500), EngineFaultError, "said why"),
        (error_in_stream("strange"), EngineFaultError, "said why"),
        (says("not JSON"), EngineFaultError, "sent what is no answer"),
        (says('{"choices": 5}'), EngineFaultError, "sent what is no answer"),
        (says(piece(None)), EngineFaultError, "no token ids"),
        (says(piece([VOCAB_SIZE])), EngineFaultError, "does not have"),
        (says(piece([-1])), EngineFaultError, "does not have"),
        (says(piece([1])), EngineFaultError, "without a finish reason"),
        (says(), EngineFaultError, "without a finish reason"),
        (says(piece([1]), done=False), EngineFaultError, "without a finish reason"),
        (says(piece([1, 2, 3, 4], "length")), EngineFaultError, "more than the 3 tokens"),
        (says(piece([1], "stop"), piece([2], "stop")), EngineFaultError, "more than one answer"),
        (says(piece([1], "repetition")), EngineFaultError, "'repetition'"),
        (says(piece([1], "abort")), EngineDiedError, "gave the answer up"),
        (says(piece([1]), then_drop=True), EngineDiedError, "cannot be reached"),
        (says("x" * (1 << 22)), EngineFaultError, "cannot be understood"),
    ],
)
async def test_errors_and_garbage(
    client: VllmClient, fake: FakeVllm, answer: Any, kind: type[LocalMoEError], says_: str
) -> None:
    fake.answer = answer
    with pytest.raises(LocalMoEError, match=says_) as caught:
        await chunks_of(client, request())
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("logprobs", "says_"),
    [
        (None, "other log-probabilities"),
        ({"tokens": [], "token_logprobs": [], "top_logprobs": []}, "other log-probabilities"),
        ({"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"a": -1}]}, "where a token id was asked for"),
        ({"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None]}, "without its log-probability"),
    ],
)
async def test_garbage_for_log_probabilities(
    client: VllmClient, fake: FakeVllm, logprobs: object, says_: str
) -> None:
    fake.answer = says(piece([1], "length", logprobs=logprobs))
    with pytest.raises(EngineFaultError, match=says_):
        await chunks_of(client, request(logprobs=1))


async def test_an_error_of_a_server_that_is_not_well_is_its_death(client: VllmClient, fake: FakeVllm) -> None:
    fake.is_healthy = False
    for answer in (refuses(500, {"error": {"message": "dead"}}), refuses(503, {}), error_in_stream(500)):
        fake.answer = answer
        with pytest.raises(EngineDiedError):
            await chunks_of(client, request())


async def test_a_full_server_may_say_when_to_come_again(client: VllmClient, fake: FakeVllm) -> None:
    fake.answer = refuses(429, {"error": {"message": "busy"}}, {"Retry-After": "7"})
    with pytest.raises(OverloadedError) as caught:
        await chunks_of(client, request())
    assert caught.value.retry_after_s == 7


async def test_where_no_server_is_none_had_the_request() -> None:
    client = VllmClient(url="http://127.0.0.1:9", vocab_size=VOCAB_SIZE)
    try:
        with pytest.raises(BackendUnavailableError, match="cannot be reached") as failure:
            await chunks_of(client, request())
        assert not isinstance(failure.value, EngineDiedError)
        assert not await client.is_healthy()
        with pytest.raises(BackendUnavailableError, match="does not answer"):
            await client.metrics()
    finally:
        await client.close()


async def test_the_model_is_the_one_of_this_name_or_the_only_one(client: VllmClient, fake: FakeVllm) -> None:
    assert (await client.model("m")).max_context_tokens == 64
    assert (await client.model("ours")).name == "m"
    assert await client.tokenize("m", "hi") == [1, 2]


def test_metrics_in_our_words() -> None:
    state = Metrics(METRICS.replace("STEPS", "9")).state("m", "vllm")
    assert (state.num_running, state.num_waiting) == (4, 2)  # of both engines of the server
    assert (state.kv_blocks_used, state.kv_blocks_total) == (10, 40)
    assert (state.prefix_cache_queries, state.prefix_cache_hits) == (1200, 400)
    assert state.num_preemptions == 5
    assert Metrics(METRICS.replace("STEPS", "9")).num_steps == 9
    assert Metrics("garbage").state("m", "vllm").num_running == 0


async def test_a_server_with_a_key_gets_it(fake: FakeVllm) -> None:
    client = VllmClient(url=fake.url, vocab_size=VOCAB_SIZE, api_key="k3y")
    try:
        await chunks_of(client, request())
    finally:
        await client.close()
    assert fake.headers["Authorization"] == "Bearer k3y"
