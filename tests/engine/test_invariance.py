"""In float32, what a request gets does not depend on who else is served, nor on how its prompt was computed."""

from pathlib import Path

import pytest
import torch

from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from support.models import all_models, greedy, kernels_under_test, make_engine, run

NUM_TOKENS = 32


@pytest.fixture
def decoder(model_under_test: tuple[Path, Path]) -> Decoder:
    with Store.open(model_under_test[1]) as store:
        return load_decoder(store, kernels_under_test())


@all_models
def test_greedy_output_is_the_same_however_it_is_computed(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 120, (16,), generator=generator).tolist()
    common = torch.randint(0, decoder.shape.vocab_size, (64,), generator=generator).tolist()
    requests = [
        greedy(
            f"r{i}", common + torch.randint(0, decoder.shape.vocab_size, (n,), generator=generator).tolist(), 32
        )
        for i, n in enumerate(lengths)
    ]
    alone: dict[str, list[int]] = {}
    for request in requests:
        engine = make_engine(decoder, EngineConfig(prefix_caching=False, max_num_batched_tokens=4096))
        alone |= run(engine, [request])

    whole = EngineConfig(prefix_caching=False, max_num_batched_tokens=4096)
    engine = make_engine(decoder, whole)
    assert run(engine, requests) == alone, "batch of 16"

    engine = make_engine(decoder, EngineConfig(prefix_caching=False, max_num_batched_tokens=48))
    assert run(engine, requests) == alone, "chunked prefill"

    engine = make_engine(decoder, EngineConfig())
    assert run(engine, requests[:1]) == {"r0": alone["r0"]}, "prefix cache, miss"
    assert run(engine, requests) == alone, "prefix cache, hit"
    assert engine.state().prefix_cache_hits >= 16 * 64
    assert engine.state().kv_blocks_used == 0

    engine = make_engine(decoder, EngineConfig(), num_blocks=24)
    assert run(engine, requests) == alone, "preemption"
    assert engine.state().num_preemptions > 0
    assert engine.state().kv_blocks_used == 0
