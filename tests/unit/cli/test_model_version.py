"""What the cache of answers takes for the same model, and what not."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from localmoe.backends.vllm_config import VllmConfig
from localmoe.catalog.catalog import Catalog
from localmoe.cli.answer_cache import model_version
from localmoe.config.settings import Settings
from localmoe.core.model import WeightFormat
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.engine.config import EngineConfig

SPEC = ModelSpec(model="tiny")
BOTH = ModelSpec(model="tiny", engines=(EngineSpec(), EngineSpec(engine="vllm")))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    model = tmp_path / "models" / "tiny"
    (model / "stores").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    for weights in (WeightFormat.NVFP4, WeightFormat.BF16):
        (model / "stores" / f"{weights}.store").write_bytes(bytes(40))
    return tmp_path


def version(home: Path, spec: ModelSpec = SPEC, **settings: object) -> str:
    return model_version(spec, Settings(home=home, **settings), Catalog(home))  # type: ignore[arg-type]


def test_it_is_the_same_for_the_same(home: Path) -> None:
    os.utime(home / "models" / "tiny" / "stores" / "nvfp4.store", (1, 1))  # as where it was copied to
    before = version(home)
    os.utime(home / "models" / "tiny" / "stores" / "nvfp4.store", (2, 2))
    assert version(home, port=1) == before
    (home / "models" / "tiny" / "stores" / "bf16.store").write_bytes(b"another")
    (home / "models" / "tiny" / "model.safetensors").write_bytes(b"not read by the native engine")
    assert version(home, vllm=VllmConfig(dtype="float32")) == before


@pytest.mark.parametrize(
    "other",
    [
        ModelSpec(model="tiny", weights=WeightFormat.BF16),
        ModelSpec(model="tiny", engines=(EngineSpec(settings={"device": "cuda"}),)),
        BOTH,
        ModelSpec(model="tiny", engines=(EngineSpec(), EngineSpec())),
        ModelSpec(model="tiny", adapters={"a": None}, engines=(EngineSpec(engine="remote"),)),
        ModelSpec(model="other"),
    ],
)
def test_another_model_or_engine_is_another(home: Path, other: ModelSpec) -> None:
    assert version(home, other) != version(home)


def test_weights_that_were_made_again_are_others(home: Path) -> None:
    before = version(home)
    (home / "models" / "tiny" / "stores" / "nvfp4.store").write_bytes(b"\x01" * 40)
    assert version(home) != before


def test_a_checkpoint_that_changed_is_another_where_an_engine_reads_it(home: Path) -> None:
    before = version(home, BOTH)
    (home / "models" / "tiny" / "model.safetensors").write_bytes(b"other weights")
    assert version(home, BOTH) != before


def test_an_adapter_that_changed_is_another(home: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    spec = replace(BOTH, adapters={"a": str(adapter)})
    before = version(home, spec)
    (adapter / "adapter_model.safetensors").write_bytes(b"yy")
    assert version(home, spec) != before


def test_settings_of_all_engines_of_a_kind_count(home: Path) -> None:
    assert version(home, engine=EngineConfig(device="cuda")) != version(home)
    assert version(home, BOTH, vllm=VllmConfig(dtype="float32")) != version(home, BOTH)


def test_secrets_are_not_in_it(home: Path) -> None:
    spec = ModelSpec(model="far", engines=(EngineSpec(engine="remote", settings={"api_key": "geheim"}),))
    assert "geheim" not in version(home, spec)
