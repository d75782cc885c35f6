"""What a request gets does not depend on who else is served, nor on how its prompt was computed, to the last bit."""

from pathlib import Path

import pytest
import torch

from localmoe.catalog.catalog import Catalog
from localmoe.config.settings import load_settings
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from localmoe.kernels.select import select_kernels
from localmoe.models.decoder import Decoder
from support.models import all_models, greedy, kernels_under_test, make_engine, paged_logits, run

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


@pytest.mark.parametrize("weights", [w for w in WeightFormat if w is not WeightFormat.F32])
@pytest.mark.parametrize("name", ["distinct-experts", "qwen3_moe"])
@torch.inference_mode()
def test_logits_are_the_same_bits_in_any_chunks_and_on_any_number_of_threads(
    tiny_home: Path, tmp_path: Path, name: str, weights: WeightFormat
) -> None:
    path = Catalog(tmp_path).convert(tiny_home / "checkpoints" / name, name, weights, lambda *_: None)
    level = load_settings().engine.cpu_level
    if level == "reference":
        pytest.skip("torch chooses its routines by size")
    token_ids = torch.randint(0, 200, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = None
    with Store.open(path / "stores" / f"{weights}.store") as store:
        for num_threads in (1, 2, 3):
            decoder = load_decoder(store, select_kernels(level, num_threads, pin=False))
            for chunk_tokens in (150, 64, 7, 1):
                logits = paged_logits(decoder, token_ids, chunk_tokens, torch.bfloat16)
                expected = logits if expected is None else expected
                assert torch.equal(logits, expected), f"{num_threads} threads, chunks of {chunk_tokens}"
    assert expected is not None
    assert expected.isfinite().all()
