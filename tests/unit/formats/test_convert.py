"""From a safetensors checkpoint to a store: everything is checked first, and only what was asked for arrives."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from store_samples import EXPERTS, SHAPE, dense_values, matrices, random_tensor, stored

from localmoe.core.errors import CheckpointError, ModelBuildError, StoreError
from localmoe.core.model import ExpertId, ModelShape, TensorNames, WeightFormat
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.convert import write_store
from localmoe.formats.packed import pack_matrix
from localmoe.formats.store import Store
from localmoe.formats.store_layout import dense_shapes

NAMES = TensorNames(
    dense={name: f"model.{name}.weight" for name in dense_shapes(SHAPE)},
    experts={id_: tuple(f"{id_.layer}.{id_.expert}.{part}" for part in ("w1", "w3", "w2")) for id_ in EXPERTS},
)
LOSS = {
    WeightFormat.NVFP4: 0.15,
    WeightFormat.MXFP4: 0.15,
    WeightFormat.INT8: 0.01,
    WeightFormat.BF16: 1e-9,  # the checkpoint's experts are bfloat16
    WeightFormat.F32: 1e-9,
}
"""Mean errors on numbers of the standard normal distribution stay below these."""
Tensors = dict[str, torch.Tensor]


def quiet(done_bytes: int, total_bytes: int) -> None:
    pass


@pytest.fixture
def tensors() -> Tensors:
    tensors = {NAMES.dense[name]: random_tensor(name, shape).half() for name, shape in dense_shapes(SHAPE).items()}
    for expert_id, names in NAMES.experts.items():
        parts = (part.bfloat16() for part in matrices(expert_id))
        tensors.update(zip(names, parts, strict=True))
    return tensors


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Saves tensors as a checkpoint and converts it; whatever happens, only `m.store` may appear beside it."""

    def convert(tensors: Tensors, shape: ModelShape = SHAPE, weights: WeightFormat = WeightFormat.NVFP4) -> Path:
        directory = tmp_path / "checkpoint"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
        save_file(tensors, directory / "model.safetensors")
        path = tmp_path / "m.store"
        try:
            write_store(Checkpoint.open(directory), NAMES, shape, weights, path, quiet)
        except Exception:
            assert list(tmp_path.iterdir()) == [directory]
            raise
        return path

    return convert


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_store_holds_the_checkpoint(convert: Callable[..., Path], tensors: Tensors, weights: WeightFormat) -> None:
    with Store.open(convert(tensors, weights=weights)) as store:
        assert store.weights is weights
        assert store.source == "checkpoint (mixtral)"
        for name in dense_shapes(SHAPE):
            assert torch.equal(dense_values(store, name), stored(name, tensors[NAMES.dense[name]], weights))
        for expert_id in EXPERTS:
            found_parts = store.read_expert(expert_id).dequantize(torch.float32)
            for found, name in zip(found_parts, NAMES.experts[expert_id], strict=True):
                assert torch.equal(found, pack_matrix(tensors[name], weights).dequantize())
                assert (found - tensors[name].float()).abs().mean() < LOSS[weights]


def test_progress_counts_bytes_up_to_the_total(
    tmp_path: Path, convert: Callable[..., Path], tensors: Tensors
) -> None:
    convert(tensors)
    calls: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    write_store(
        checkpoint,
        NAMES,
        SHAPE,
        WeightFormat.NVFP4,
        tmp_path / "again",
        lambda done, total: calls.append((done, total)),
    )
    assert len(calls) == len(NAMES.dense) + len(NAMES.experts)
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]
    assert {total for _, total in calls} == {calls[-1][1]}


def test_only_one_piece_is_held_at_a_time(
    convert: Callable[..., Path], tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    real = Checkpoint.read
    most = 0

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = real(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    convert(tensors)
    assert most == 3  # an expert's matrices


@pytest.mark.parametrize("name", ["model.layers.1.q.weight", "1.2.w3"])
def test_missing_tensor_is_named(convert: Callable[..., Path], tensors: Tensors, name: str) -> None:
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"checkpoint: has no tensor {name}, expected of shape"):
        convert(tensors)


def test_tensor_that_nothing_would_compute_is_refused(convert: Callable[..., Path], tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(7)
    with pytest.raises(CheckpointError, match=r"1 tensors are none of \w+'s, such as .*q_proj\.bias"):
        convert(tensors)


def test_rotary_buffers_of_old_checkpoints_are_left_out(convert: Callable[..., Path], tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(7)
    assert convert(tensors).exists()


@pytest.mark.parametrize("name", ["model.embed.weight", "0.1.w2"])
def test_tensor_of_another_shape_is_named_with_both_shapes(
    convert: Callable[..., Path], tensors: Tensors, name: str
) -> None:
    expected = tuple(tensors[name].shape)
    tensors[name] = torch.ones(7, 5)
    with pytest.raises(CheckpointError) as caught:
        convert(tensors)
    assert f"tensor {name} has shape (7, 5), its configuration implies {expected}" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_tensor_that_is_not_of_plain_floats_is_refused(
    convert: Callable[..., Path], tensors: Tensors, dtype: torch.dtype
) -> None:
    tensors["1.2.w3"] = tensors["1.2.w3"].to(dtype)
    with pytest.raises(CheckpointError, match=rf"tensor 1\.2\.w3 is {dtype}, not bfloat16"):
        convert(tensors)


@pytest.mark.parametrize("name", ["model.final_norm.weight", "1.2.w3"])
@pytest.mark.parametrize("weights", [WeightFormat.NVFP4, WeightFormat.BF16])
def test_nan_is_refused_and_its_tensor_named(
    convert: Callable[..., Path], tensors: Tensors, name: str, weights: WeightFormat
) -> None:
    tensors[name].view(-1)[3] = torch.nan
    with pytest.raises(CheckpointError, match=rf"checkpoint: .*{name}.*NaN or infinite"):
        convert(tensors, weights=weights)


def test_columns_that_blocks_do_not_divide_are_named(convert: Callable[..., Path], tensors: Tensors) -> None:
    shape = msgspec.structs.replace(SHAPE, expert_size=24)
    for expert_id, names in NAMES.experts.items():
        gate, up, down = (part.contiguous() for part in matrices(expert_id))
        parts = (gate[:24], up[:24], down[:, :24].contiguous())
        tensors.update(zip(names, parts, strict=True))
    with pytest.raises(
        StoreError, match="expert_size 24 does not divide into blocks of 32, as nvfp4 needs; choose bf16"
    ):
        convert(tensors, shape)


def test_columns_of_any_number_do_for_bf16(convert: Callable[..., Path], tensors: Tensors) -> None:
    shape = msgspec.structs.replace(SHAPE, expert_size=23)
    for expert_id, names in NAMES.experts.items():
        gate, up, down = matrices(expert_id)
        tensors.update(zip(names, (gate[:23], up[:23], down[:, :23].contiguous()), strict=True))
    with Store.open(convert(tensors, shape, WeightFormat.BF16)) as store:
        found = store.read_expert(ExpertId(1, 1)).dequantize(torch.bfloat16)
        for part, name in zip(found, NAMES.experts[ExpertId(1, 1)], strict=True):
            assert torch.equal(part, tensors[name].bfloat16())


def test_failing_write_is_reported_with_the_stores_path(
    convert: Callable[..., Path], tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ModelBuildError, match=r"m\.store: .*No space left on device"):
        convert(tensors)
