"""The shape of a model: every number the engine needs to know before it reads a weight."""

from enum import StrEnum

import msgspec


class WeightFormat(StrEnum):
    """How expert matrices are stored. Dense parts of the FP4 formats are BF16."""

    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    BF16 = "bf16"
    F32 = "f32"


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Llama 3's frequency-dependent stretching of rotary wavelengths (Llama 3.1 model card)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a decoder-only transformer. A dense model is the mixture of one expert."""

    model_type: str
    """The architecture's name in `config.json`; names the decoder file."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    """Inner width of one expert's gated feed-forward block."""
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False


class ExpertId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names one expert of one layer."""

    layer: int
    expert: int


class TensorNames(msgspec.Struct, frozen=True, kw_only=True):
    """Where an architecture's checkpoint keeps each of our tensors.

    Dense names of ours: `embed`, `final_norm`, `head` (absent when tied), and per layer `layers.{i}.` followed
    by `attn_norm`, `q`, `k`, `v`, `o`, `ffn_norm`, `router` (absent with one expert).
    """

    dense: dict[str, str]
    """Our name to the checkpoint's."""
    experts: dict[ExpertId, tuple[str, str, str]]
    """The checkpoint's names of gate [F, D], up [F, D] and down [D, F]."""
