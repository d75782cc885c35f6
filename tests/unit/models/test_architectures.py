"""What each architecture makes of a `config.json`, against transformers and against values it must refuse."""

from typing import Any

import pytest
import transformers

from localmoe.core.errors import CheckpointError
from localmoe.core.model import ExpertId, ModelShape, QkNorm
from localmoe.models import DECODERS, architecture

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
}
MINIMAL: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mixtral": SIZES,
    "olmoe": SIZES,
    "qwen3_moe": SIZES | {"moe_intermediate_size": 32},
}
"""All that a checkpoint of each architecture must say."""


def parse(model_type: str, **changes: Any) -> ModelShape:
    config = {"model_type": model_type} | MINIMAL[model_type] | changes
    return architecture(config).parse_shape(config)


@pytest.mark.parametrize("model_type", DECODERS)
def test_an_absent_key_means_what_it_means_to_transformers(model_type: str) -> None:
    shape = parse(model_type)
    theirs = transformers.AutoConfig.for_model(model_type, **MINIMAL[model_type])
    assert shape.num_kv_heads == theirs.num_key_value_heads
    assert shape.rms_norm_eps == theirs.rms_norm_eps
    assert {"rope_theta": shape.rope_theta, "rope_type": "default"} == theirs.rope_parameters
    assert shape.tie_embeddings == theirs.tie_word_embeddings
    assert shape.num_experts == getattr(theirs, "num_experts", 1)
    assert shape.top_k == getattr(theirs, "num_experts_per_tok", 1)
    assert shape.norm_top_k == getattr(theirs, "norm_topk_prob", True)
    assert shape.head_dim == 8


def test_a_published_configuration() -> None:
    """Qwen3-30B-A3B's."""
    config = {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    decoder = architecture(config)
    shape = decoder.parse_shape(config)
    assert shape == ModelShape(
        model_type="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        top_k=8,
        expert_size=768,
        vocab_size=151936,
        max_context_tokens=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=QkNorm.HEAD,
        norm_top_k=True,
    )
    names = decoder.tensor_names(shape)
    assert names.dense["layers.47.router"] == "model.layers.47.mlp.gate.weight"
    assert names.dense["layers.47.k_norm"] == "model.layers.47.self_attn.k_norm.weight"
    assert names.experts[ExpertId(47, 127)][2] == "model.layers.47.mlp.experts.127.down_proj.weight"


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_two_names(model_type: str, key: str) -> None:
    assert parse(model_type, **{key: 12}).num_experts == 12


def test_the_older_name_of_rotary_scaling_wins() -> None:
    with pytest.raises(CheckpointError, match="yarn"):
        parse("llama", rope_parameters={"rope_type": "default"}, rope_scaling={"rope_type": "yarn", "factor": 4.0})


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llama", "rope_parameters", {"rope_type": "dynamic"}),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_size", None),
        ("llama", "num_hidden_layers", 1 << 20),
        ("llama", "num_key_value_heads", 3),
        ("llama", "head_dim", 7),
        ("llama", "rms_norm_eps", 0),
        ("llama", "tie_word_embeddings", "no"),
        ("mixtral", "sliding_window", 4096),
        ("mixtral", "num_experts_per_tok", 9),
        ("mixtral", "num_local_experts", 1),
        ("olmoe", "clip_qkv", 8.0),
        ("olmoe", "sliding_window", 4096),
        ("olmoe", "attention_bias", True),
        ("olmoe", "hidden_act", "gelu"),
        ("olmoe", "norm_topk_prob", "yes"),
        ("olmoe", "num_experts", 1),
        ("olmoe", "num_experts", -8),
        ("olmoe", "num_experts_per_tok", 65),
        ("qwen3_moe", "use_sliding_window", True),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "shared_expert_intermediate_size", 512),
        ("qwen3_moe", "moe_intermediate_size", None),
        ("qwen3_moe", "num_experts", 0),
        ("qwen3_moe", "num_experts", 1 << 18),
        ("qwen3_moe", "attention_bias", True),
        ("qwen3_moe", "norm_topk_prob", 1),
    ],
)
def test_what_no_decoder_computes_is_refused(model_type: str, key: str, value: object) -> None:
    assert parse(model_type)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        parse(model_type, **{key: value})


def test_contradicting_numbers_of_experts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="num_local_experts is 16; supported: 8"):
        parse("qwen3_moe", num_experts=8, num_local_experts=16)


@pytest.mark.parametrize("model_type", ["gpt2", None, ["llama"]])
def test_other_architectures_are_refused(model_type: object) -> None:
    with pytest.raises(CheckpointError, match="supported: llama, mixtral, olmoe, qwen3_moe"):
        architecture({"model_type": model_type})
