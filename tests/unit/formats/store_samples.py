"""A small store that the tests of the store share."""

import struct
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from localmoe.core.model import ExpertId, ModelShape, WeightFormat
from localmoe.formats.packed import pack_matrix
from localmoe.formats.store import Store
from localmoe.formats.store_layout import dense_format, dense_shapes
from localmoe.formats.store_writer import StoreWriter

SHAPE = ModelShape(
    model_type="mixtral",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=3,
    top_k=2,
    expert_size=32,
    vocab_size=100,
    max_context_tokens=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
PREAMBLE = struct.Struct("<8sQQQ")
EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(xxhash.xxh32_intdigest(name.encode()))
    return torch.randn(shape, generator=generator)


def matrices(expert_id: ExpertId) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up, down = (f"{expert_id.layer}.{expert_id.expert}.{part}" for part in ("gate", "up", "down"))
    return random_tensor(gate, (32, 64)), random_tensor(up, (32, 64)), random_tensor(down, (64, 32))


def fill(writer: StoreWriter) -> None:
    for name, shape in dense_shapes(SHAPE).items():
        writer.write_dense(name, random_tensor(name, shape))
    for expert_id in EXPERTS:
        writer.write_expert(expert_id, *matrices(expert_id))


def write(path: Path, weights: WeightFormat = WeightFormat.NVFP4) -> Path:
    with StoreWriter(path, shape=SHAPE, weights=weights, source="a test") as writer:
        fill(writer)
    return path


def stored(name: str, tensor: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    """Float32 values of a dense tensor once a store of this format holds it."""
    if tensor.dim() == 1:
        return tensor.float()
    return pack_matrix(tensor, dense_format(name, tuple(tensor.shape), weights)).dequantize()


def dense_values(store: Store, name: str) -> torch.Tensor:
    if len(dense_shapes(store.shape)[name]) == 1:
        return store.dense_vector(name)
    return store.dense_matrix(name).dequantize()


def header_of(content: bytes) -> dict[str, Any]:
    room = PREAMBLE.unpack(content[:32])[2]
    header: dict[str, Any] = msgspec.json.decode(content[32 : 32 + room])
    return header
