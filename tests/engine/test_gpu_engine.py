"""The whole engine on the Triton kernels, against the same engine on the processor's.

The models are stored in F32, which the Triton kernels multiply with nearly float32's precision, so greedy tokens of
models this small are the same. On CPU tensors Triton's interpreter runs the kernels, some seconds for ten steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from localmoe.catalog.catalog import Catalog
from localmoe.core.errors import EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.core.request import Request, RequestFailed, SamplingParams, TokenChunk
from localmoe.engine.budget import device_workspace_bytes
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.engine import Engine
from localmoe.engine.experts import ResidentExperts
from localmoe.engine.load import load_decoder, load_device_engine, load_engine, warm_up
from localmoe.formats.store import Store
from localmoe.kernels.gpu import GpuKernels
from localmoe.kernels.reference import ReferenceKernels
from localmoe.models.decoder import Decoder
from localmoe.tiers.config import TiersConfig
from support.models import FakeExperts, greedy, kernels_under_test, make_engine, paged_logits, run, to_embed

_CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if _CUDA else []

SMALL = EngineConfig(num_threads=2, max_num_seqs=4, max_num_batched_tokens=32, speculation=False)
MODEL = "olmoe"
RESERVE_BYTES = 512 << 20


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    return GpuKernels(torch.device("cuda" if _CUDA else "cpu"))


@pytest.fixture(scope="module")
def store_path(tiny_home: Path) -> Path:
    return Catalog(tiny_home).store_path(MODEL, WeightFormat.F32)


@pytest.fixture(scope="module")
def decoder(store_path: Path, kernels: GpuKernels) -> Decoder:
    with Store.open(store_path) as store:
        return load_decoder(store, kernels)


@pytest.fixture(scope="module")
def cpu_decoder(store_path: Path) -> Decoder:
    with Store.open(store_path) as store:
        return load_decoder(store, kernels_under_test())


def sampled(name: str, prompt_ids: list[int], max_tokens: int, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(id=name, model="test", prompt_ids=prompt_ids, sampling=sampling)


def chunks(engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenChunk]]:
    found: dict[str, list[TokenChunk]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, TokenChunk), output
            found[output.request_id].append(output)
    return found


def test_an_embedding_is_nearly_the_processors(
    decoder: Decoder, cpu_decoder: Decoder, kernels: GpuKernels
) -> None:
    asked = [to_embed("long", list(range(5, 45))), to_embed("short", [7])]
    ours = chunks(make_engine(decoder, SMALL, kernels=kernels), asked)
    alone = chunks(make_engine(decoder, replace(SMALL, max_num_batched_tokens=9), kernels=kernels), asked[:1])
    theirs = chunks(make_engine(cpu_decoder, SMALL), asked)
    assert ours["long"][0].embedding == alone["long"][0].embedding
    for name in ("long", "short"):
        one, other = (
            torch.frombuffer(bytearray(found[name][0].embedding or b""), dtype=torch.float32)
            for found in (ours, theirs)
        )
        assert (one - other).abs().max() < 1e-5, name


def test_prompts_in_chunks_and_a_batch_give_the_processors_tokens(
    decoder: Decoder, cpu_decoder: Decoder, kernels: GpuKernels
) -> None:
    config = EngineConfig(max_num_batched_tokens=7, speculation=False)
    requests = [greedy("a", [5, 6, 7, 8, 9, 10, 11, 12, 13], 2), greedy("b", [40, 3], 3)]
    engine = make_engine(decoder, config, kernels=kernels)
    assert run(engine, requests) == run(make_engine(cpu_decoder, config), requests)
    assert engine.state().kv_blocks_used == 0


@pytest.mark.parametrize("weights", [WeightFormat.F32, WeightFormat.MXFP4])
def test_logits_are_those_of_the_reference(
    tiny_home: Path, tmp_path: Path, kernels: GpuKernels, weights: WeightFormat
) -> None:
    catalog = Catalog(tiny_home if weights is WeightFormat.F32 else tmp_path)
    if weights is not WeightFormat.F32:
        catalog.convert(tiny_home / "checkpoints" / MODEL, MODEL, weights, lambda *_: None)
    with Store.open(catalog.store_path(MODEL, weights)) as store:
        found = paged_logits(load_decoder(store, kernels), [5, 6, 7], 2).cpu()
        expected = paged_logits(load_decoder(store, ReferenceKernels(2)), [5, 6, 7], 2)
    # Inputs of quantised weights are rounded to bfloat16 before every product.
    tolerance = 1e-4 if weights is WeightFormat.F32 else 0.1 * expected.std().item()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_prompt_seen_before_is_not_computed_again(decoder: Decoder, kernels: GpuKernels) -> None:
    engine = make_engine(decoder, SMALL, kernels=kernels)
    prompt = list(range(3, 21))
    first = run(engine, [greedy("first", prompt, 1)])["first"]
    assert run(engine, [greedy("again", prompt, 1)])["again"] == first
    assert engine.state().prefix_cache_hits == 16


def test_who_was_preempted_goes_on_where_it_was(
    decoder: Decoder, cpu_decoder: Decoder, kernels: GpuKernels
) -> None:
    """Three blocks of 16: both fit at first, then one of them has to wait."""
    requests = [greedy("a", list(range(3, 18)), 4), greedy("b", list(range(30, 45)), 4)]
    engine = make_engine(decoder, SMALL, num_blocks=3, kernels=kernels)
    assert run(engine, requests) == run(make_engine(cpu_decoder, SMALL), requests)
    assert engine.state().num_preemptions > 0


def test_draws_penalties_and_scores(decoder: Decoder, cpu_decoder: Decoder, kernels: GpuKernels) -> None:
    requests = [
        sampled("drawn", [5, 6], 3, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=7),
        sampled(
            "penalised",
            [5, 6, 5],
            3,
            temperature=0.0,
            logprobs=3,
            logit_bias={9: 2.0},
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=0.5,
        ),
        sampled("scored", [5, 6, 7], 0, prompt_logprobs=2),
    ]
    found = chunks(make_engine(decoder, SMALL, kernels=kernels), requests)
    expected = chunks(make_engine(cpu_decoder, SMALL), requests)
    for name in found:
        for chunk, wanted in zip(found[name], expected[name], strict=True):
            assert chunk.token_ids == wanted.token_ids
            scores = [*chunk.logprobs, *(chunk.prompt_logprobs or [])]
            wanted_scores = [*wanted.logprobs, *(wanted.prompt_logprobs or [])]
            assert len(scores) == len(wanted_scores)
            for score, wanted_score in zip(scores, wanted_scores, strict=True):
                assert score.token_id == wanted_score.token_id
                assert score.logprob == pytest.approx(wanted_score.logprob, abs=1e-3)
                assert [token for token, _ in score.top] == [token for token, _ in wanted_score.top]


def test_numbers_that_are_not_finite_do_not_outlive_their_request(decoder: Decoder, kernels: GpuKernels) -> None:
    engine = make_engine(decoder, SMALL, num_blocks=2, kernels=kernels)
    experts = decoder.experts
    decoder.experts = FakeExperts(lambda routed, x: x.fill_(float("nan")))
    try:
        engine.add(greedy("bad", [6] * 20, 2))
        assert isinstance(engine.step()[0], RequestFailed)
    finally:
        decoder.experts = experts
    clean = make_engine(decoder, SMALL, kernels=kernels)
    assert run(engine, [greedy("after", [5, 6], 1)]) == run(clean, [greedy("after", [5, 6], 1)])


def test_an_engine_that_fits_is_loaded_and_computes(store_path: Path, kernels: GpuKernels) -> None:
    engine = load_device_engine("test", store_path, kernels, SMALL, RESERVE_BYTES + (64 << 20), 0)
    warm_up(engine)
    assert engine.state().tiers is None
    run(engine, [greedy("a", [5, 6, 7], 2)])
    assert sum(map(sum, engine.inspect().heat)) == 2 * 3 * (3 + 1)  # layers, experts of a token, tokens
    assert {place for layer in engine.inspect().placement for place in layer} == {"device"}
    memory = engine.inspect().memory
    assert memory.budget_bytes == 64 << 20
    assert {share.name for share in memory.shares} == {"kv_cache", "workspace", "dense_weights", "experts"}


@pytest.mark.gpu
@pytest.mark.skipif(not _CUDA, reason="no CUDA device")
def test_the_setting_puts_an_engine_on_the_gpu(store_path: Path, cpu_decoder: Decoder) -> None:
    engine = load_engine("test", store_path, replace(SMALL, device="cuda"), 4 << 30)
    assert engine.warm_up_tokens == SMALL.max_num_batched_tokens
    warm_up(engine)
    requests = [greedy("a", [5, 6, 7, 8], 12), greedy("b", [40], 9)]
    assert run(engine, requests) == run(make_engine(cpu_decoder, SMALL), requests)


@pytest.mark.skipif(_CUDA, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(store_path: Path) -> None:
    with pytest.raises(EngineStartError, match="finds 0 CUDA devices"):
        load_engine("test", store_path, replace(SMALL, device="cuda"), 4 << 30)


def test_a_gpu_that_is_too_small_is_passed_over_unless_it_was_asked_for(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fixed = replace(SMALL, kv_cache_bytes=1 << 22)
    with Store.open(store_path) as store:
        dense_bytes = sum(entry.num_bytes for entry in store.dense_entries)
        least_bytes = device_workspace_bytes(store.shape, SMALL) + (1 << 22) + dense_bytes + store.blob_bytes
    free_bytes = RESERVE_BYTES + least_bytes - 1
    monkeypatch.setattr("localmoe.engine.load.select_device", lambda setting: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 1 << 40))
    engine = load_engine("test", store_path, replace(fixed, device="auto"), 4 << 30)
    assert "computing on the processor: not enough memory" in caplog.text
    assert {place for layer in engine.inspect().placement for place in layer} == {"ram"}
    with pytest.raises(EngineStartError, match=r"not enough memory on the GPU: .* an expert"):
        load_engine("test", store_path, replace(fixed, device="cuda"), 4 << 30)


def test_memory_that_others_took_is_named(
    store_path: Path, kernels: GpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> ResidentExperts:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("localmoe.engine.experts.ResidentExperts.mapped", full)
    with pytest.raises(EngineStartError, match=r"not enough memory on the GPU, .* CUDA out of memory"):
        load_device_engine("test", store_path, kernels, SMALL, 1 << 30, 1 << 30)


def test_a_gpu_that_is_lost_ends_the_engine(
    decoder: Decoder, kernels: GpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step would fail; a process anew gets a context anew."""

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    engine = make_engine(decoder, SMALL, kernels=kernels)
    engine.add(greedy("a", [5], 2))
    monkeypatch.setattr(decoder, "forward", lost)
    monkeypatch.setattr(decoder, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        engine.step()


def test_what_does_not_fit_is_refused_with_what_would_help(store_path: Path, kernels: GpuKernels) -> None:
    with Store.open(store_path) as store:
        kv_bytes = 1024 * kv_bytes_per_token(store.shape, "f32")
        dense_bytes = sum(entry.num_bytes for entry in store.dense_entries)
        needed_bytes = device_workspace_bytes(store.shape, SMALL) + kv_bytes + dense_bytes
        least_bytes = needed_bytes + store.blob_bytes
        all_bytes = needed_bytes + 16 * store.blob_bytes
    fixed = replace(SMALL, kv_cache_bytes=kv_bytes)
    for free_bytes, message in (
        (needed_bytes - 1, "not enough memory on the GPU: .* dense weights"),
        (least_bytes - 1, "not enough memory on the GPU: .* an expert"),
        (all_bytes - 1, "not enough memory: .* RAM hold less than 2 experts"),
    ):
        with pytest.raises(EngineStartError, match=message):
            load_device_engine("test", store_path, kernels, fixed, RESERVE_BYTES + free_bytes, 0)
        # A budget does what a small GPU does.
        limited = replace(fixed, tiers=TiersConfig(vram_bytes=free_bytes))
        with pytest.raises(EngineStartError, match=message):
            load_device_engine("test", store_path, kernels, limited, 1 << 40, 0)
    load_device_engine("test", store_path, kernels, fixed, RESERVE_BYTES + all_bytes, 0)
    with pytest.raises(EngineStartError, match="not enough memory"):
        load_device_engine("test", store_path, kernels, SMALL, RESERVE_BYTES, 0)
