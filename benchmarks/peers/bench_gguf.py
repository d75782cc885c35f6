"""Write a GGUF file of a mixture-of-experts shape filled with seeded random blocks, for timing engines on it.

    python benchmarks/peers/bench_gguf.py olmoe-1b-7b mxfp4 ~/peers/olmoe-mxfp4.gguf
    python benchmarks/peers/bench_gguf.py olmoe-1b-7b q4_0 ~/peers/tiny-q4_0.gguf --layers 2

The weights mean nothing, so the file tells about speed and never about quality. Dense matrices are Q8_0, experts are
of the named format, as in llama.cpp's own MXFP4_MOE recipe. Every layer holds the same random bytes, so that a 16 GB
file is made in little memory; nothing is shared within the file itself.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from msgspec.structs import replace
from numpy.typing import NDArray

from localmoe.bench.shapes import GGUF_MODEL_TYPES, SHAPES, find_model
from localmoe.bench.weights import ATTENTION_OUTPUT_GAIN
from localmoe.core.model import ModelShape, QkNorm

ARCHITECTURES = {model_type: name for name, model_type in GGUF_MODEL_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """A ggml block: a constant prefix that holds its scales, then random bytes that hold its elements."""

    quantization: GGMLQuantizationType
    prefix: bytes

    def random_rows(self, rng: np.random.Generator, *shape: int) -> NDArray[np.uint8]:
        """Blocks for a tensor of shape [..., columns]; uint8 [..., bytes per row]."""
        block_elements, block_bytes = GGML_QUANT_SIZES[self.quantization]
        assert shape[-1] % block_elements == 0
        num_blocks = int(np.prod(shape)) // block_elements
        blocks = np.empty((num_blocks, block_bytes), np.uint8)
        blocks[:, : len(self.prefix)] = np.frombuffer(self.prefix, np.uint8)
        num_random = block_bytes - len(self.prefix)
        blocks[:, len(self.prefix) :] = rng.integers(0, 256, (num_blocks, num_random), np.uint8)
        return blocks.reshape(*shape[:-1], -1)


def _half(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


def q8_0(gain: float = 1.0) -> BlockFormat:
    """int8 times a float16 scale, at a standard deviation of about 0.023 times `gain`."""
    return BlockFormat(quantization=GGMLQuantizationType.Q8_0, prefix=_half(gain * 0.02 / 64))


# All at a standard deviation of 0.02 or so (MXFP4: 0.011). Q4_K's twelve bytes are its eight 6-bit scales and its
# eight minimums, all 32; its two factors centre the elements 0 to 15 on zero.
EXPERT_FORMATS = {
    "mxfp4": BlockFormat(quantization=GGMLQuantizationType.MXFP4, prefix=bytes([119])),  # E8M0: 2 ** -8
    "q4_0": BlockFormat(quantization=GGMLQuantizationType.Q4_0, prefix=_half(0.02 / 4)),
    "iq4_nl": BlockFormat(quantization=GGMLQuantizationType.IQ4_NL, prefix=_half(0.02 / 64)),
    "q4_k": BlockFormat(
        quantization=GGMLQuantizationType.Q4_K,
        prefix=_half(0.02 / 4 / 32, 7.5 * 0.02 / 4 / 32) + bytes([160] * 8 + [0] * 4),
    ),
}


def write_gguf(path: Path, shape: ModelShape, expert_format: str, seed: int = 0) -> None:
    """Write the file; under another name first, so that an interrupted run leaves nothing that looks whole."""
    partial = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial, ARCHITECTURES[shape.model_type])
    _add_metadata(writer, shape)
    _add_tensors(writer, shape, EXPERT_FORMATS[expert_format], np.random.default_rng(seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _add_metadata(writer: GGUFWriter, shape: ModelShape) -> None:
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_context_tokens)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.expert_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    if shape.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(shape.expert_size)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}".encode() for i in range(shape.vocab_size)])
    writer.add_token_types([1] * shape.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _add_tensors(
    writer: GGUFWriter, shape: ModelShape, expert_format: BlockFormat, rng: np.random.Generator
) -> None:
    def add_blocks(name: str, blocks: NDArray[np.uint8], quantization: GGMLQuantizationType) -> None:
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=quantization)

    def add_ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    hidden, experts, width = shape.hidden_size, shape.num_experts, shape.expert_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    q8 = GGMLQuantizationType.Q8_0
    add_blocks("token_embd", q8_0().random_rows(rng, shape.vocab_size, hidden), q8)
    add_blocks("output", q8_0().random_rows(rng, shape.vocab_size, hidden), q8)
    add_ones("output_norm", hidden)
    attention = {
        "attn_q": q8_0().random_rows(rng, q_size, hidden),
        "attn_k": q8_0().random_rows(rng, kv_size, hidden),
        "attn_v": q8_0().random_rows(rng, kv_size, hidden),
        "attn_output": q8_0(ATTENTION_OUTPUT_GAIN).random_rows(rng, hidden, q_size),
    }
    banks = {
        "ffn_gate_exps": expert_format.random_rows(rng, experts, width, hidden),
        "ffn_up_exps": expert_format.random_rows(rng, experts, width, hidden),
        "ffn_down_exps": expert_format.random_rows(rng, experts, hidden, width),
    }
    whole = shape.qk_norm is QkNorm.PROJECTION
    norms = {
        "attn_q_norm": q_size if whole else shape.head_dim,
        "attn_k_norm": kv_size if whole else shape.head_dim,
        "attn_norm": hidden,
        "ffn_norm": hidden,
    }
    for layer in range(shape.num_layers):
        for name, blocks in attention.items():
            add_blocks(f"blk.{layer}.{name}", blocks, q8)
        for name, size in norms.items():
            add_ones(f"blk.{layer}.{name}", size)
        router = rng.standard_normal((experts, hidden), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
        for name, blocks in banks.items():
            add_blocks(f"blk.{layer}.{name}", blocks, expert_format.quantization)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("format", choices=EXPERT_FORMATS, help="of the experts; everything else is Q8_0")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    args = parser.parse_args(argv)
    shape = find_model(args.shape).shape
    write_gguf(args.out, replace(shape, num_layers=args.layers or shape.num_layers), args.format)


if __name__ == "__main__":
    main()
