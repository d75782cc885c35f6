"""What `--shape` may name: a shape known here, a `config.json`, or a GGUF file with its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.core.errors import CheckpointError, ConfigError
from localmoe.core.model import ModelShape
from localmoe.formats.files import read_json_object
from localmoe.formats.gguf import GGUFFile
from localmoe.models import architecture

OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "norm_topk_prob": False,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
}
SHAPES = {"olmoe-1b-7b": OLMOE, "qwen3-30b-a3b": QWEN3}

GGUF_MODEL_TYPES = {"olmoe": "olmoe", "qwen3moe": "qwen3_moe"}
"""GGUF's architectures and ours. Both rotate halves of heads, so that no rows need to be reordered."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model to measure."""

    name: str
    """For reports and for the store's file."""
    shape: ModelShape
    gguf: GGUFFile | None = None
    """Where the weights are; None: they are drawn at random."""
    tokenizer_path: Path | None = None
    """Directory of its tokenizer, where it has one."""


def find_model(spec: str) -> BenchModel:
    """The model that a name or a path stands for.

    Raises:
        ConfigError: neither a known name nor a file of a kind that is read.
        CheckpointError: the file cannot be read, or its architecture is not supported.
    """
    if spec in SHAPES:
        return BenchModel(name=spec, shape=_parse(SHAPES[spec]))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        file = GGUFFile.open(path)
        return BenchModel(name=path.name, shape=_parse(_gguf_config(file)), gguf=file)
    if path.suffix == ".json":
        name = path.resolve().parent.name if path.stem == "config" else path.stem
        has_tokenizer = (path.parent / "tokenizer.json").exists()
        return BenchModel(
            name=name,
            shape=_parse(read_json_object(path)),
            tokenizer_path=path.parent if has_tokenizer else None,
        )
    raise ConfigError(
        f"--shape is {spec!r}; give {', '.join(SHAPES)}, or the path of a config.json or a GGUF file"
    )


def _parse(config: dict[str, Any]) -> ModelShape:
    return architecture(config).parse_shape(config)


def _gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` of the same model."""
    arch = file.value("general.architecture", str)
    if arch not in GGUF_MODEL_TYPES:
        raise CheckpointError(
            f"{file.path}: holds a {arch!r:.40} model; {' and '.join(GGUF_MODEL_TYPES)} are read from GGUF"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: has no tensor 'token_embd.weight'")
    expert_size = file.metadata.get(f"{arch}.expert_feed_forward_length")
    if expert_size is None:
        expert_size = file.value(f"{arch}.feed_forward_length", int)
    return {
        "model_type": GGUF_MODEL_TYPES[arch],
        "num_hidden_layers": file.value(f"{arch}.block_count", int),
        "hidden_size": file.value(f"{arch}.embedding_length", int),
        "num_attention_heads": file.value(f"{arch}.attention.head_count", int),
        "num_key_value_heads": file.value(f"{arch}.attention.head_count_kv", int),
        "head_dim": file.metadata.get(f"{arch}.attention.key_length"),
        "num_experts": file.value(f"{arch}.expert_count", int),
        "num_experts_per_tok": file.value(f"{arch}.expert_used_count", int),
        "intermediate_size": expert_size,
        "moe_intermediate_size": expert_size,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": file.value(f"{arch}.context_length", int),
        "rms_norm_eps": file.value(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.metadata.get(f"{arch}.rope.freq_base", 1e4),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        # GGUF does not say: llama.cpp, too, knows it by the architecture.
        "norm_topk_prob": arch == "qwen3moe",
    }
