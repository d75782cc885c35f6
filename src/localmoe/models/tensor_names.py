"""What the checkpoints of the Llama family call their tensors."""

from localmoe.core.model import ExpertId, ModelShape, TensorNames


def attention_tensor_names(shape: ModelShape) -> dict[str, str]:
    """Everything but the feed-forward part, which all name alike."""
    names = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    if not shape.tie_embeddings:
        names["head"] = "lm_head.weight"
    for i in range(shape.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names |= {ours + part: f"{theirs}self_attn.{part}_proj.weight" for part in "qkvo"}
        if shape.qk_norm is not None:
            names |= {ours + part: f"{theirs}self_attn.{part}.weight" for part in ("q_norm", "k_norm")}
        names[ours + "attn_norm"] = theirs + "input_layernorm.weight"
        names[ours + "ffn_norm"] = theirs + "post_attention_layernorm.weight"
    return names


def mixture_tensor_names(
    shape: ModelShape,
    block: str = "mlp",
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> TensorNames:
    """All tensors of a mixture of experts.

    Args:
        block: the feed-forward part of a layer.
        matrices: gate, up and down of an expert.
    """
    dense, experts = attention_tensor_names(shape), {}
    for i in range(shape.num_layers):
        prefix = f"model.layers.{i}.{block}."
        dense[f"layers.{i}.router"] = prefix + "gate.weight"
        for e in range(shape.num_experts):
            gate, up, down = (f"{prefix}experts.{e}.{matrix}.weight" for matrix in matrices)
            experts[ExpertId(i, e)] = (gate, up, down)
    return TensorNames(dense=dense, experts=experts)
