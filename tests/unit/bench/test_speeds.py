"""What predictions are measured with: a few layers of a tiny model, gone afterwards."""

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from localmoe.bench.engine import Workload
from localmoe.bench.predict import predict
from localmoe.bench.shapes import BenchModel, find_model
from localmoe.bench.speeds import find_largest_store, measure_speeds, probe_shape, split_step
from localmoe.bench.weights import ensure_store
from localmoe.core.errors import EngineStartError, ModelBuildError
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig
from localmoe.kernels.select import select_kernels
from localmoe.tiers.config import TiersConfig
from support.bench_models import write_config

pytest.importorskip("localmoe._cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.bench.machine._DISK_S", 0.01)
    monkeypatch.setattr("localmoe.bench.speeds.READ_BYTES", 1 << 20)
    monkeypatch.setattr("localmoe.bench.speeds._LIMIT_S", 0.01)


@pytest.mark.parametrize("weights", ["mxfp4", "bf16"])
def test_measured_and_cleaned_up(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = find_model(str(write_config(tmp_path / "tiny.json"))).shape
    written: list[BenchModel] = []

    def record(model: BenchModel, *arguments: Any) -> Path:
        written.append(model)
        return ensure_store(model, *arguments)

    monkeypatch.setattr("localmoe.bench.speeds.ensure_store", record)
    home, said = tmp_path / "home", list[str]()
    speeds = measure_speeds(
        shape,
        WeightFormat(weights),
        select_kernels("auto", 1, pin=False),
        EngineConfig(num_threads=1),
        Workload(streams=(2,), prompt_tokens=20),
        home,
        said.append,
    )
    assert (speeds.decode.num_tokens, speeds.prompt.num_tokens) == (2, 20)
    for times in (speeds.decode, speeds.prompt):
        assert times.layer_s > 0
        assert min(times.rest_s, times.miss_s, times.wait_s) >= 0
    assert min(speeds.memory_bytes_s, speeds.disk_bytes_s) > 0
    assert list(home.iterdir()) == []
    assert any("writing 3 layers" in line for line in said)
    assert [model.shape for model in written] == [structs.replace(shape, num_layers=3)]


def test_layers_and_the_rest_of_a_step() -> None:
    times = split_step(1, one_s=5.0, all_s=11.0)
    assert (times.layer_s, times.rest_s) == (3.0, 2.0)
    for one_s, all_s in ((9.0, 6.0), (1.0, 6.0)):  # what noise may do
        times = split_step(1, one_s, all_s)
        assert (times.layer_s, times.rest_s) == (2.0, 0.0)


def test_large_models_are_measured_with_fewer_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = find_model("olmoe-1b-7b").shape
    assert probe_shape(shape, WeightFormat.MXFP4) == structs.replace(shape, num_layers=3)
    assert probe_shape(structs.replace(shape, expert_size=8192), WeightFormat.MXFP4).num_experts == 20
    assert probe_shape(structs.replace(shape, expert_size=65536), WeightFormat.MXFP4).num_experts == 16


def test_the_largest_store(tmp_path: Path) -> None:
    assert find_largest_store(tmp_path) is None
    for name, size in (("bench/a.store", 5), ("models/m/stores/b.store", 9), ("models/m/stores/c.store", 7)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert find_largest_store(tmp_path) == tmp_path / "models/m/stores/b.store"


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    kernels = select_kernels("auto", 1, pin=False)
    with pytest.raises(ModelBuildError, match="LOCALMOE_HOME"):
        predict(
            model, WeightFormat.MXFP4, kernels, EngineConfig(num_threads=1), 1, tmp_path / "home", lambda _: None
        )


def test_prediction_follows_the_budget(tmp_path: Path) -> None:
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    kernels = select_kernels("auto", 1, pin=False)

    def config(ram_bytes: int | None) -> EngineConfig:
        others = {"stripes": ("/of/another/store.1-of-2.stripe",), "placement": ("layers.9.*=ram",)}
        tiers = TiersConfig(ram_bytes=ram_bytes, reserve_bytes=0, **others)
        return EngineConfig(num_threads=1, max_num_batched_tokens=4, max_num_seqs=1, tiers=tiers)

    def slots(ram_bytes: int | None) -> int:
        return predict(
            model, WeightFormat.MXFP4, kernels, config(ram_bytes), 1, tmp_path, lambda _: None
        ).num_slots

    assert slots(None) == 32
    assert 3 <= slots(200_000) < 32
    with pytest.raises(EngineStartError, match="not enough memory"):
        slots(30_000)
