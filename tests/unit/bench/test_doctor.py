"""The doctor's verdicts, and that it works on an empty home, leaving nothing behind."""

from pathlib import Path

import pytest
from msgspec import structs

from localmoe.bench import doctor
from localmoe.bench.doctor import SERVER, SERVER_LEAST, WORKSTATION, Check, ModelNeed, check, examine
from localmoe.bench.shapes import find_model
from localmoe.bench.weights import ensure_store
from localmoe.core.errors import EngineStartError, ModelBuildError
from localmoe.core.model import WeightFormat
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.estimate import MachineSpeeds, PlannedStore, StepTimes, estimate
from localmoe.hardware.gpus import Gpu
from localmoe.hardware.pcie import PcieLink
from localmoe.tiers.config import DiskConfig
from support.bench_models import write_config

pytest.importorskip("localmoe._cpu")

OLMOE = find_model("olmoe-1b-7b").shape


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.bench.machine._DISK_S", 0.01)
    monkeypatch.setattr("localmoe.bench.doctor.READ_BYTES", 1 << 20)
    monkeypatch.setattr("localmoe.bench.doctor._FILE_BYTES", 16 << 20)
    monkeypatch.setattr("localmoe.bench.doctor.find_gpus", list)


def verdicts(found: Check) -> dict[str, str]:
    return {want.by: want.verdict for want in found.wants}


def by_name(home: Path, need: ModelNeed | None = None) -> dict[str, Check]:
    return {found.what: found for found in examine(home, DiskConfig(), 1, need, lambda _: None).checks}


@pytest.mark.parametrize(
    ("measured", "is_limit", "expected"),
    [
        (10.0, False, ("ok", "below")),
        (9.9, False, ("below", "below")),
        (20.0, False, ("ok", "ok")),
        (10.0, True, ("ok", "ok")),
        (15.0, True, ("below", "ok")),
        (None, False, ("unknown", "unknown")),
    ],
)
def test_verdicts(measured: float | None, is_limit: bool, expected: tuple[str, str]) -> None:
    found = check("x", measured, "GB", [("a", 10), ("b", 20)], advice="buy", is_limit=is_limit)
    assert tuple(want.verdict for want in found.wants) == expected
    assert found.advice == ("buy" if "below" in expected else None)


def test_an_empty_home(tmp_path: Path) -> None:
    home, said = tmp_path / "not" / "there", list[str]()
    report = examine(home, DiskConfig(), 1, None, said.append)
    found = {found.what: found for found in report.checks}
    for what in ("disk bandwidth", "disk reads", "disk latency", "memory bandwidth", "memory", "disk free"):
        measured = found[what].measured
        assert measured is not None, what
        assert measured > 0, what
    assert verdicts(found["memory"]).keys() == {WORKSTATION, SERVER_LEAST, SERVER}
    assert verdicts(found["GPUs"]) == {WORKSTATION: "below", SERVER_LEAST: "below", SERVER: "below"}
    assert found["disk latency"].is_limit
    assert any("removed afterwards" in line for line in said)
    assert list(home.iterdir()) == []
    assert (report.estimate, report.refusal) == (None, None)


def test_a_store_that_is_there_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.bench.doctor._FILE_BYTES", 1 << 16)
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    path = ensure_store(model, WeightFormat.MXFP4, tmp_path, lambda *_: None)
    said: list[str] = []
    report = examine(tmp_path, DiskConfig(), 1, None, said.append)
    assert f"reading {path}" in said
    (bandwidth,) = (found for found in report.checks if found.what == "disk bandwidth")
    blob_mib = PlannedStore.of(model.shape, WeightFormat.MXFP4).blob_bytes / 2**20
    assert f"{blob_mib:.1f} MiB" in bandwidth.note


def test_a_model_that_is_too_large(tmp_path: Path) -> None:
    store = PlannedStore.of(OLMOE, WeightFormat.MXFP4)
    plan = MemoryPlan(
        budget_bytes=10**9,
        kv_cache_bytes=10**12,
        workspace_bytes=0,
        dense_bytes=0,
        num_slots=8,
        slot_bytes=store.blob_bytes,
    )
    speeds = MachineSpeeds(
        memory_bytes_s=1e9,
        disk_bytes_s=1e9,
        decode=StepTimes(num_tokens=1, layer_s=1e-9, rest_s=0.0, miss_s=0.0, wait_s=0.0),
        prompt=StepTimes(num_tokens=8, layer_s=1e-9, rest_s=0.0, miss_s=0.0, wait_s=0.0),
    )
    report = estimate("m", store, plan, speeds, prefetch_layers=1, reserve_bytes=0)
    need = ModelNeed(name="m", estimate=report, refusal=None, has_store=False, store_bytes=10**15)
    found = by_name(tmp_path, need)
    assert verdicts(found["memory available"]) == {"m, all experts": "below"}
    assert verdicts(found["disk free"]) == {"m, its store": "below"}
    assert verdicts(found["disk bandwidth"])["m, to keep up"] == "below"
    there = by_name(tmp_path, structs.replace(need, has_store=True))
    assert verdicts(there["disk free"]) == {}


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        Gpu(address="a", name="L40S", memory_bytes=48 * 10**9, link=PcieLink(gt_s=16.0, num_lanes=16)),
        Gpu(address="b", name="L4", memory_bytes=24 * 10**9, link=None),
    ]
    monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "is_container", lambda: False)
    monkeypatch.setattr(doctor, "has_container_toolkit", lambda: False)
    found = by_name(tmp_path)
    assert verdicts(found["GPUs"]) == {WORKSTATION: "ok", SERVER_LEAST: "ok", SERVER: "below"}
    assert verdicts(found["GPU memory"]) == {WORKSTATION: "ok", SERVER_LEAST: "below", SERVER: "below"}
    assert found["GPUs"].note == "L4, L40S"
    assert found["container toolkit"].advice is not None


def test_without_kernels_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> float:
        raise EngineStartError("no C++ kernels")

    monkeypatch.setattr(doctor, "read_bandwidth_bytes_s", refuse)
    found = by_name(tmp_path)
    assert (found["memory bandwidth"].measured, found["memory bandwidth"].note) == (None, "no C++ kernels")
    assert found["disk bandwidth"].measured


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.bench.doctor._FILE_BYTES", 1 << 60)
    with pytest.raises(ModelBuildError, match="LOCALMOE_HOME"):
        by_name(tmp_path)
