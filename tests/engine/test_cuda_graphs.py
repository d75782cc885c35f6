"""Decode steps in buffers of a larger size against the same steps as they are: not a bit may differ.

Without a GPU, what would be a graph's replay is a plain call of the same launches on the same buffers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from localmoe.catalog.catalog import Catalog
from localmoe.core.model import WeightFormat
from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams
from localmoe.engine.config import EngineConfig
from localmoe.engine.cuda_graphs import Capture, CudaCapture, DecodeGraphs
from localmoe.engine.executor import Forward
from localmoe.engine.kv_cache import KVCache, place
from localmoe.engine.load import load_decoder, load_device_engine
from localmoe.engine.observed_experts import ObservedExperts
from localmoe.engine.watch import Watch
from localmoe.formats.store import Store
from localmoe.kernels.gpu import GpuKernels
from localmoe.models.decoder import Decoder
from support.models import blind_insight, greedy, run

_CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if _CUDA else []

BLOCK_TOKENS = 16
NUM_BLOCKS = 16


def capture() -> Capture:
    return CudaCapture() if _CUDA else lambda launch: launch


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    return GpuKernels(torch.device("cuda" if _CUDA else "cpu"))


@pytest.fixture(scope="module")
def store_path(tiny_home: Path) -> Path:
    return Catalog(tiny_home).store_path("olmoe", WeightFormat.F32)


@pytest.fixture(scope="module")
def decoder(store_path: Path, kernels: GpuKernels) -> Decoder:
    with Store.open(store_path) as store:
        return load_decoder(store, kernels)


def caches(decoder: Decoder) -> tuple[KVCache, KVCache]:
    """Two of the same random keys and values."""
    generator = torch.Generator().manual_seed(0)
    pair = [KVCache(decoder.shape, NUM_BLOCKS, BLOCK_TOKENS, torch.float32, decoder.device) for _ in range(2)]
    for one, other in zip((*pair[0].keys, *pair[0].values), (*pair[1].keys, *pair[1].values), strict=True):
        one.copy_(torch.randn(one.shape, generator=generator))
        other.copy_(one)
    return pair[0], pair[1]


def decode_steps(*sequences: tuple[int, int, tuple[int, ...]]) -> list[SequenceStep]:
    """One token for each (token, position, blocks)."""
    return [
        SequenceStep(
            sequence_id=blocks[0],
            token_ids=(token,),
            start=start,
            block_table=blocks,
            samples=True,
            sampling=SamplingParams(max_tokens=1),
            seed=0,
            history=([], []),
            scores_prompt=False,
        )
        for token, start, blocks in sequences
    ]


SHORT, MIDDLE, LONG, FIRST = (7, 3, (9,)), (200, 40, (4, 1, 2)), (31, 70, (15, 3, 8, 0, 5)), (12, 0, (6,))


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.engine.cuda_graphs.PIECE_TOKENS", 128)


@pytest.fixture
def watch(decoder: Decoder) -> ObservedExperts:
    return blind_insight(decoder).experts


@torch.inference_mode()
def test_a_step_of_any_size_has_the_same_bits(
    decoder: Decoder, watch: ObservedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of contexts of one, two and three pieces, in buffers for four."""
    monkeypatch.setattr("localmoe.kernels.triton.attention.PIECE_TOKENS", 32)
    plain_cache, cache = caches(decoder)
    graphs = DecodeGraphs(decoder, cache, watch, capture(), max_num_seqs=6)
    replayed: list[torch.Tensor] = []
    monkeypatch.setattr(watch, "replayed", replayed.append)
    for sequences in ((SHORT, LONG, MIDDLE), (FIRST, MIDDLE, LONG, SHORT)):
        steps = decode_steps(*sequences)
        token_ids = torch.tensor([step.token_ids[0] for step in steps], dtype=torch.int32)
        placed = place(steps, BLOCK_TOKENS, decoder.frequencies)
        expected = decoder.forward(token_ids, plain_cache, placed)
        found = graphs(token_ids, placed)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        for one, other in zip((*cache.keys, *cache.values), (*plain_cache.keys, *plain_cache.values), strict=True):
            assert torch.equal(one, other)
        assert replayed.pop().shape == (2, len(steps), 3)
    assert not replayed


@torch.inference_mode()
def test_what_is_no_decode_step_runs_as_it_is(
    decoder: Decoder, watch: ObservedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(launch: Callable[[], None]) -> Callable[[], None]:
        raise AssertionError("nothing to capture")

    plain_cache, cache = caches(decoder)
    graphs = DecodeGraphs(decoder, cache, watch, never, max_num_seqs=4)
    [short, middle] = decode_steps(SHORT, MIDDLE)
    two = replace(short, token_ids=(7, 8))
    placed = place([two, middle], BLOCK_TOKENS, decoder.frequencies)
    token_ids = torch.tensor([7, 8, 200], dtype=torch.int32)
    assert torch.equal(graphs(token_ids, placed), decoder.forward(token_ids, plain_cache, placed))
    monkeypatch.setattr(ObservedExperts, "needs_each_layer", True)
    placed = place([short], BLOCK_TOKENS, decoder.frequencies)
    assert len(graphs(torch.tensor([7], dtype=torch.int32), placed)) == 1


@torch.inference_mode()
def test_a_size_that_there_is_no_memory_for_runs_as_it_is(decoder: Decoder, watch: ObservedExperts) -> None:
    tried: list[int] = []

    def full(launch: Callable[[], None]) -> Callable[[], None]:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain_cache, cache = caches(decoder)
    graphs = DecodeGraphs(decoder, cache, watch, full, max_num_seqs=4)
    placed = place(decode_steps(SHORT, MIDDLE), BLOCK_TOKENS, decoder.frequencies)
    token_ids = torch.tensor([7, 200], dtype=torch.int32)
    expected = decoder.forward(token_ids, plain_cache, placed)
    for _ in range(2):
        assert torch.equal(graphs(token_ids, placed), expected)
    assert len(tried) == 1


def test_an_engine_of_graphs_generates_and_counts_the_same(
    store_path: Path, kernels: GpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(num_threads=2, max_num_seqs=4, max_num_batched_tokens=32, speculation=False)
    requests = [greedy("a", [5, 6, 7], 3), greedy("b", [40], 2), greedy("c", [8, 9], 2)]

    def outcome(forward_with: Callable[..., Forward]) -> tuple[dict[str, list[int]], list[list[int]]]:
        monkeypatch.setattr("localmoe.engine.engine.forward_with", forward_with)
        engine = load_device_engine("test", store_path, kernels, config, 1 << 30, 1 << 30)
        tokens = run(engine, requests)
        return tokens, engine.inspect().heat

    def plain(decoder: Decoder, cache: KVCache, watch: Watch, *, max_num_seqs: int) -> Forward:
        return lambda token_ids, step: decoder.forward(token_ids, cache, step)

    def captured(decoder: Decoder, cache: KVCache, watch: Watch, *, max_num_seqs: int) -> Forward:
        return DecodeGraphs(decoder, cache, watch, capture(), max_num_seqs=max_num_seqs)

    expected = outcome(plain)
    assert outcome(captured) == expected
    assert np.sum(expected[1]) == 2 * 3 * (3 + 2 + 1 + 1 + 2 + 1)
