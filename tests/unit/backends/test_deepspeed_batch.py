"""Which sequences run where, on its own: no model, every token is whatever the test says."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.deepspeed_worker.batch import Batch, Room
from localmoe.backends.deepspeed_worker.launch import Result, Step
from localmoe.core.errors import InvalidRequestError, OverloadedError
from localmoe.core.request import FinishReason, Request, RequestFailed, SamplingParams, TokenChunk, TokenLogprob

PAGE_TOKENS = 4


def make(num_ranks: int = 1, num_pages: int = 100, max_context_tokens: int = 64, **config: Any) -> Batch:
    room = Room(
        num_ranks=num_ranks,
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        vocab_size=1000,
        max_context_tokens=max_context_tokens,
    )
    return Batch("m", DeepSpeedConfig(**config), room)


def request(name: str, prompt: int | list[int], max_tokens: int = 4, **fields: Any) -> Request:
    prompt_ids = list(range(prompt)) if isinstance(prompt, int) else prompt
    sampling = SamplingParams(max_tokens=max_tokens, **fields.pop("sampling", {}))
    return Request(id=name, model="m", prompt_ids=prompt_ids, sampling=sampling, **fields)


def results(steps: list[Step], token: int = 7) -> list[Result]:
    """As if computed: every draw gives `token`, every score is that token's own id."""
    return [
        Result(
            sequence_id=work.sequence_id,
            token_id=token if work.samples else None,
            prompt_logprobs=[TokenLogprob(target, -float(target), []) for target in work.targets],
        )
        for step in steps
        for work in step.work
    ]


def run(batch: Batch) -> list[TokenChunk | RequestFailed]:
    return batch.update(results(batch.schedule()))


def finish(batch: Batch) -> dict[str, list[TokenChunk]]:
    chunks: dict[str, list[TokenChunk]] = {}
    while batch.has_work:
        for item in run(batch):
            assert isinstance(item, TokenChunk)
            chunks.setdefault(item.request_id, []).append(item)
    assert batch.state().kv_blocks_used == 0
    return chunks


def test_a_long_prompt_comes_in_chunks_and_holds_nobody_up() -> None:
    batch = make(max_num_batched_tokens=8)
    batch.add(request("short", 2, max_tokens=9))
    run(batch)
    batch.add(request("long", 20))
    for _ in range(2):
        [step] = batch.schedule()
        assert [len(work.token_ids) for work in step.work] == [1, 7]
        assert len(batch.update(results([step]))) == 1
    chunks = finish(batch)
    assert len(chunks["long"]) == 4
    assert len(chunks["short"]) == 9 - 3


def test_chunks_follow_one_another_and_only_the_last_one_draws() -> None:
    batch = make(max_num_batched_tokens=3)
    batch.add(request("a", 7, max_tokens=2))
    seen = []
    while batch.has_work:
        steps = batch.schedule()
        seen += [(work.start, work.token_ids, work.samples) for step in steps for work in step.work]
        batch.update(results(steps))
    assert seen == [(0, [0, 1, 2], False), (3, [3, 4, 5], False), (6, [6], True), (7, [7], True)]


def test_each_rank_has_sequences_of_its_own_and_all_compute_if_one_does() -> None:
    batch = make(num_ranks=2)
    for name in "abc":
        batch.add(request(name, 3, max_tokens=1 if name == "b" else 5))
    steps = batch.schedule()
    assert [len(step.work) for step in steps] == [2, 1]
    batch.update(results(steps))
    steps = batch.schedule()
    assert [len(step.work) for step in steps] == [2, 0]
    assert [step.forget for step in steps] == [[], [1]]
    assert all(step.computes for step in steps)


def test_who_leaves_is_forgotten_though_nothing_is_left_to_compute() -> None:
    batch = make()
    batch.add(request("a", 3, max_tokens=1))
    run(batch)
    assert batch.has_work
    [step] = batch.schedule()
    assert (step.forget, step.work, step.computes) == ([0], [], False)
    assert not batch.has_work


def test_the_youngest_gives_way_and_loses_nothing() -> None:
    batch = make(num_pages=4, max_context_tokens=16)
    for name in "ab":
        batch.add(request(name, 6, max_tokens=8))
    chunks = finish(batch)
    assert batch.state().num_preemptions > 0
    for name in "ab":
        assert sum(len(chunk.token_ids) for chunk in chunks[name]) == 8
        assert chunks[name][-1].finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_and_is_reported() -> None:
    batch = make()
    batch.add(request("a", 3, max_tokens=9, sampling={"stop_token_ids": (7,)}))
    [chunk] = run(batch)
    assert isinstance(chunk, TokenChunk)
    assert (chunk.token_ids, chunk.finish_reason) == ([7], FinishReason.STOP)


