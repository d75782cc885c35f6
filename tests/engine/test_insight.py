"""What an engine says of itself, against what it did."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from localmoe.core.inspection import Inspection
from localmoe.engine.config import EngineConfig
from localmoe.engine.engine import Engine
from localmoe.engine.load import load_engine, warm_up
from localmoe.formats.store import Store
from localmoe.tiers.config import TiersConfig
from support.models import greedy, run

STORE = "models/distinct-experts/stores/f32.store"
PROMPT = [5, 17, 3, 99, 42, 8, 61, 23, 2, 77, 31, 12]
CONFIG = EngineConfig(
    num_threads=2, max_num_batched_tokens=64, max_num_seqs=1, max_context_tokens=64, speculation=False
)


def warm_engine(path: Path, available_bytes: int, config: EngineConfig = CONFIG) -> Engine:
    engine = load_engine("test", path, replace(config, tiers=TiersConfig(reserve_bytes=0)), available_bytes)
    warm_up(engine)
    return engine


def small_memory(path: Path) -> int:
    with Store.open(path) as store:
        return store.total_bytes


def used_bytes(inspection: Inspection, name: str) -> int | None:
    return next(share.used_bytes for share in inspection.memory.shares if share.name == name)


def test_heat_is_of_the_requests_and_the_same_wherever_experts_are(tiny_home: Path) -> None:
    path = tiny_home / STORE
    engines = [warm_engine(path, available_bytes) for available_bytes in (1 << 30, small_memory(path))]
    assert [engine.state().tiers is None for engine in engines] == [True, False]
    heats = []
    for engine in engines:
        assert np.sum(engine.inspect().heat) == 0
        run(engine, [greedy("a", PROMPT, 20)])
        inspection = engine.inspect()
        assert np.shape(inspection.heat) == (inspection.num_layers, inspection.num_experts)
        # The last token is drawn, and computed no more.
        assert np.sum(inspection.heat, axis=1).tolist() == [(len(PROMPT) + 19) * inspection.top_k] * len(
            inspection.heat
        )
        assert [(times.phase, times.num_steps) for times in inspection.layer_times] == [
            ("decode", 19),
            ("prefill", 1),
        ]
        heats.append(inspection.heat)
    assert heats[0] == heats[1]


def test_with_everything_in_memory_there_are_no_links(tiny_home: Path) -> None:
    engine = warm_engine(tiny_home / STORE, 1 << 30)
    run(engine, [greedy("a", PROMPT, 4)])
    inspection = engine.inspect()
    assert {place for layer in inspection.placement for place in layer} == {"ram"}
    assert inspection.tiers is None
    assert inspection.links == []
    for times in inspection.layer_times:
        assert times.stall_s == [0.0] * inspection.num_layers
        assert min(times.compute_s) > 0
    num_experts = inspection.num_layers * inspection.num_experts
    assert used_bytes(inspection, "experts") == num_experts * inspection.expert_bytes
    state = engine.state()
    assert state.num_layer_runs == 4 * inspection.num_layers
    assert state.layers_s > 0


def test_with_tiers_it_agrees_with_their_totals(tiny_home: Path) -> None:
    engine = warm_engine(tiny_home / STORE, small_memory(tiny_home / STORE))
    engine.add(greedy("a", PROMPT, 20))
    for _ in range(5):
        engine.step()
    inspection, tiers = engine.inspect(), engine.state().tiers
    assert tiers is not None
    assert inspection.tiers == tiers
    assert tiers.num_experts == inspection.num_layers * inspection.num_experts
    assert sum(layer.count("ram") for layer in inspection.placement) == tiers.num_present < tiers.num_experts
    [link] = inspection.links
    assert (link.name, link.num_transfers, link.num_bytes) == ("disk_ram", tiers.disk_reads, tiers.disk_bytes)
    assert link.num_bytes == link.num_transfers * inspection.expert_bytes > 0
    assert used_bytes(inspection, "experts") == tiers.num_present * tiers.slot_bytes
    assert sum(share.planned_bytes for share in inspection.memory.shares) <= inspection.memory.budget_bytes
    kv_bytes = used_bytes(inspection, "kv_cache")
    assert kv_bytes is not None
    assert 0 < kv_bytes < inspection.memory.shares[0].planned_bytes
    assert inspection.memory.process_bytes > inspection.expert_bytes
    waited_s = sum(sum(times.stall_s) * times.num_steps for times in inspection.layer_times)
    assert 0 < waited_s <= tiers.stall_s


def test_layers_run_are_reported_and_waiting_is_part_of_them(tiny_home: Path) -> None:
    engine = warm_engine(tiny_home / STORE, small_memory(tiny_home / STORE))
    assert engine.state().num_layer_runs == 0
    before = engine.state().tiers
    run(engine, [greedy("a", PROMPT, 6)])
    state = engine.state()
    assert before is not None
    assert state.tiers is not None
    assert state.num_layer_runs == 6 * engine.inspect().num_layers
    assert 0 <= state.tiers.stall_s - before.stall_s <= state.layers_s
