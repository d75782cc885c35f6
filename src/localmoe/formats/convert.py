"""From a checkpoint to an expert store, one tensor or expert at a time."""

from collections.abc import Callable
from pathlib import Path

import torch

from localmoe.core.errors import CheckpointError
from localmoe.core.model import ExpertId, ModelShape, TensorNames, WeightFormat
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.store_layout import dense_shapes
from localmoe.formats.store_writer import StoreWriter

_TIED_HEAD = "lm_head.weight"
"""Some writers repeat the embedding under this name."""
_ROTARY_BUFFER = "rotary_emb.inv_freq"
"""Old checkpoints hold what the configuration already says."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def write_store(
    checkpoint: Checkpoint,
    names: TensorNames,
    shape: ModelShape,
    weights: WeightFormat,
    path: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Convert a checkpoint. No more than one dense tensor or one expert is in memory at a time.

    Args:
        on_progress: called with the bytes of weights written to the store so far and their total.

    Raises:
        CheckpointError: a tensor is missing, is none of the architecture's, has another shape than the model's, is
            not of 16- or 32-bit floats, or holds NaN or infinite values.
        StoreError: no store can have this shape in this format, as when its columns are not whole blocks.
        ModelBuildError: writing failed; nothing half-made is left at `path`.
    """
    writer = StoreWriter(path, shape=shape, weights=weights, source=checkpoint.source)
    _check_tensors(checkpoint, names, shape)
    with writer:
        for name, tensor_name in names.dense.items():
            _convert_dense(checkpoint, writer, name, tensor_name)
            on_progress(writer.written_bytes, writer.total_bytes)
        for expert_id, tensor_names in names.experts.items():
            _convert_expert(checkpoint, writer, expert_id, tensor_names)
            on_progress(writer.written_bytes, writer.total_bytes)


# Functions of their own, so that one piece is let go before the next is read.


def _convert_dense(checkpoint: Checkpoint, writer: StoreWriter, name: str, tensor_name: str) -> None:
    tensor = _read(checkpoint, tensor_name)
    try:
        writer.write_dense(name, tensor)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: tensor {tensor_name}: {error}") from error


def _convert_expert(
    checkpoint: Checkpoint, writer: StoreWriter, expert_id: ExpertId, tensor_names: tuple[str, str, str]
) -> None:
    gate_FD, up_FD, down_DF = (_read(checkpoint, tensor_name) for tensor_name in tensor_names)
    try:
        writer.write_expert(expert_id, gate_FD, up_FD, down_DF)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: one of {', '.join(tensor_names)}: {error}") from error


def _check_tensors(checkpoint: Checkpoint, names: TensorNames, shape: ModelShape) -> None:
    """Before anything is written, hold the checkpoint's tensors against the model's shape."""
    implied = dense_shapes(shape)
    assert names.dense.keys() == implied.keys()
    assert len(names.experts) == shape.num_layers * shape.num_experts
    F, D = shape.expert_size, shape.hidden_size
    wanted = [(tensor_name, implied[name]) for name, tensor_name in names.dense.items()]
    for gate, up, down in names.experts.values():
        wanted += [(gate, (F, D)), (up, (F, D)), (down, (D, F))]
    # A bias that nothing adds, say, would make every answer wrong without a word.
    known = {tensor_name for tensor_name, _ in wanted} | ({_TIED_HEAD} if shape.tie_embeddings else set())
    if unknown := [name for name in checkpoint.names - known if not name.endswith(_ROTARY_BUFFER)]:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unknown)} tensors are none of {shape.model_type}'s, such as {min(unknown)}"
        )
    for tensor_name, expected in wanted:
        if tensor_name not in checkpoint.names:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {tensor_name}, expected of shape {expected}")
        found = checkpoint.shape_of(tensor_name)
        if found != expected:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {tensor_name} has shape {found}, its configuration implies {expected}"
            )


def _read(checkpoint: Checkpoint, tensor_name: str) -> torch.Tensor:
    tensor = checkpoint.read(tensor_name)
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {tensor_name} is {tensor.dtype}, not bfloat16, float16 or float32"
        )
    return tensor
