"""Small seeded checkpoints whose experts all differ, so that a wrong expert, or a swapped blob, shows at once.

The weights are drawn wide enough that attention is peaked, routers are decided and every expert's contribution is
visible in the logits. Norms differ too, from each other and from one element to the next.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from support.tiny_text import tiny_byte_level_tokenizer, write_tiny_text_model

CONTEXT_TOKENS = 1024

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_CONFIGS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama": partial(
        transformers.LlamaConfig,
        num_hidden_layers=3,
        intermediate_size=96,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "mixtral": partial(
        transformers.MixtralConfig,
        num_hidden_layers=3,
        intermediate_size=96,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    ),
    "olmoe": partial(
        transformers.OlmoeConfig,
        num_hidden_layers=2,
        intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    ),
    "qwen3_moe": partial(
        transformers.Qwen3MoeConfig,
        num_hidden_layers=2,
        intermediate_size=96,
        moe_intermediate_size=64,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
}


def write_checkpoint(
    directory: Path, model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> Path:
    """Write a checkpoint of an architecture, with a tokenizer and chat template; returns its directory.

    `llama` has Llama 3's rotary scaling and ties its embeddings; `mixtral` has 8 experts, top-2; `olmoe` 8, top-3,
    whose weights do not sum to one; `qwen3_moe` 4, top-2, and heads wider than the hidden size divides into. Some
    engines take only some sizes, which `sizes` are, in the words of the architecture's configuration.
    """
    write_tiny_text_model(directory)
    config = _CONFIGS[model_type](
        vocab_size=tiny_byte_level_tokenizer().get_vocab_size(),
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **sizes,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[1], bos_token_id=0)
    model.save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> torch.nn.Module:
    """The same checkpoint in transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def greedy_reference(
    directory: Path, prompts: Sequence[list[int]], num_tokens: int, eos_token_ids: Sequence[int] = ()
) -> list[list[int]]:
    """What transformers generates, in float32, after each prompt: so many tokens, or up to an end token."""
    model: Any = load_reference(directory)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=list(eos_token_ids) or None,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config
