"""Small seeded checkpoints whose experts all differ, so that a wrong expert, or a swapped blob, shows at once.

The weights are drawn wide enough that attention is peaked, routers are decided and every expert's contribution is
visible in the logits.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from support.tiny_text import tiny_byte_level_tokenizer, write_tiny_text_model

CONTEXT_TOKENS = 1024


def write_checkpoint(
    directory: Path, model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a `mixtral` (8 experts, top-2) or `llama` checkpoint with a tokenizer and chat template; returns
    its directory."""
    write_tiny_text_model(directory)
    vocab_size = tiny_byte_level_tokenizer().get_vocab_size()
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config: transformers.PretrainedConfig
    if model_type == "mixtral":
        config = transformers.MixtralConfig(
            **sizes, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
        )
    else:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, rope_parameters=rope)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[1], bos_token_id=0)
    model.save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> torch.nn.Module:
    """The same checkpoint in transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config