def test_prompts_are_scored_across_chunks_without_the_first_token() -> None:
    batch = make(max_num_batched_tokens=3)
    batch.add(request("a", [5, 6, 7, 8, 9], max_tokens=0, sampling={"prompt_logprobs": 0}))
    [chunk] = finish(batch)["a"]
    assert chunk.prompt_logprobs is not None
    assert [score.token_id for score in chunk.prompt_logprobs] == [6, 7, 8, 9]
    assert (chunk.token_ids, chunk.finish_reason) == ([], FinishReason.LENGTH)


def test_what_another_engine_generated_counts_as_output_and_is_not_sent_again() -> None:
    batch = make()
    sampling = {"presence_penalty": 1.0}
    batch.add(request("a", [1, 2], max_tokens=5, resumed_ids=[3, 4], sampling=sampling))
    [step] = batch.schedule()
    [work] = step.work
    assert (work.token_ids, work.prompt_ids, work.output_ids) == ([1, 2, 3, 4], [1, 2], [3, 4])
    first = batch.update(results([step]))
    chunks = [*first, *finish(batch)["a"]]
    assert [chunk.token_ids for chunk in chunks if isinstance(chunk, TokenChunk)] == [[7]] * 3
    last = chunks[-1]
    assert isinstance(last, TokenChunk)
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 5)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (request("a", []), "at least one"),
        (request("a", [1000]), "from 0 to 999"),
        (request("a", [-1]), "from 0 to 999"),
        (request("a", [1], resumed_ids=[1000]), "from 0 to 999"),
        (request("a", [1], sampling={"logit_bias": {1000: 1.0}}), "from 0 to 999"),
        (request("a", 60, max_tokens=5), "context of 64"),
        (request("a", [1], max_tokens=2, resumed_ids=[1, 2]), "generated already"),
        (request("a", [1], sampling={"logprobs": 2000}), "1000 tokens"),
    ],
)
def test_what_the_model_cannot_take_is_refused_at_the_door(bad: Request, complaint: str) -> None:
    batch = make()
    with pytest.raises(InvalidRequestError, match=complaint):
        batch.add(bad)
    assert not batch.has_work


def test_the_queue_has_an_end() -> None:
    batch = make(max_num_seqs=1, max_num_queued=1)
    batch.add(request("a", 1))
    run(batch)
    batch.add(request("b", 1))
    with pytest.raises(OverloadedError, match="1 requests"):
        batch.add(request("c", 1))


def test_a_step_that_fails_costs_its_own_requests_only() -> None:
    batch = make(max_num_seqs=1)
    batch.add(request("a", 2))
    batch.add(request("b", 2))
    items = batch.fail(batch.schedule(), "out of memory")
    assert [(item.request_id, getattr(item, "message", "")) for item in items] == [("a", "out of memory")]
    assert list(finish(batch)) == ["b"]


def test_cancelled_requests_are_gone_wherever_they_were() -> None:
    batch = make(max_num_seqs=1)
    batch.add(request("runs", 2))
    batch.add(request("waits", 2))
    run(batch)
    for name in ("runs", "waits", "unknown"):
        batch.cancel(name)
    assert finish(batch) == {}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_whatever_happens_all_are_served_and_no_token_is_computed_out_of_order(seed: int) -> None:
    chance = random.Random(seed)
    num_ranks = chance.randint(1, 3)
    batch = make(
        num_ranks=num_ranks,
        num_pages=chance.randint(8, 12),
        max_context_tokens=32,
        max_num_seqs=chance.randint(1, 6),
        max_num_batched_tokens=chance.randint(1, 12),
    )
    computed: list[dict[int, int]] = [{} for _ in range(num_ranks)]
    expected: dict[str, int] = {}
    counted: dict[str, int] = {}
    while batch.has_work or len(expected) < 8:
        if len(expected) < 8 and chance.random() < 0.5:
            name, max_tokens = str(len(expected)), chance.randint(1, 10)
            expected[name], counted[name] = max_tokens, 0
            batch.add(request(name, chance.randint(1, 20), max_tokens=max_tokens))
        if expected and chance.random() < 0.05:
            gone = chance.choice(list(expected))
            batch.cancel(gone)
            expected[gone] = counted[gone] if counted[gone] < expected[gone] else expected[gone]
        steps = batch.schedule()
        for step, known in zip(steps, computed, strict=True):
            for sequence_id in step.forget:
                known.pop(sequence_id, None)
            for work in step.work:
                assert work.start == known.get(work.sequence_id, 0)
                known[work.sequence_id] = work.start + len(work.token_ids)
            assert sum(-(-tokens // PAGE_TOKENS) for tokens in known.values()) <= 12
        for item in batch.update(results(steps)):
            assert isinstance(item, TokenChunk)
            counted[item.request_id] += len(item.token_ids)
    assert counted == expected
    assert batch.state().kv_blocks_used == 0
