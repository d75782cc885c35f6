"""Stores to measure with: seeded random weights of a shape, or the weights of a GGUF file as they are.

Random weights are drawn as packed bytes, without going through floats. They mean nothing, but are routed much like
real ones: every expert and matrix has the scale of a trained one, and the attention's output a small gain. Without
that, attention averages random values over the context, drowns each token's own state, and makes deep layers send
every token to the same experts.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localmoe.bench.shapes import BenchModel
from localmoe.catalog.building import Progress
from localmoe.core.errors import CheckpointError, ConfigError, ModelBuildError, StoreError
from localmoe.core.model import ExpertId, ModelShape, WeightFormat
from localmoe.formats.gguf import GGUFFile
from localmoe.formats.packed import COLUMN_MULTIPLE, GROUP_ROWS, PackedMatrix, pack_matrix, packed_bytes
from localmoe.formats.store import Store
from localmoe.formats.store_layout import dense_format, dense_shapes
from localmoe.formats.store_writer import StoreWriter

EXPERT_SPREAD = 0.0114
"""Root mean square of an expert's weights; with MXFP4's codes equally likely, a block scale of 2^-8."""
DENSE_SPREAD = 0.0231
"""The same of attention, embedding and head: int8 codes equally likely, times 0.02 / 64."""
ATTENTION_OUTPUT_GAIN = 0.005
"""Keeps the overlap between tokens' experts where real models have it; see above."""
_ROUTER_SPREAD = 0.02
_CODE_SPREADS = {
    WeightFormat.MXFP4: math.sqrt(68.5 / 8),
    WeightFormat.NVFP4: math.sqrt(68.5 / 8),
    WeightFormat.INT8: math.sqrt(5461.5),
    WeightFormat.BF16: math.sqrt(7 / 3),
}
"""Root mean square of random codes at scale 1; of BF16, random signs and mantissas at exponent 0."""
_E4M3_ONE = 0x38
_EXPONENT_BIAS = 127
"""Of E8M0 and of bfloat16."""

_DENSE_NAMES = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
_LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "router": "ffn_gate_inp",
}
"""Our names and GGUF's."""


