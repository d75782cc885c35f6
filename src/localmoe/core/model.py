"""The shape of a model: every number the engine needs to know before it reads a weight."""

from enum import StrEnum

import msgspec


class WeightFormat(StrEnum):
    """How a matrix is stored. In a store it names the experts' format; dense matrices beside FP4 experts are INT8."""

    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    INT8 = "int8"
    BF16 = "bf16"
    F32 = "f32"


class QkNorm(StrEnum):
    """What the RMS norm of queries and keys, between projection and rotation, runs over."""

    HEAD = "head"
    """Each head alone; weights [d] (Qwen3)."""
    PROJECTION = "projection"
    """All heads together; weights [H * d] and [G * d] (OLMoE)."""


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
    qk_norm: QkNorm | None = None
    """None: queries and keys are rotated as projected."""
    norm_top_k: bool = True
    """Whether the chosen experts' probabilities are scaled to sum to one."""


class ExpertId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names one expert of one layer."""

    layer: int
    expert: int


class TensorNames(msgspec.Struct, frozen=True, kw_only=True):
    """Where an architecture's checkpoint keeps each of our tensors.

    Dense names of ours: `embed`, `final_norm`, `head` (absent when tied), and per layer `layers.{i}.` followed
    by `attn_norm`, `q`, `k`, `v`, `o`, `q_norm` and `k_norm` (with `ModelShape.qk_norm` only), `ffn_norm`, `router`
    (absent with one expert).
    """

    dense: dict[str, str]
    """Our name to the checkpoint's."""
    experts: dict[ExpertId, tuple[str, str, str]]
    """The checkpoint's names of gate [F, D], up [F, D] and down [D, F]."""
