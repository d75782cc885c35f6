"""Keys of the project's first design documents: what became of each, and why.

Their files load as they are, see `migration.py`: a key sets what took its place, or nothing at all, and a note says
which. Where the documents had no such key, or a file is said to be of today, it is refused with the reason. The same
table for people is in `docs/settings.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from localmoe.backends import deepspeed_config, vllm_config


@dataclass(frozen=True, kw_only=True)
class TuningKey:
    """One key of the two tuning blocks."""

    kind: type
    """Of its value: int, float or bool."""
    setting: tuple[str, ...] | None = None
    """What takes the value; None: nothing does."""
    note: str
    """What became of it."""


TUNING_BLOCKS: Mapping[str, Mapping[str, TuningKey]] = {
    "memory_config": {
        "max_gpu_layers": TuningKey(
            kind=int,
            note="what fits is found from bytes (engine.tiers.ram_bytes), not from a number of layers; ignored",
        ),
        "prefetch_layers": TuningKey(
            kind=int, setting=("engine", "tiers", "prefetch_layers"), note="taken as engine.tiers.prefetch_layers"
        ),
        "expert_threshold": TuningKey(
            kind=float,
            note="not applied: skipping experts changes answers (lossy), and it was meant for sigmoid probabilities; "
            "write engine.expert_threshold, a share of the chosen experts' weights, to have it",
        ),
        "min_batch_size": TuningKey(kind=int, note="continuous batching does not wait; ignored"),
        "max_batch_size": TuningKey(
            kind=int, setting=("engine", "max_num_seqs"), note="taken as engine.max_num_seqs"
        ),
        "dynamic_batch": TuningKey(
            kind=bool, note="always on: each step takes whatever is there (continuous batching); ignored"
        ),
    },
    "compute_config": {
        "enable_fusion": TuningKey(kind=bool, note="always on: the kernels are fused; ignored"),
        "overlap_io": TuningKey(
            kind=bool, note="always on: experts are computed while others are being read; ignored"
        ),
        "overlap_compute": TuningKey(
            kind=bool, note="always on: what is present is computed while the rest arrives; ignored"
        ),
        "use_cuda_graph": TuningKey(
            kind=bool, note="always on where a GPU holds all experts, and the CPU kernels launch nothing; ignored"
        ),
        "use_parallel_compute": TuningKey(
            kind=bool, note="always on, with engine.num_threads threads, one per physical core by default; ignored"
        ),
        "auto_tune": TuningKey(
            kind=bool,
            note="always on: instructions, disk requests, reading ahead and speculation go by measurements; ignored",
        ),
        "adaptive_schedule": TuningKey(
            kind=bool, note="always on: each step is scheduled anew, and its reads as they end; ignored"
        ),
    },
}

_TRAINING = "it belongs to training; inference has no loss to scale"
_FROM_CHECKPOINT = "a language model's sizes come from its checkpoint"
_PLACEMENT = "experts are placed by what keeping them is worth, within engine.tiers.ram_bytes"
_NO_WAITING = "continuous batching does not wait; engine.max_num_seqs bounds a step"

RETIRED_KEYS: Mapping[str, str] = {
    "swap_space": "vLLM has none since 0.18 and recomputes instead; experts that do not fit stay on disk here",
    "use_v2_block_manager": "it is always on, and vLLM has removed the flag",
    "max_chunked_prefill_tokens": "engine.max_num_batched_tokens took its place",
    "max_waiting_time": _NO_WAITING,
    "min_batch_size": _NO_WAITING,
    "max_batch_size": "engine.max_num_seqs took its place",
    "max_num_blocks": "the cache is given in bytes: engine.kv_cache_bytes",
    "loss_scale": _TRAINING,
    "initial_scale_power": _TRAINING,
    "offload_optimizer": "it belongs to training; weights are offloaded by engine.tiers",
    "gradient_checkpointing": "it belongs to training; chunked prefill bounds activations here "
    "(engine.max_num_batched_tokens)",
    "gradient_compression": "it belongs to training",
    "dropout": "it belongs to training",
    "torchscript": "TorchScript is deprecated; models are not compiled from Python here",
    "num_experts": _FROM_CHECKPOINT,
    "top_k_experts": _FROM_CHECKPOINT,
    "hidden_size": _FROM_CHECKPOINT,
    "intermediate_size": _FROM_CHECKPOINT,
    "max_sequence_length": f"{_FROM_CHECKPOINT}; engine.max_context_tokens lowers the context",
    "quantization": "SqueezeLLM is gone from vLLM; the format is chosen with --weights",
    "quantization_type": "the format is chosen when a model is converted or served, with --weights",
    "enable_compilation": "there is nothing to compile: the kernels are built with the package",
    "model": f"{_FROM_CHECKPOINT}; name the model on the command line",
    "zero_config": "it is DeepSpeed's own configuration",
    "expert_sharding": _PLACEMENT,
    "expert_memory_map": _PLACEMENT,
    "device_pairs": _PLACEMENT,
}

INSTANCES = "vllm_instances"
"""A list of models that vLLM serves."""
MODEL_NAME = "model_name"
"""Of a block of an engine: the model that it served."""
SIZES = "model"
"""A block of sizes."""
SIZES_KEYS = (
    *("num_experts", "top_k_experts", "hidden_size", "intermediate_size", "max_sequence_length"),
    *("quantization_type", "enable_compilation"),
)

RETIRED_KEYS_OF: Mapping[str, Mapping[str, str]] = {
    "vllm": vllm_config.RETIRED,
    "deepspeed": deepspeed_config.RETIRED,
    "models": {"name": "served_model_name took its place"},
}
"""By block, what became of a key there, where it is not what became of it elsewhere."""

MOVED_KEYS: Mapping[str, Mapping[str, str]] = {
    "vllm": {"max_chunked_prefill_tokens": "max_num_batched_tokens", "max_batch_size": "max_num_seqs"},
    "deepspeed": {"max_batch_size": "max_num_seqs"},
}
"""Of them, those whose value another setting takes."""

KNOWN_CONTEXT_TOKENS: Mapping[str, int] = {
    "microsoft/DialoGPT-medium": 1024,
    "meta-llama/Llama-2-70b-chat-hf": 4096,
    "mistralai/Mistral-7B-Instruct-v0.2": 32768,
    "codellama/CodeLlama-13b-Instruct-hf": 16384,
}
"""Longest sequences of the models that the documents name, as their own configurations have it."""
