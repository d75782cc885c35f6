"""Scheduling policy on its own: no model, every token is whatever the test says."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.core.errors import OverloadedError
from localmoe.core.plans import BatchPlan, SequenceStep, StepResult
from localmoe.core.request import FinishReason, Request, RequestFailed, SamplingParams, TokenChunk, TokenLogprob
from localmoe.engine.block_pool import BlockPool
from localmoe.engine.config import EngineConfig
from localmoe.engine.scheduler import Scheduler
from localmoe.engine.speculation import SpeculationController, agreed
from support.speculation import Eager


def make(num_blocks: int = 100, **config: Any) -> tuple[Scheduler, BlockPool]:
    """Without measurements, which nothing here gives to the controller, it never drafts."""
    pool = BlockPool(num_blocks)
    return Scheduler(EngineConfig(block_tokens=16, **config), pool, SpeculationController()), pool


def make_eager(num_blocks: int = 100, **config: Any) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    return Scheduler(EngineConfig(block_tokens=16, **config), pool, Eager()), pool


def request(name: str, prompt: int | list[int], max_tokens: int = 4, **sampling: Any) -> Request:
    prompt_ids = list(range(prompt)) if isinstance(prompt, int) else prompt
    return Request(
        id=name, model="m", prompt_ids=prompt_ids, sampling=SamplingParams(max_tokens=max_tokens, **sampling)
    )


def run(scheduler: Scheduler, plan: BatchPlan, token: int = 7) -> list[TokenChunk | RequestFailed]:
    """Pretend to compute a plan; every draw gives `token`."""
    return scheduler.update(
        plan,
        {
            s.sequence_id: StepResult(
                token_ids=agreed(s.draft_ids, [token] * (s.num_drafts + 1)) if s.samples else ()
            )
            for s in plan.sequences
        },
    )


def finish_all(scheduler: Scheduler) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while (plan := scheduler.schedule()) is not None:
        for chunk in run(scheduler, plan):
            assert isinstance(chunk, TokenChunk)
            tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
    assert not scheduler.has_work
    return tokens


def test_a_request_prefills_decodes_and_frees_its_blocks() -> None:
    scheduler, pool = make()
    scheduler.add(request("a", 6, max_tokens=3))
    plan = scheduler.schedule()
    assert plan is not None
    [step] = plan.sequences
    assert (step.token_ids, step.start, step.samples) == ((0, 1, 2, 3, 4, 5), 0, True)
    [first] = run(scheduler, plan)
    assert isinstance(first, TokenChunk)
    assert (first.token_ids, first.finish_reason) == ([7], None)
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.sequences[0].token_ids, plan.sequences[0].start) == ((7,), 6)
    run(scheduler, plan)
    plan = scheduler.schedule()
    assert plan is not None
    [last] = run(scheduler, plan)
    assert isinstance(last, TokenChunk)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 3)
    assert pool.num_free == pool.num_blocks


def test_stop_tokens_end_a_sequence() -> None:
    scheduler, _ = make()
    scheduler.add(request("a", 3, stop_token_ids=(9,)))
    plan = scheduler.schedule()
    assert plan is not None
    [chunk] = run(scheduler, plan, token=9)
    assert isinstance(chunk, TokenChunk)
    assert (chunk.token_ids, chunk.finish_reason) == ([9], FinishReason.STOP)


def test_a_long_prompt_is_chunked_and_never_holds_up_decoding() -> None:
    scheduler, _ = make(max_num_batched_tokens=8)
    scheduler.add(request("short", 2, max_tokens=20))
    plan = scheduler.schedule()
    assert plan is not None
    run(scheduler, plan)
    scheduler.add(request("long", 20))
    chunks = []
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        assert plan.num_tokens <= 8
        assert len(plan.sequences[0].token_ids) == 1, "the decoding sequence runs in every step"
        chunks.append(len(plan.sequences[1].token_ids))
        run(scheduler, plan)
    assert chunks == [7, 7, 6]


def test_equal_prefixes_are_computed_once() -> None:
    scheduler, pool = make()
    scheduler.add(request("a", 40))
    finish_all(scheduler)
    scheduler.add(request("b", 40))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.sequences[0].start == 32
    finish_all_after = run(scheduler, plan)
    assert finish_all_after
    finish_all(scheduler)
    assert scheduler.prefix_hits_tokens == 32
    assert pool.num_free == pool.num_blocks


def test_prompts_of_others_are_not_found() -> None:
    scheduler, _ = make()
    for name, scope, hits in (("a", "ann", 0), ("b", "bob", 0), ("c", "", 0), ("d", "ann", 32)):
        scheduler.add(msgspec.structs.replace(request(name, 40), cache_scope=scope))
        before = scheduler.prefix_hits_tokens
        finish_all(scheduler)
        assert scheduler.prefix_hits_tokens - before == hits


def test_a_fully_known_prompt_still_computes_its_last_token() -> None:
    scheduler, _ = make()
    scheduler.add(request("a", 32, max_tokens=1))
    finish_all(scheduler)
    scheduler.add(request("b", 32, max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.sequences[0].start, len(plan.sequences[0].token_ids)) == (16, 16)


def test_prefix_caching_can_be_switched_off() -> None:
    scheduler, _ = make(prefix_caching=False)
    for name in "ab":
        scheduler.add(request(name, 40))
        finish_all(scheduler)
    assert scheduler.prefix_hits_tokens == 0


def test_scoring_a_prompt_computes_all_of_it_and_reports_once() -> None:
    scheduler, _ = make(max_num_batched_tokens=16)
    scheduler.add(request("warm", 40))
    finish_all(scheduler)
    scheduler.add(request("a", 40, max_tokens=0, prompt_logprobs=0))
    scores: list[TokenLogprob] = []
    while (plan := scheduler.schedule()) is not None:
        [step] = plan.sequences
        assert step.scores_prompt
        assert not step.samples
        here = [
            TokenLogprob(t, -1.0, []) for t in range(step.start + 1, min(step.start + len(step.token_ids), 39) + 1)
        ]
        out = scheduler.update(plan, {step.sequence_id: StepResult(prompt_logprobs=tuple(here))})
        for chunk in out:
            assert isinstance(chunk, TokenChunk)
            assert chunk.finish_reason is FinishReason.LENGTH
            scores = chunk.prompt_logprobs or []
    assert [score.token_id for score in scores] == list(range(1, 40))


def test_when_blocks_run_out_the_youngest_is_recomputed_later() -> None:
    scheduler, pool = make(num_blocks=5, prefix_caching=False)
    scheduler.add(request("old", [1] * 24, max_tokens=48))
    scheduler.add(request("young", [2] * 24, max_tokens=48))
    tokens = finish_all(scheduler)
    assert scheduler.num_preemptions > 0
    assert tokens == {"old": [7] * 48, "young": [7] * 48}
    assert pool.num_free == pool.num_blocks


def test_a_full_queue_refuses() -> None:
    scheduler, _ = make(max_num_queued=1)
    scheduler.add(request("a", 3))
    with pytest.raises(OverloadedError, match="1 requests"):
        scheduler.add(request("b", 3))


def test_a_failed_step_costs_its_own_requests_only() -> None:
    scheduler, pool = make(max_num_seqs=1)
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 3))
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.fail(plan, "out of memory") == [RequestFailed(request_id="a", message="out of memory")]
    assert list(finish_all(scheduler)) == ["b"]
    assert pool.num_free == pool.num_blocks


def test_cancelling_frees_blocks_wherever_the_request_is() -> None:
    scheduler, pool = make(max_num_seqs=1)
    scheduler.add(request("running", 9))
    scheduler.add(request("waiting", 9))
    plan = scheduler.schedule()
    assert plan is not None
    run(scheduler, plan)
    scheduler.cancel("waiting")
    scheduler.cancel("running")
    scheduler.cancel("never heard of")
    assert not scheduler.has_work
    assert pool.num_free == pool.num_blocks


REPETITIVE = [1, 2, 3] * 4


def decode_step(scheduler: Scheduler, token: int = 1) -> tuple[SequenceStep, ...]:
    """Prefill, and return the sequences of the step after it."""
    plan = scheduler.schedule()
    assert plan is not None
    run(scheduler, plan, token)
    plan = scheduler.schedule()
    assert plan is not None
    return plan.sequences


def test_a_step_carries_a_draft_and_only_what_agrees_with_it_is_known() -> None:
    scheduler, _ = make_eager()
    scheduler.add(request("a", REPETITIVE, max_tokens=20))
    [step] = decode_step(scheduler)
    assert (step.token_ids[:4], step.num_drafts, step.start) == ((1, 2, 3, 1), 8, 12)
    assert len(step.block_table) * 16 >= 12 + 9
    result = StepResult(token_ids=(2, 3, 7))
    [chunk] = scheduler.update(BatchPlan(sequences=(step,)), {step.sequence_id: result})
    assert isinstance(chunk, TokenChunk)
    assert chunk.token_ids == [2, 3, 7]
    assert (scheduler.num_draft_tokens, scheduler.num_accepted_tokens) == (8, 2)
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.sequences[0].token_ids, plan.sequences[0].start) == ((7,), 15)


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(2, 0), (3, 1), (6, 4)])
def test_no_draft_beyond_the_last_token(max_tokens: int, num_drafts: int) -> None:
    scheduler, _ = make_eager()
    scheduler.add(request("a", REPETITIVE, max_tokens=max_tokens))
    assert decode_step(scheduler)[0].num_drafts == num_drafts


def test_a_draft_ends_before_a_stop_token() -> None:
    scheduler, _ = make_eager()
    scheduler.add(request("a", REPETITIVE, max_tokens=20, stop_token_ids=(3,)))
    assert decode_step(scheduler)[0].draft_ids == (2,)


def test_drafts_count_against_the_budget() -> None:
    scheduler, _ = make_eager(max_num_batched_tokens=13)
    for name in "ab":
        scheduler.add(request(name, REPETITIVE[:6], max_tokens=20))
    assert [step.num_drafts for step in decode_step(scheduler)] == [8, 3]


def test_a_step_that_also_computes_a_prompt_has_no_drafts() -> None:
    scheduler, _ = make_eager()
    scheduler.add(request("a", REPETITIVE, max_tokens=20))
    plan = scheduler.schedule()
    assert plan is not None
    run(scheduler, plan, 1)
    scheduler.add(request("b", REPETITIVE, max_tokens=20))
    plan = scheduler.schedule()
    assert plan is not None
    assert [step.num_drafts for step in plan.sequences] == [0, 0]


def test_speculation_can_be_switched_off() -> None:
    scheduler, _ = make_eager(speculation=False)
    scheduler.add(request("a", REPETITIVE, max_tokens=20))
    assert decode_step(scheduler)[0].num_drafts == 0


def test_drafts_take_no_block_that_another_needs_next() -> None:
    scheduler, pool = make_eager(num_blocks=4, prefix_caching=False)
    for name in "ab":
        scheduler.add(request(name, REPETITIVE, max_tokens=20))
    assert [step.num_drafts for step in decode_step(scheduler)] == [3, 3], "what fits into the blocks they have"
    assert pool.num_free == 2
    assert scheduler.num_preemptions == 0


def test_a_draft_without_any_result_is_the_last() -> None:
    scheduler, pool = make_eager()
    scheduler.add(request("a", REPETITIVE, max_tokens=20))
    [step] = decode_step(scheduler)
    assert step.num_drafts > 0
    assert scheduler.update(BatchPlan(sequences=(step,)), {step.sequence_id: StepResult()}) == []
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.sequences[0].token_ids, plan.sequences[0].start) == ((1,), 12)
    assert isinstance(run(scheduler, plan)[0], TokenChunk)
    assert len(finish_all(scheduler)["a"]) == 18
    assert pool.num_free == pool.num_blocks


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(6, 30), st.booleans(), st.booleans())
def test_random_traffic_loses_nothing(seed: int, num_blocks: int, prefix_caching: bool, drafts: bool) -> None:
    """Whatever arrives, is cancelled or fails: every other request gets all its tokens, every block comes back."""
    rng = random.Random(seed)
    scheduler, pool = (make_eager if drafts else make)(
        num_blocks=num_blocks,
        prefix_caching=prefix_caching,
        max_num_batched_tokens=rng.randint(1, 48),
        max_num_seqs=4,
    )
    wanted, got, gone = {}, {}, set()
    for i in range(12):
        length, max_tokens = rng.randint(1, 48), rng.randint(1, 40)
        name = f"r{i}"
        wanted[name] = max_tokens
        got[name] = 0
        prompt = [rng.randint(0, 1)] * length  # runs, so that many begin with equal blocks
        scheduler.add(request(name, prompt, max_tokens=max_tokens))
        for _ in range(rng.randint(0, 6)):
            plan = scheduler.schedule()
            if plan is None:
                break
            assert plan.num_tokens <= 48
            outputs = (
                scheduler.fail(plan, "boom") if rng.random() < 0.03 else run(scheduler, plan, rng.randint(0, 1))
            )
            for output in outputs:
                if isinstance(output, RequestFailed):
                    gone.add(output.request_id)
                else:
                    got[output.request_id] += len(output.token_ids)
        if rng.random() < 0.2:
            victim = f"r{rng.randint(0, i)}"
            gone.add(victim)
            scheduler.cancel(victim)
    for name, tokens in finish_all(scheduler).items():
        got[name] += len(tokens)
    assert all(got[name] == wanted[name] for name in wanted if name not in gone)
    assert pool.num_free == pool.num_blocks
