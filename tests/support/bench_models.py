"""Models small enough to measure in a test."""

import json
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, EXPERT_SIZE, VOCAB = 2, 64, 4, 2, 16, 16, 3, 32, 96


def write_config(path: Path, **changed: object) -> Path:
    """The `config.json` of a tiny OLMoE."""
    config: dict[str, object] = {
        "model_type": "olmoe",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "intermediate_size": EXPERT_SIZE,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
    }
    path.write_text(json.dumps(config | changed))
    return path


def write_moe_gguf(path: Path, arch: str, *, seed: int = 0) -> Path:
    """Random weights of the same sizes, as olmoe or qwen3moe: experts MXFP4, routers and norms F32, the rest Q8_0."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    if arch == "qwen3moe":
        writer.add_feed_forward_length(999)
        writer.add_expert_feed_forward_length(EXPERT_SIZE)
    else:
        writer.add_feed_forward_length(EXPERT_SIZE)

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name + ".weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    f32, q8_0, mxfp4 = (getattr(gguf.GGMLQuantizationType, kind) for kind in ("F32", "Q8_0", "MXFP4"))
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    q_norm, k_norm = (q_size, kv_size) if arch == "olmoe" else (HEAD_DIM, HEAD_DIM)
    add("token_embd", (VOCAB, HIDDEN), q8_0)
    add("output", (VOCAB, HIDDEN), q8_0)
    add("output_norm", (HIDDEN,), f32)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        add(prefix + "attn_q", (q_size, HIDDEN), q8_0)
        add(prefix + "attn_k", (kv_size, HIDDEN), q8_0)
        add(prefix + "attn_v", (kv_size, HIDDEN), q8_0)
        add(prefix + "attn_output", (HIDDEN, q_size), q8_0)
        add(prefix + "attn_q_norm", (q_norm,), f32)
        add(prefix + "attn_k_norm", (k_norm,), f32)
        add(prefix + "attn_norm", (HIDDEN,), f32)
        add(prefix + "ffn_norm", (HIDDEN,), f32)
        add(prefix + "ffn_gate_inp", (EXPERTS, HIDDEN), f32)
        add(prefix + "ffn_gate_exps", (EXPERTS, EXPERT_SIZE, HIDDEN), mxfp4)
        add(prefix + "ffn_up_exps", (EXPERTS, EXPERT_SIZE, HIDDEN), mxfp4)
        add(prefix + "ffn_down_exps", (EXPERTS, HIDDEN, EXPERT_SIZE), mxfp4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
