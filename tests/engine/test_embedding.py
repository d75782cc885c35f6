"""Embeddings: what transformers' hidden states come to, whatever a prompt is cut into and whatever is beside it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe.core.errors import InvalidRequestError
from localmoe.core.plans import BatchPlan, StepResult
from localmoe.core.request import FinishReason, Request, RequestFailed, SamplingParams, TokenChunk
from localmoe.engine.block_pool import BlockPool
from localmoe.engine.config import EngineConfig
from localmoe.engine.embedding import added, embedding, hidden_sums
from localmoe.engine.engine import Engine
from localmoe.engine.load import load_decoder
from localmoe.engine.scheduler import Scheduler
from localmoe.engine.speculation import SpeculationController
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from support.checkpoints import load_reference
from support.models import FakeExperts, all_models, greedy, kernels_under_test, make_engine, run, to_embed

PROMPT = [3 + place * 37 % 300 for place in range(150)]
"""Of more positions than are summed up in one piece."""


@pytest.fixture
def decoder(tiny_home: Path) -> Decoder:
    with Store.open(tiny_home / "models/distinct-experts/stores/f32.store") as store:
        return load_decoder(store, kernels_under_test())


def outputs(engine: Engine, *requests: Request) -> dict[str, list[TokenChunk | RequestFailed]]:
    found: dict[str, list[TokenChunk | RequestFailed]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    return found


def vector_of(chunks: list[TokenChunk | RequestFailed]) -> bytes:
    """The embedding of the one chunk that there is."""
    [chunk] = chunks
    assert isinstance(chunk, TokenChunk), chunk
    assert chunk.finish_reason is FinishReason.LENGTH
    assert chunk.token_ids == []
    assert chunk.embedding is not None
    return chunk.embedding


def embed(decoder: Decoder, prompt_ids: list[int], **config: Any) -> bytes:
    """Alone, in an engine of its own."""
    engine = make_engine(decoder, EngineConfig(**config))
    return vector_of(outputs(engine, to_embed("a", prompt_ids))["a"])


def numbers(vector: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(vector), dtype=torch.float32)


@all_models
@torch.inference_mode()
def test_it_is_the_mean_of_transformers_hidden_states(model_under_test: tuple[Path, Path]) -> None:
    checkpoint, store_path = model_under_test
    with Store.open(store_path) as store:
        decoder = load_decoder(store, kernels_under_test())
    reference: Any = load_reference(checkpoint)
    for prompt in (PROMPT, PROMPT[:7], PROMPT[:1]):
        hidden_TD = reference.model(torch.tensor([prompt])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden_TD.mean(0), dim=0)
        ours = numbers(embed(decoder, prompt))
        assert float(ours @ expected) > 0.9999
        assert (ours - expected).abs().max() < 1e-4
        assert float(ours.norm()) == pytest.approx(1.0, abs=1e-6)


def test_it_is_the_same_bits_in_chunks_in_a_batch_and_after_a_preemption(decoder: Decoder) -> None:
    alone = embed(decoder, PROMPT)
    assert embed(decoder, PROMPT, max_num_batched_tokens=16) == alone
    assert embed(decoder, PROMPT, max_num_batched_tokens=7) == alone
    others = [to_embed("b", PROMPT[5:80]), greedy("c", PROMPT[:40], 30), to_embed("d", PROMPT[9:12])]
    batched = outputs(make_engine(decoder, EngineConfig()), *others, to_embed("a", PROMPT))
    assert vector_of(batched["a"]) == alone
    assert vector_of(batched["b"]) == embed(decoder, PROMPT[5:80])
    # Those before it grow until there is no block left for it.
    engine = make_engine(decoder, EngineConfig(max_num_batched_tokens=24, speculation=False), num_blocks=14)
    early = [greedy("x", PROMPT[:30], 60), greedy("y", PROMPT[50:80], 60)]
    crowded = outputs(engine, *early, to_embed("a", PROMPT))
    assert engine.state().num_preemptions > 0
    assert vector_of(crowded["a"]) == alone


def test_tokens_beside_it_are_the_same(decoder: Decoder) -> None:
    # What repeats is drafted, alone.
    asked = greedy("a", [5, 6, 7, 8] * 6, 40)
    alone = run(make_engine(decoder, EngineConfig()), [asked])["a"]
    beside = outputs(make_engine(decoder, EngineConfig(max_num_batched_tokens=16)), asked, to_embed("b", PROMPT))
    assert [token for chunk in beside["a"] if isinstance(chunk, TokenChunk) for token in chunk.token_ids] == alone


def test_it_neither_uses_the_prefix_cache_nor_drives_others_out_of_it(decoder: Decoder) -> None:
    engine = make_engine(decoder, EngineConfig(), num_blocks=16)

    def cached_tokens() -> int:
        chunks = outputs(engine, greedy("chat", PROMPT[:64], 2))["chat"]
        last = chunks[-1]
        assert isinstance(last, TokenChunk)
        assert last.usage is not None
        return last.usage.cached_tokens

    assert cached_tokens() == 0
    expected = embed(decoder, PROMPT[:64])
    queries = engine.state().prefix_cache_queries
    assert vector_of(outputs(engine, to_embed("same", PROMPT[:64]))["same"]) == expected
    for number in range(1, 10):
        outputs(
            engine, to_embed("other", PROMPT[number : number + 60]), to_embed("another", PROMPT[-number - 60 :])
        )
    assert engine.state().prefix_cache_queries == queries
    assert engine.state().kv_blocks_used == 0
    assert cached_tokens() == 48


def test_usage_is_the_prompt(decoder: Decoder) -> None:
    [chunk] = outputs(make_engine(decoder, EngineConfig()), to_embed("a", PROMPT))["a"]
    assert isinstance(chunk, TokenChunk)
    assert chunk.usage is not None
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (len(PROMPT), 0)


def test_states_that_are_no_numbers_fail_their_own_request_only(decoder: Decoder) -> None:
    engine = make_engine(decoder, EngineConfig(), num_blocks=12)
    clean = vector_of(outputs(engine, to_embed("before", PROMPT[:20]))["before"])
    experts = decoder.experts
    decoder.experts = FakeExperts(lambda routed, x: x[:20].fill_(float("nan")))
    found = outputs(engine, to_embed("bad", PROMPT[:20]), to_embed("good", PROMPT[:20]))
    [bad] = found["bad"]
    assert isinstance(bad, RequestFailed)
    assert "not finite" in bad.message
    assert vector_of(found["good"])
    decoder.experts = experts
    # It lies in a block of the one that failed, whose rest was not written since.
    assert vector_of(outputs(engine, to_embed("short", PROMPT[:3]))["short"]) == embed(decoder, PROMPT[:3])
    assert vector_of(outputs(engine, to_embed("after", PROMPT[:20]))["after"]) == clean


def test_nobody_gets_tokens_and_an_embedding(decoder: Decoder) -> None:
    asked = Request(id="a", model="m", prompt_ids=[5], sampling=SamplingParams(max_tokens=3), embed=True)
    with pytest.raises(InvalidRequestError, match="one of the two"):
        make_engine(decoder, EngineConfig()).add(asked)


def test_sums_do_not_depend_on_order() -> None:
    h_TD = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * 100
    whole = hidden_sums([h_TD])
    assert whole is not None
    shuffled = h_TD[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    parts = [hidden_sums(shuffled[start : start + 7].split(3)) for start in range(0, 100, 7)]
    total: tuple[int, ...] = ()
    for part in parts:
        assert part is not None
        total = added(total, part)
    assert total == whole
    mean = h_TD.double().mean(0)
    expected = mean / mean.norm()
    assert (numbers(embedding(whole)) - expected).abs().max() < 1e-7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e12])
def test_sums_of_what_is_no_number_are_none(value: float) -> None:
    h_TD = torch.ones(3, 4)
    h_TD[1, 2] = value
    assert hidden_sums(h_TD.split(1)) is None


def step_of(scheduler: Scheduler) -> BatchPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def test_a_preempted_prompt_is_summed_up_from_its_beginning() -> None:
    pool = BlockPool(4)
    config = EngineConfig(block_tokens=16, max_num_batched_tokens=32, speculation=False)
    scheduler = Scheduler(config, pool, SpeculationController())
    sampling = SamplingParams(max_tokens=20, temperature=0.0)
    scheduler.add(Request(id="old", model="m", prompt_ids=list(range(16)), sampling=sampling))
    scheduler.add(to_embed("a", list(range(48))))
    found: list[TokenChunk | RequestFailed] = []
    while scheduler.has_work:
        plan = step_of(scheduler)
        results = {
            step.sequence_id: StepResult(
                token_ids=(7,) if step.samples else (),
                hidden_sums=(len(step.token_ids), sum(step.token_ids)) if step.embeds else (),
            )
            for step in plan.sequences
        }
        found += scheduler.update(plan, results)

    assert scheduler.num_preemptions > 0
    [last] = [output for output in found if output.request_id == "a"]
    assert isinstance(last, TokenChunk)
    assert last.embedding == embedding((48, sum(range(48))))
    assert pool.num_free == pool.num_blocks
