"""The stores that benchmarks run on."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from localmoe.bench import weights as weights_module
from localmoe.bench.shapes import SHAPES, BenchModel, find_model
from localmoe.bench.weights import DENSE_SPREAD, EXPERT_SPREAD, ensure_store
from localmoe.core.errors import CheckpointError, ConfigError, ModelBuildError
from localmoe.core.model import ExpertId, QkNorm, WeightFormat
from localmoe.formats.gguf import GGUFFile
from localmoe.formats.store import Store
from support.bench_models import EXPERT_SIZE, EXPERTS, LAYERS, TOP_K, write_config, write_moe_gguf

QUANTISED = [WeightFormat.MXFP4, WeightFormat.NVFP4, WeightFormat.INT8]


def quietly(stage: str, done: int, total: int) -> None:
    pass


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def tiny(tmp_path: Path, **changed: object) -> BenchModel:
    return find_model(str(write_config(tmp_path / "tiny.json", **changed)))


@pytest.mark.parametrize("weights", [*QUANTISED, WeightFormat.BF16])
def test_random_weights_are_as_wide_as_meant(tmp_path: Path, weights: WeightFormat) -> None:
    model = tiny(tmp_path)
    with Store.open(ensure_store(model, weights, tmp_path, quietly)) as store:
        store.verify(lambda done, total: None)
        assert (store.shape, store.weights) == (model.shape, weights)
        expert = store.read_expert(ExpertId(1, 2))
        # Powers of two come as near as a factor of the square root of two.
        for matrix in (expert.gate, expert.up, expert.down):
            assert EXPERT_SPREAD / 1.5 < rms(matrix.dequantize()) < EXPERT_SPREAD * 1.5
        q, o = (rms(store.dense_matrix(f"layers.0.{name}").dequantize()) for name in "qo")
        assert DENSE_SPREAD / 1.5 < q < DENSE_SPREAD * 1.5
        assert 0.003 < o / q < 0.008
        assert 0.018 < rms(store.dense_matrix("layers.1.router").dequantize()) < 0.022


def test_experts_differ_and_layers_route_differently(tmp_path: Path) -> None:
    with Store.open(ensure_store(tiny(tmp_path), WeightFormat.MXFP4, tmp_path, quietly)) as store:
        gates = {store.read_expert(ExpertId(0, e)).gate.values.numpy().tobytes() for e in range(EXPERTS)}
        routers = {store.dense_matrix(f"layers.{i}.router").values.numpy().tobytes() for i in range(LAYERS)}
    assert (len(gates), len(routers)) == (EXPERTS, LAYERS)


def test_quantised_formats_route_alike(tmp_path: Path) -> None:
    routers = set()
    for weights in QUANTISED:
        with Store.open(ensure_store(tiny(tmp_path), weights, tmp_path, quietly)) as store:
            routers.add(store.dense_matrix("layers.1.router").values.numpy().tobytes())
    assert len(routers) == 1


def test_sizes_that_need_padding(tmp_path: Path) -> None:
    model = tiny(tmp_path, vocab_size=90, head_dim=10, num_experts=5)
    with Store.open(ensure_store(model, WeightFormat.NVFP4, tmp_path, quietly)) as store:
        assert torch.isfinite(store.dense_matrix("head").dequantize()).all()


def test_a_store_is_written_once(tmp_path: Path) -> None:
    path = ensure_store(tiny(tmp_path), WeightFormat.MXFP4, tmp_path, quietly)
    assert path == tmp_path / "bench" / "tiny-mxfp4.store"
    written_ns = path.stat().st_mtime_ns
    assert ensure_store(tiny(tmp_path), WeightFormat.MXFP4, tmp_path, quietly) == path
    assert path.stat().st_mtime_ns == written_ns


@pytest.mark.parametrize("damage", ["other shape", "not a store"])
def test_a_store_that_is_not_this_one_is_written_again(tmp_path: Path, damage: str) -> None:
    path = ensure_store(tiny(tmp_path), WeightFormat.MXFP4, tmp_path, quietly)
    if damage == "not a store":
        path.write_bytes(b"something else")
    model = tiny(tmp_path, **({"num_experts": 4} if damage == "other shape" else {}))
    ensure_store(model, WeightFormat.MXFP4, tmp_path, quietly)
    with Store.open(path) as store:
        assert store.shape == model.shape


@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe"])
def test_gguf_weights_are_taken_over_exactly(tmp_path: Path, arch: str) -> None:
    source = write_moe_gguf(tmp_path / "m.gguf", arch)
    model, file = find_model(str(source)), GGUFFile.open(source)
    assert model.shape.qk_norm is (QkNorm.PROJECTION if arch == "olmoe" else QkNorm.HEAD)
    assert model.shape.norm_top_k is (arch == "qwen3moe")
    assert (model.shape.expert_size, model.shape.top_k) == (EXPERT_SIZE, TOP_K)
    with Store.open(ensure_store(model, WeightFormat.MXFP4, tmp_path, quietly)) as store:
        assert store.path == tmp_path / "bench" / "m.gguf-mxfp4.store"
        expert = store.read_expert(ExpertId(1, 5))
        for part, matrix in (("gate", expert.gate), ("up", expert.up), ("down", expert.down)):
            assert torch.equal(matrix.dequantize(), file.read(f"blk.1.ffn_{part}_exps.weight")[5])
        names = {
            "embed": "token_embd",
            "head": "output",
            "layers.1.k": "blk.1.attn_k",
            "layers.0.o": "blk.0.attn_output",
        }
        for ours, theirs in names.items():
            assert torch.equal(store.dense_matrix(ours).dequantize(), file.read(f"{theirs}.weight")), ours
        router = file.read("blk.1.ffn_gate_inp.weight")
        assert torch.equal(store.dense_matrix("layers.1.router").dequantize(), router.bfloat16().float())
        for ours, theirs in {"layers.1.k_norm": "blk.1.attn_k_norm", "final_norm": "output_norm"}.items():
            assert torch.equal(store.dense_vector(ours), file.read(f"{theirs}.weight"))


def test_another_gguf_of_the_same_name_is_read_again(tmp_path: Path) -> None:
    first = find_model(str(write_moe_gguf(tmp_path / "m.gguf", "olmoe")))
    ensure_store(first, WeightFormat.MXFP4, tmp_path, quietly)
    second = find_model(str(write_moe_gguf(tmp_path / "m.gguf", "olmoe", seed=1)))
    assert second.gguf is not None
    with Store.open(ensure_store(second, WeightFormat.MXFP4, tmp_path, quietly)) as store:
        assert torch.equal(store.dense_matrix("embed").dequantize(), second.gguf.read("token_embd.weight"))


def test_gguf_of_other_quantisation_is_refused(tmp_path: Path) -> None:
    model = find_model(str(write_moe_gguf(tmp_path / "m.gguf", "olmoe")))
    assert model.gguf is not None
    tensors = model.gguf.tensors
    tensors["output.weight"] = tensors["token_embd.weight"]
    tensors["blk.0.ffn_gate_exps.weight"], tensors["blk.0.attn_q.weight"] = (
        tensors["blk.0.attn_q.weight"],
        tensors["blk.0.ffn_gate_exps.weight"],
    )
    with pytest.raises(CheckpointError, match="is of shape"):
        ensure_store(model, WeightFormat.MXFP4, tmp_path, quietly)
    assert not list((tmp_path / "bench").iterdir())


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(weights_module.shutil, "disk_usage", lambda path: usage(9, 8, 1))
    with pytest.raises(ModelBuildError, match=r"GB are free; make room, or set LOCALMOE_HOME"):
        ensure_store(tiny(tmp_path), WeightFormat.MXFP4, tmp_path, quietly)


def test_known_shapes() -> None:
    olmoe, qwen3 = (find_model(name).shape for name in SHAPES)
    assert (olmoe.model_type, olmoe.num_layers, olmoe.num_experts, olmoe.expert_size) == ("olmoe", 16, 64, 1024)
    assert (olmoe.qk_norm, olmoe.norm_top_k) == (QkNorm.PROJECTION, False)
    assert (qwen3.model_type, qwen3.num_layers, qwen3.num_experts, qwen3.expert_size) == (
        "qwen3_moe",
        48,
        128,
        768,
    )
    assert (qwen3.qk_norm, qwen3.norm_top_k) == (QkNorm.HEAD, True)


def test_an_unknown_shape_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'olmo'; give olmoe-1b-7b, qwen3-30b-a3b, or the path"):
        find_model("olmo")


def test_config_json_is_named_after_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "some-model"
    directory.mkdir()
    assert find_model(str(write_config(directory / "config.json"))).name == "some-model"