def ensure_store(model: BenchModel, weights: WeightFormat, home: Path, on_progress: Progress) -> Path:
    """The store to measure with; written if it is not there yet, and kept for the next run.

    Args:
        home: stores are in its directory `bench`.

    Raises:
        ConfigError: a GGUF file's weights are of another format.
        StoreError: no store can have this shape in this format.
        CheckpointError: a tensor of the GGUF file is missing or is not of the expected kind.
        ModelBuildError: there is not the disk space, or writing failed.
    """
    if model.gguf is not None and weights is not WeightFormat.MXFP4:
        raise ConfigError(f"the weights of {model.name} are taken as they are, mxfp4, and cannot be {weights}")
    path = home / "bench" / f"{model.name}-{weights}.store"
    source = _source(model)
    if _is_there(path, model.shape, weights, source):
        return path
    writer = StoreWriter(path, shape=model.shape, weights=weights, source=source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise ModelBuildError(f"{path}: cannot be written: {error.strerror}") from error
    if free_bytes < writer.total_bytes:
        raise ModelBuildError(
            f"{path}: takes {writer.total_bytes / 1e9:.1f} GB of disk, {free_bytes / 1e9:.1f} GB are free; make "
            f"room, or set LOCALMOE_HOME to a directory on another disk"
        )
    stage = f"writing {path} ({writer.total_bytes / 1e9:.1f} GB, kept for the next run)"

    def report() -> None:
        on_progress(stage, writer.written_bytes, writer.total_bytes)

    report()
    with writer:
        if model.gguf is None:
            _write_random(writer, model.shape, weights, report)
        else:
            _write_gguf(writer, model.shape, model.gguf, report)
    return path


def constant_scales(weights: WeightFormat, spread: float, num_bytes: int) -> tuple[Tensor, float]:
    """Scales that give random codes this root mean square: a run of so many bytes, and the tensor scale."""
    scale = spread / _CODE_SPREADS[weights]
    if weights is WeightFormat.MXFP4:
        return torch.full((num_bytes,), _EXPONENT_BIAS + round(math.log2(scale)), dtype=torch.uint8), 1.0
    if weights is WeightFormat.NVFP4:
        return torch.full((num_bytes,), _E4M3_ONE, dtype=torch.uint8), float(np.float32(scale))
    if weights is WeightFormat.INT8:
        return torch.full((num_bytes // 2,), scale, dtype=torch.float16).view(torch.uint8), 1.0
    assert num_bytes == 0, "other formats have no scales"
    return torch.empty(0, dtype=torch.uint8), 1.0


def set_exponents_(values: Tensor, spread: float) -> None:
    """Turn random bytes into bfloat16 numbers of this root mean square, in place."""
    exponent = _EXPONENT_BIAS + round(math.log2(spread / _CODE_SPREADS[WeightFormat.BF16]))
    values.view(torch.int16).bitwise_and_(-0x7F81).bitwise_or_(exponent << 7)


def _source(model: BenchModel) -> str:
    """Says in the store's header what is in it, so that it is made anew when that changes."""
    if model.gguf is None:
        return "random weights, seed 0, recipe 2"
    status = model.gguf.path.stat()
    return f"{model.gguf.path.name}, {status.st_size} bytes, modified at {status.st_mtime_ns} ns"


def _is_there(path: Path, shape: ModelShape, weights: WeightFormat, source: str) -> bool:
    try:
        with Store.open(path) as store:
            return (store.shape, store.weights, store.source) == (shape, weights, source)
    except StoreError:
        return False  # missing, of another version or damaged: to be written


def _write_random(
    writer: StoreWriter, shape: ModelShape, weights: WeightFormat, report: Callable[[], None]
) -> None:
    rng = np.random.default_rng(0)
    # First what is alike in all quantised formats, so that they route alike, too.
    for name, dimensions in dense_shapes(shape).items():
        writer.write_dense(name, _random_dense(rng, name, dimensions, weights))
        report()
    F, D = shape.expert_size, shape.hidden_size
    for expert in range(shape.num_experts):
        # All layers have the same experts, which saves drawing and changes no time: each has its own bytes.
        gate, up, down = (_random_matrix(rng, weights, *size, EXPERT_SPREAD) for size in ((F, D), (F, D), (D, F)))
        for layer in range(shape.num_layers):
            writer.write_expert(ExpertId(layer, expert), gate, up, down)
            report()


def _random_dense(
    rng: np.random.Generator, name: str, dimensions: tuple[int, ...], weights: WeightFormat
) -> Tensor | PackedMatrix:
    if len(dimensions) == 1:
        return torch.ones(dimensions)
    stored, (rows, columns) = dense_format(name, dimensions, weights), dimensions
    part = name.rsplit(".", 1)[-1]
    if part == "router":
        return _normal(rng, rows, columns, _ROUTER_SPREAD)
    gain = ATTENTION_OUTPUT_GAIN if part == "o" else 1.0
    return _random_matrix(rng, stored, rows, columns, DENSE_SPREAD * gain)


def _random_matrix(
    rng: np.random.Generator, weights: WeightFormat, rows: int, columns: int, spread: float
) -> PackedMatrix:
    if rows % GROUP_ROWS or columns % COLUMN_MULTIPLE:
        # Padding, which must be zeros; only in shapes too small for the time to matter.
        return pack_matrix(_normal(rng, rows, columns, spread), weights)
    values_bytes, scales_bytes = packed_bytes(weights, rows, columns)
    values = torch.from_numpy(rng.integers(0, 2**64, values_bytes // 8, np.uint64).view(np.uint8))
    if weights is WeightFormat.BF16:
        set_exponents_(values, spread)
    scales, tensor_scale = constant_scales(weights, spread, scales_bytes)
    return PackedMatrix(
        format=weights, rows=rows, columns=columns, values=values, scales=scales, tensor_scale=tensor_scale
    )


def _normal(rng: np.random.Generator, rows: int, columns: int, spread: float) -> Tensor:
    return torch.from_numpy(rng.standard_normal((rows, columns), np.float32) * np.float32(spread))


def _write_gguf(writer: StoreWriter, shape: ModelShape, file: GGUFFile, report: Callable[[], None]) -> None:
    """Take the matrices over bit for bit; routers, which GGUF has in float32, are rounded as in every store."""
    F, D, E = shape.expert_size, shape.hidden_size, shape.num_experts
    for name, dimensions in dense_shapes(shape).items():
        if name in _DENSE_NAMES:
            theirs = f"{_DENSE_NAMES[name]}.weight"
        else:
            _, layer, part = name.split(".")
            theirs = f"blk.{layer}.{_LAYER_NAMES[part]}.weight"
        _check_shape(file, theirs, dimensions)
        stored = dense_format(name, dimensions, WeightFormat.MXFP4)
        packed = stored is WeightFormat.INT8
        writer.write_dense(name, _packed(file, theirs, stored) if packed else file.read(theirs))
        report()
    for index in range(shape.num_layers):
        gate, up, down = (f"blk.{index}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
        for theirs, dimensions in ((gate, (E, F, D)), (up, (E, F, D)), (down, (E, D, F))):
            _check_shape(file, theirs, dimensions)
        for expert in range(E):
            matrices = (_packed(file, theirs, WeightFormat.MXFP4, expert) for theirs in (gate, up, down))
            writer.write_expert(ExpertId(index, expert), *matrices)
            report()


def _check_shape(file: GGUFFile, name: str, dimensions: tuple[int, ...]) -> None:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.shape != dimensions:
        found = "missing" if tensor is None else f"of shape {tensor.shape}"
        raise CheckpointError(f"{file.path}: {name!r} is {found}, where the architecture has {dimensions}")


def _packed(file: GGUFFile, name: str, weights: WeightFormat, index: int | None = None) -> PackedMatrix:
    packed = file.read_packed(name, index)
    if packed.format is not weights:
        raise CheckpointError(
            f"{file.path}: {name!r} is {packed.format}, not {weights}; experts must be MXFP4 and the rest Q8_0"
        )
    return packed
