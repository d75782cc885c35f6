"""Models that do not fit in memory: the same bits as when they do, and what happens when the disk fails."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe.core.errors import ChecksumError, EngineStartError, StoreError
from localmoe.core.model import ExpertId, ModelShape, WeightFormat
from localmoe.engine.budget import MemoryPlan, plan_memory
from localmoe.engine.config import EngineConfig
from localmoe.engine.estimate import PlannedStore
from localmoe.engine.load import load_decoder, load_engine, load_tiered
from localmoe.engine.relief import ExpertRelief
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from localmoe.tiers.config import DiskConfig, TiersConfig
from support.models import greedy, kernels_under_test, make_engine, outcome, paged_logits, run

MODELS = ["distinct-experts", "dense", "olmoe", "qwen3_moe"]
PROMPT = [5, 17, 3, 99, 42, 8, 61, 23, 2, 77, 31, 12]


def store_path(home: Path, name: str) -> Path:
    return home / "models" / name / "stores" / f"{WeightFormat.F32}.store"


def tiered(path: Path, num_slots: int, *, streamed: tuple[int, ...] = (), **tiers: Any) -> Decoder:
    with Store.open(path) as store:
        plan = MemoryPlan(
            budget_bytes=1 << 30,
            kv_cache_bytes=0,
            workspace_bytes=0,
            dense_bytes=0,
            streamed_layers=streamed,
            num_slots=num_slots,
            slot_bytes=store.blob_bytes,
        )
        return load_tiered(store, kernels_under_test(), plan, TiersConfig(**tiers))[0]


def resident(path: Path) -> Decoder:
    with Store.open(path) as store:
        return load_decoder(store, kernels_under_test())


def skip_without_streaming() -> None:
    if not kernels_under_test().in_place:
        pytest.skip("these kernels keep copies of attention's weights")


def experts_of(decoder: Decoder) -> TieredExperts:
    assert isinstance(decoder.experts, TieredExperts)
    return decoder.experts


@pytest.mark.parametrize("prefetch_layers", [0, 1, 2])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_have_the_same_bits_wherever_experts_are(tiny_home: Path, name: str, prefetch_layers: int) -> None:
    path = store_path(tiny_home, name)
    decoder = resident(path)
    num_experts = decoder.shape.num_layers * decoder.shape.num_experts
    token_ids = [token % decoder.shape.vocab_size for token in PROMPT * 4]
    expected = [paged_logits(decoder, token_ids, chunk) for chunk in (48, 7, 1)]
    for share in (1.0, 0.5, 0.15):
        decoder = tiered(path, max(1, int(share * num_experts)), prefetch_layers=prefetch_layers)
        for chunk, logits in zip((48, 7, 1), expected, strict=True):
            assert torch.equal(paged_logits(decoder, token_ids, chunk), logits), (share, chunk)
        state = experts_of(decoder).state()
        assert state.num_present <= state.num_slots
        assert share < 1.0 or (state.misses <= num_experts and state.evictions == 0)


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
@pytest.mark.parametrize("method", ["io_uring", "threads"])
def test_every_policy_and_way_of_reading_gives_the_same_tokens(tiny_home: Path, policy: str, method: str) -> None:
    path = store_path(tiny_home, "distinct-experts")
    requests = [greedy(str(i), [*PROMPT, i], 24) for i in range(5)]
    expected = run(make_engine(resident(path), EngineConfig()), requests)
    decoder = tiered(path, 6, policy=policy, disk=DiskConfig(method=method))  # type: ignore[arg-type]
    assert run(make_engine(decoder, EngineConfig()), requests) == expected


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_streamed_attention_gives_the_same_bits(tiny_home: Path, name: str) -> None:
    skip_without_streaming()
    path = store_path(tiny_home, name)
    decoder = resident(path)
    token_ids = [token % decoder.shape.vocab_size for token in PROMPT * 3]
    expected = [paged_logits(decoder, token_ids, chunk) for chunk in (36, 5)]
    for streamed in [(0, 1), tuple(range(decoder.shape.num_layers // 2 * 2))]:
        decoder = tiered(path, 4, streamed=streamed)
        for chunk, logits in zip((36, 5), expected, strict=True):
            assert torch.equal(paged_logits(decoder, token_ids, chunk), logits)


@pytest.fixture
def own_store(tiny_home: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copy(store_path(tiny_home, "distinct-experts"), tmp_path / "own.store"))


def test_a_damaged_expert_fails_who_needs_it_and_nobody_after_it_is_mended(own_store: Path) -> None:
    engine = make_engine(tiered(own_store, 2), EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    with Store.open(own_store) as store:
        offsets = [store.expert_entry(ExpertId(1, expert)).offset for expert in range(store.shape.num_experts)]
    for offset in offsets:
        flip(own_store, offset + 100)
    message = str(outcome(engine))
    assert "layer 1 expert" in message
    assert "damaged" in message
    for offset in offsets:
        flip(own_store, offset + 100)
    assert outcome(engine) == expected


def test_a_store_that_is_cut_short_fails_requests_by_name_and_comes_back(own_store: Path) -> None:
    engine = make_engine(tiered(own_store, 2), EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    content = own_store.read_bytes()
    with Store.open(own_store) as store:
        start = store.expert_entry(ExpertId(0, 0)).offset
    os.truncate(own_store, start)
    for _ in range(3):
        assert "the file has shrunk" in str(outcome(engine))
        assert engine.state().kv_blocks_used == 0
    with own_store.open("r+b") as file:
        file.write(content)
    assert outcome(engine) == expected


def test_a_store_that_is_removed_goes_on_serving(own_store: Path) -> None:
    engine = make_engine(tiered(own_store, 2), EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    own_store.unlink()
    assert outcome(engine) == expected


def test_a_damaged_streamed_layer_fails_its_step_and_comes_back(own_store: Path) -> None:
    skip_without_streaming()
    engine = make_engine(tiered(own_store, 4, streamed=(0, 1)), EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    with Store.open(own_store) as store:
        (entry,) = (entry for entry in store.dense_entries if entry.name == "layers.1.v")
    flip(own_store, entry.offset + 8)
    assert "layers.1.v is damaged" in str(outcome(engine))
    flip(own_store, entry.offset + 8)
    assert outcome(engine) == expected


def flip(path: Path, offset: int) -> None:
    """Invert a byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def test_memory_can_be_taken_away_while_serving(tiny_home: Path) -> None:
    path = store_path(tiny_home, "distinct-experts")
    decoder = tiered(path, 20)
    engine = make_engine(decoder, EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    for num_slots in (20, 7, 3, 1):
        experts_of(decoder).shrink(num_slots)
        assert outcome(engine) == expected
        state = experts_of(decoder).state()
        assert state.num_slots == num_slots
        assert state.num_present <= num_slots


def test_experts_take_less_where_memory_is_short(tiny_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = store_path(tiny_home, "distinct-experts")
    decoder = tiered(path, 20)
    engine = make_engine(decoder, EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    experts = experts_of(decoder)
    slot_bytes = experts.state().slot_bytes
    relieve = ExpertRelief(experts, reserve_bytes=10 * slot_bytes, fewest_slots=4)
    for available_slots, num_slots in ((100, 20), (5, 20), (4, 14), (0, 4), (0, 4), (100, 4)):
        relieve(available_slots * slot_bytes)
        assert experts.state().num_slots == num_slots
        assert outcome(engine) == expected
    assert caplog.text.count("memory is short") == 2


def test_memory_that_cannot_be_given_back_costs_nobody(
    tiny_home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(num_slots: int) -> None:
        raise StoreError("3 reads wait and none ended in 30 s")

    decoder = tiered(store_path(tiny_home, "distinct-experts"), 20)
    experts = experts_of(decoder)
    monkeypatch.setattr(experts, "shrink", shrink)
    ExpertRelief(experts, reserve_bytes=10 * experts.state().slot_bytes, fewest_slots=4)(0)
    assert "nothing can be given back yet: 3 reads wait" in caplog.text
    assert experts.state().num_slots == 20


def test_damaged_or_missing_dense_weights_are_found_at_load(own_store: Path) -> None:
    with Store.open(own_store) as store:
        entry = next(entry for entry in store.dense_entries if entry.name == "layers.0.q")
    flip(own_store, entry.offset)
    with pytest.raises(ChecksumError, match=r"layers\.0\.q is damaged"):
        tiered(own_store, 2)


def test_a_store_cut_short_while_it_loads_is_named(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(own_store) as store:
        plan = MemoryPlan(
            budget_bytes=1 << 30, kv_cache_bytes=0, workspace_bytes=0, dense_bytes=0, num_slots=2, slot_bytes=4096
        )
        os.truncate(own_store, 8192)
        with pytest.raises(StoreError, match="shrunk"):
            load_tiered(store, kernels_under_test(), plan, TiersConfig())


def planned(path: Path, available_bytes: int, **tiers: Any) -> MemoryPlan:
    config = EngineConfig(kv_cache_bytes=100_000, max_num_batched_tokens=8, max_num_seqs=1)
    config = replace(config, tiers=TiersConfig(reserve_bytes=0, **tiers))
    with Store.open(path) as store:
        return plan_memory(store, kernels_under_test(), config, available_bytes)


def test_the_budget_is_divided_and_kept(tiny_home: Path) -> None:
    path = store_path(tiny_home, "distinct-experts")
    everything = planned(path, 1 << 30)
    assert everything.num_slots is None
    least = everything.kv_cache_bytes + everything.workspace_bytes + everything.dense_bytes
    for num_slots in (2, 3, 10):
        size = least + num_slots * everything.slot_bytes + 100
        for plan in (planned(path, 1 << 30, ram_bytes=size), planned(path, size)):
            assert plan.num_slots == num_slots
            spent = plan.kv_cache_bytes + plan.workspace_bytes + plan.dense_bytes + num_slots * plan.slot_bytes
            assert spent <= plan.budget_bytes == size
    with pytest.raises(EngineStartError, match=r"not enough memory: .* 2 experts .* lower max_context_tokens"):
        planned(path, least // 2)


def test_attention_is_streamed_where_it_does_not_fit() -> None:
    skip_without_streaming()
    shape = ModelShape(
        model_type="llama",
        num_layers=40,
        hidden_size=5120,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        num_experts=1,
        top_k=1,
        expert_size=13824,
        vocab_size=32000,
        max_context_tokens=4096,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    )
    store = PlannedStore.of(shape, WeightFormat.MXFP4)
    config = EngineConfig(kv_cache_bytes=1 << 28, max_num_batched_tokens=128, max_num_seqs=1)
    dense_bytes = sum(entry.num_bytes for entry in store.dense_entries)
    plan = plan_memory(store, kernels_under_test(), config, 4 << 30)
    assert plan.num_slots is not None
    assert plan.num_slots >= 2
    assert len(plan.streamed_layers) == len(set(plan.streamed_layers)) % 40
    assert len(plan.streamed_layers) % 2 == 0
    assert plan.dense_bytes < dense_bytes
    spent = plan.kv_cache_bytes + plan.workspace_bytes + plan.dense_bytes + plan.num_slots * plan.slot_bytes
    assert plan.budget_bytes - plan.slot_bytes - dense_bytes / 40 < spent <= plan.budget_bytes
    assert plan_memory(store, kernels_under_test(), config, 8 << 30).streamed_layers == ()


def test_an_engine_that_does_not_fit_is_tiered_by_itself(
    tiny_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path(tiny_home, "distinct-experts")
    config = EngineConfig(num_threads=2, max_num_batched_tokens=8, max_num_seqs=1, max_context_tokens=64)
    config = replace(config, tiers=TiersConfig(reserve_bytes=0))
    with Store.open(path) as store:
        available = store.total_bytes
    with caplog.at_level(logging.INFO):
        engine = load_engine("test", path, config, available)
    assert any("experts of" in message for message in caplog.messages)
    assert outcome(engine) == outcome(load_engine("test", path, config, 1 << 30))
    state = engine.state().tiers
    assert state is not None
    assert 0 < state.num_present <= state.num_slots < 40
    assert load_engine("test", path, config, 1 << 30).state().tiers is None
