"""A dense Llama model out of a GGUF file, with Hugging Face's names and layout."""

from typing import Any

from torch import Tensor

from localmoe.core.errors import CheckpointError
from localmoe.formats.gguf import GGUFFile

_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` of the same model as `LlamaForCausalLM`.

    Raises:
        CheckpointError: not a Llama model, or a number of its architecture is missing.
    """
    if (architecture := file.value("general.architecture", str)) != "llama":
        raise CheckpointError(f"{file.path}: holds a {architecture!r:.40} model; only llama is read from GGUF")
    hidden_size = file.value("llama.embedding_length", int)
    heads = file.value("llama.attention.head_count", int)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id", int),
        "head_dim": file.metadata.get("llama.rope.dimension_count", hidden_size // heads),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": file.value("llama.feed_forward_length", int),
        "max_position_embeddings": file.value("llama.context_length", int),
        "num_attention_heads": heads,
        "num_hidden_layers": file.value("llama.block_count", int),
        "num_key_value_heads": file.metadata.get("llama.attention.head_count_kv", heads),
        # Stored as float32; the shortest decimal that means the same is what the author wrote.
        "rms_norm_eps": float(f"{file.value('llama.attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_theta": file.metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "vocab_size": file.value("llama.vocab_size", int),
    }


def llama_tensors(file: GGUFFile, config: dict[str, Any]) -> dict[str, Tensor]:
    """All weights under their Hugging Face names, dequantised and rounded to BF16.

    Raises:
        CheckpointError: a tensor is missing or cannot be dequantised.
    """
    names = dict(_WHOLE_MODEL)
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _PER_LAYER.items():
            names[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    tensors = {}
    for ours, theirs in names.items():
        tensor = file.read(ours)
        if ".attn_q." in ours:
            tensor = half_split(tensor, config["num_attention_heads"])
        elif ".attn_k." in ours:
            tensor = half_split(tensor, config["num_key_value_heads"])
        tensors[theirs] = tensor.bfloat16()
    return tensors


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder a projection's rows so that rotary pairs are (i, i + d/2) instead of (2i, 2i + 1) within a head.

    llama.cpp's converter interleaves the rows of Hugging Face's query and key projections; this is its inverse.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.view(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns)
