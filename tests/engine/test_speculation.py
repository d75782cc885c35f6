"""Speculative decoding: it changes no token, it frees what it took, and it is on when it pays."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.plans import BatchPlan, SequenceStep
from localmoe.core.request import FinishReason, Request, SamplingParams, TokenChunk, TokenLogprob
from localmoe.engine.config import EngineConfig
from localmoe.engine.engine import Engine
from localmoe.engine.load import load_decoder
from localmoe.engine.speculation import MAX_DRAFT_TOKENS, PromptLookup, SpeculationController, agreed
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from support.models import greedy, kernels_under_test, make_engine, run
from support.speculation import Eager, Foreteller

OFF = EngineConfig(speculation=False)
WRONG_ID = 3


@pytest.fixture
def decoder(tiny_home: Path) -> Decoder:
    with Store.open(tiny_home / "models/distinct-experts/stores/f32.store") as store:
        return load_decoder(store, kernels_under_test())


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.engine.engine.SpeculationController", Eager)


class Answer:
    """All that a request got."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.finish_reason: FinishReason | None = None
        self.num_chunks = 0


def answers(engine: Engine, requests: list[Request]) -> dict[str, Answer]:
    found = {request.id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for chunk in engine.step():
            assert isinstance(chunk, TokenChunk), chunk
            answer = found[chunk.request_id]
            assert answer.finish_reason is None, "nothing comes after the last chunk"
            answer.num_chunks += 1
            answer.token_ids += chunk.token_ids
            answer.logprobs += chunk.logprobs
            answer.prompt_logprobs = answer.prompt_logprobs or chunk.prompt_logprobs
            answer.finish_reason = chunk.finish_reason
            if chunk.usage is not None:
                assert chunk.usage.completion_tokens == len(answer.token_ids)
    return found


def sampled(name: str, first_id: int, max_tokens: int = 16, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(id=name, model="test", prompt_ids=[first_id, 6, 7, 8, 9, 6, 7, 8], sampling=sampling)


def every_kind(decoder: Decoder) -> list[Request]:
    """Requests that use all that decides a token or ends a sequence."""
    stopped = run(make_engine(decoder, OFF), [greedy("x", [15, 6, 7, 8, 9, 6, 7, 8])])["x"][6]
    return [
        sampled("greedy", 10, temperature=0.0),
        sampled("sampled", 11, seed=1),
        sampled("filtered", 12, seed=2, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
        sampled("penalised", 13, seed=3, repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.4),
        sampled("biased", 14, temperature=0.0, logit_bias={5: 3.0, 9: -50.0}, frequency_penalty=0.7),
        sampled("stopped", 15, temperature=0.0, stop_token_ids=(stopped,)),
        sampled("short", 16, 5, temperature=0.0),
        sampled("one", 17, 1, temperature=0.0),
        sampled("scored", 18, temperature=0.0, logprobs=3, prompt_logprobs=2, repetition_penalty=1.2),
    ]


def assert_same(found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    for name, answer in expected.items():
        assert found[name].token_ids == answer.token_ids, name
        assert found[name].finish_reason == answer.finish_reason, name
        for ours, theirs in (
            (found[name].logprobs, answer.logprobs),
            (found[name].prompt_logprobs or [], answer.prompt_logprobs or []),
        ):
            assert [score.token_id for score in ours] == [score.token_id for score in theirs], name
            assert [score.logprob for score in ours] == pytest.approx([s.logprob for s in theirs], abs=1e-4)
            assert [[i for i, _ in score.top] for score in ours] == [[i for i, _ in s.top] for s in theirs]


def foretell(
    monkeypatch: pytest.MonkeyPatch, requests: list[Request], expected: dict[str, Answer], num_right: int
) -> None:
    sequences = [request.prompt_ids + expected[request.id].token_ids for request in requests]
    monkeypatch.setattr(
        "localmoe.engine.scheduler.PromptLookup", lambda: Foreteller(sequences, num_right, WRONG_ID)
    )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("num_right", [0, 2, MAX_DRAFT_TOKENS])
def test_drafts_change_nothing_however_right_they_are(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, num_right: int
) -> None:
    requests = every_kind(decoder)
    expected = answers(make_engine(decoder, OFF), requests)
    assert expected["stopped"].finish_reason is FinishReason.STOP
    foretell(monkeypatch, requests, expected, num_right)
    engine = make_engine(decoder, EngineConfig(max_num_batched_tokens=24))
    assert_same(answers(engine, requests), expected)
    state = engine.state()
    assert state.kv_blocks_used == 0
    assert state.num_draft_tokens > state.num_accepted_tokens or num_right == MAX_DRAFT_TOKENS
    assert (state.num_accepted_tokens > 0) == (num_right > 0)
    # One at a time, nothing but the request's own end limits its drafts.
    alone = answers(make_engine(decoder, EngineConfig()), requests[:1])["greedy"]
    assert alone.num_chunks == 1 + -(-(len(alone.token_ids) - 1) // (num_right + 1))


@pytest.mark.usefixtures("eager")
def test_prompt_lookup_finds_what_repeats(decoder: Decoder) -> None:
    few = {5: 60.0, 6: 60.0, 7: 60.0}  # an output of so few different tokens repeats itself
    requests = [*every_kind(decoder), sampled("repetitive", 19, 60, seed=4, temperature=5.0, logit_bias=few)]
    expected = answers(make_engine(decoder, OFF), requests)
    assert set(expected["repetitive"].token_ids) == set(few)
    engine = make_engine(decoder, EngineConfig())
    assert_same(answers(engine, requests), expected)
    assert 0 < engine.state().num_accepted_tokens < engine.state().num_draft_tokens


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("num_right", [0, 2])
def test_rejected_tokens_never_reach_the_prefix_cache(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, num_right: int
) -> None:
    requests = [sampled("a", 10, 60, temperature=0.0)]
    expected = answers(make_engine(decoder, OFF), requests)
    foretell(monkeypatch, requests, expected, num_right)
    engine = make_engine(decoder, EngineConfig())
    assert_same(answers(engine, requests), expected)
    whole = requests[0].prompt_ids + expected["a"].token_ids
    follow_up = [greedy(f"after {end}", whole[:end], 12) for end in (len(whole), len(whole) - 20)]
    hits_before = engine.state().prefix_cache_hits
    assert run(engine, follow_up) == run(make_engine(decoder, OFF), follow_up)
    assert engine.state().prefix_cache_hits - hits_before == 64 + 32, "every full block was shared"


@pytest.mark.usefixtures("eager")
def test_preempted_sequences_go_on_alike(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [sampled(f"r{i}", 10 + i, 40, seed=i, repetition_penalty=1.1) for i in range(6)]
    expected = answers(make_engine(decoder, OFF), requests)
    foretell(monkeypatch, requests, expected, 2)
    engine = make_engine(decoder, EngineConfig(prefix_caching=False), num_blocks=10)
    assert_same(answers(engine, requests), expected)
    assert engine.state().num_preemptions > 0
    assert engine.state().num_accepted_tokens > 0
    assert engine.state().kv_blocks_used == 0


@pytest.mark.usefixtures("eager")
def test_a_draft_that_cannot_be_computed_costs_itself_only(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [sampled("a", 10, temperature=0.0), sampled("b", 11, seed=1)]
    expected = answers(make_engine(decoder, OFF), requests)
    assert all(WRONG_ID not in answer.token_ids for answer in expected.values())
    foretell(monkeypatch, requests, expected, 1)
    embedding = decoder.embedding
    decoder.embedding = lambda ids_T: embedding(ids_T).masked_fill((ids_T == WRONG_ID)[:, None], float("nan"))
    engine = make_engine(decoder, EngineConfig())
    assert_same(answers(engine, requests), expected)
    assert engine.state().kv_blocks_used == 0


class Clock:
    """Stands in for the module `time`."""

    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("token_cost_s", "pays"), [(0.05, True), (1.0, False)])
def test_the_engine_drafts_when_its_own_clock_says_that_it_pays(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, token_cost_s: float, pays: bool
) -> None:
    """Half of each draft is right; a step takes a second and `token_cost_s` for each token beyond the first."""
    requests = [sampled("a", 10, 120, temperature=0.0)]
    expected = answers(make_engine(decoder, OFF), requests)
    foretell(monkeypatch, requests, expected, 4)
    clock = Clock()
    monkeypatch.setattr("localmoe.engine.engine.time", clock)
    forward = decoder.forward

    def timed(token_ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        clock.now_s += 1.0 + token_cost_s * (len(token_ids_T) - 1)
        return forward(token_ids_T, *rest)

    monkeypatch.setattr(decoder, "forward", timed)
    engine = make_engine(decoder, EngineConfig())
    assert_same(answers(engine, requests), expected)
    if pays:
        assert engine.state().num_accepted_tokens > 80
        assert clock.now_s < 50
    else:
        assert 0 < engine.state().num_draft_tokens < 40, "a few attempts"
        assert clock.now_s < 160


def plan(num_seqs: int, num_drafts: int, known_tokens: int = 1) -> BatchPlan:
    step = {"start": 0, "block_table": (0,), "samples": True, "seed": 0, "scores_prompt": False}
    sampling = SamplingParams(max_tokens=1)
    return BatchPlan(
        sequences=tuple(
            SequenceStep(
                sequence_id=i,
                token_ids=(0,) * (known_tokens + (num_drafts if i == 0 else 0)),
                num_drafts=num_drafts if i == 0 else 0,
                sampling=sampling,
                history=([0], []),
                **step,  # type: ignore[arg-type]
            )
            for i in range(num_seqs)
        )
    )


def settle(
    controller: SpeculationController,
    proposals: list[tuple[float, int]],
    cost_s: Callable[[int], float],
    steps: int,
) -> list[int]:
    """Number of drafts in each of these steps, on a machine where a step of n tokens takes `cost_s(n)`."""
    chosen = []
    for _ in range(steps):
        chosen.append(sum(controller.choose(proposals, 64)))
        num_seqs = len(proposals)
        controller.observe(plan(num_seqs, chosen[-1]), cost_s(num_seqs + chosen[-1]))
    return chosen


@pytest.mark.parametrize(
    ("proposals", "slope", "expected"),
    [
        ([(0.9, 8)], 0.05, 8),
        ([(0.5, 8)], 0.3, 1),
        ([(0.9, 8)], 1.0, 0),
        ([(0.05, 8)], 0.0, 0),
        ([(0.9, 3)], 0.0, 2),
        ([(0.9, 0)], 0.0, 0),
        ([(0.8, 8)] * 4, 0.04, 16),
        ([(0.8, 8)] * 4, 0.5, 0),
    ],
)
def test_as_many_drafts_as_are_fastest(proposals: list[tuple[float, int]], slope: float, expected: int) -> None:
    chosen = settle(SpeculationController(), proposals, lambda n: 1 + slope * (n - 1), 200)
    assert set(chosen[-100:]) == {expected}
    assert chosen[:3] == [0, 0, 0], "plain steps are measured first"


def test_it_turns_on_and_off_as_conditions_change() -> None:
    controller = SpeculationController()
    proposals = [(0.8, 8)]
    assert settle(controller, proposals, lambda n: n, 2000)[-1] == 0
    assert settle(controller, proposals, lambda n: 1.0, 3000)[-1] == 8
    assert settle(controller, proposals, lambda n: n, 3000)[-1] == 0


def test_a_hiccup_decides_nothing() -> None:
    controller = SpeculationController()
    proposals = [(0.8, 8)]
    settle(controller, proposals, lambda n: 1 + 0.05 * n, 20)
    settle(controller, proposals, lambda n: 100.0, 1)
    assert settle(controller, proposals, lambda n: 1 + 0.05 * n, 1) == [8]


def test_likely_drafts_go_first() -> None:
    controller = SpeculationController()
    for _ in range(3):
        controller.observe(plan(3, 0), 1.0)
    assert controller.choose([(0.5, 8), (0.7, 8), (0.05, 8)], max_tokens=12) == [3, 5, 0]


def test_steps_that_compute_prompts_are_no_measure() -> None:
    controller = SpeculationController()
    for _ in range(3):
        controller.observe(plan(1, 0, known_tokens=5), 1.0)
    assert controller.choose([(0.9, 8)], 64) == [0]


def test_the_longest_latest_match_is_proposed() -> None:
    lookup = PromptLookup()
    assert lookup.propose() == []
    lookup.extend([1, 2, 3, 4, 50, 51, 52, 9, 3, 4, 60, 61, 8, 2, 3, 4])
    assert lookup.propose()[:4] == [50, 51, 52, 9], "three tokens match there, two later"
    lookup.extend([70, 3, 4])
    assert lookup.propose()[:2] == [70, 3], "the latest of equals"
    lookup.extend([99])
    assert lookup.propose() == []


def test_a_period_goes_on() -> None:
    lookup = PromptLookup()
    lookup.extend([7, 1, 2, 3, 1, 2, 3])
    assert lookup.propose() == [1, 2, 3, 1, 2, 3, 1, 2]
    lookup.extend([5, 5, 5])
    assert lookup.propose() == [5] * MAX_DRAFT_TOKENS


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 7), max_size=30))
def test_however_a_sequence_grows_the_proposal_is_that_of_a_full_search(ids: list[int], steps: list[int]) -> None:
    lookup, known = PromptLookup(), 0
    for count in steps:
        lookup.extend(ids[known : known + count])
        known = min(len(ids), known + count)
        assert lookup.num_tokens == known
        assert lookup.propose() == search(ids[:known])


def search(ids: list[int]) -> list[int]:
    for size in (4, 3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if len(ids) >= size and ids[end - size : end] == ids[-size:]:
                found = list(ids)
                while len(found) < len(ids) + MAX_DRAFT_TOKENS:
                    found.append(found[end + len(found) - len(ids)])
                return found[len(ids) :]
    return []


def test_guesses_are_judged_though_nobody_runs_them() -> None:
    rng = random.Random(0)
    noise, pattern = PromptLookup(), PromptLookup()
    for i in range(400):
        noise.extend([rng.randint(0, 5)])
        pattern.extend([i % 7])
        noise.propose()
        pattern.propose()
    assert pattern.probability > 0.95
    assert noise.probability < 0.45


def test_memory_does_not_grow_with_distinct_tokens() -> None:
    lookup = PromptLookup()
    lookup.extend(range(100_000))
    lookup.extend([99_000, 99_001, 99_002, 99_003])
    assert lookup.propose()[:3] in ([99_004, 99_005, 99_006], []), "the recent past, if its slot was kept"
    assert len(lookup._positions) == 1 << 15


@pytest.mark.parametrize(
    ("draft_ids", "drawn", "expected"),
    [
        ((), [4], (4,)),
        ((), [None], ()),
        ((4, 5), [4, 5, 6], (4, 5, 6)),
        ((4, 5), [4, 9, 6], (4, 9)),
        ((4, 5), [9, 5, 6], (9,)),
        ((4, 5), [4, None, 6], (4,)),
        ((4, 5), [None, 5, 6], ()),
    ],
)
def test_draws_count_up_to_the_first_that_differs(
    draft_ids: tuple[int, ...], drawn: list[int | None], expected: tuple[int, ...]
) -> None:
    assert agreed(draft_ids, drawn) == expected
