"""The pre-norm decoder that the Llama family shares; an architecture overrides what it does otherwise.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token, H heads, G key-value heads, d head size,
V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localmoe.core.model import ModelShape, TensorNames
from localmoe.core.protocols import AttentionExecutor, ExpertExecutor
from localmoe.kernels import reference as kernels


class Layer:
    """One layer's dense weights; query, key and value rows are joined so that one product serves all three."""

    def __init__(self, dense: Mapping[str, Tensor], index: int) -> None:
        weight = {name.rpartition(".")[2]: t for name, t in dense.items() if name.startswith(f"layers.{index}.")}
        self.attn_norm = weight["attn_norm"]
        self.qkv = torch.cat([weight["q"], weight["k"], weight["v"]])
        self.o = weight["o"]
        self.ffn_norm = weight["ffn_norm"]
        self.router = weight.get("router")


class Decoder(ABC):
    """Token ids to logits, given something that attends and something that computes experts.

    Args:
        shape: the model's sizes.
        dense: every tensor of `TensorNames.dense`, in the dtype to compute in.
        experts: computes the routed experts of a layer.
    """

    def __init__(self, shape: ModelShape, dense: Mapping[str, Tensor], experts: ExpertExecutor[Tensor]) -> None:
        self.shape = shape
        self.embed = dense["embed"]
        self.head = dense["embed" if shape.tie_embeddings else "head"]
        self.final_norm = dense["final_norm"]
        self.layers = [Layer(dense, index) for index in range(shape.num_layers)]
        self.frequencies = kernels.rotary_frequencies(shape)
        self.experts = experts

    @staticmethod
    @abstractmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        """Read `config.json`. Raises CheckpointError for a value that this decoder does not compute."""

    @staticmethod
    @abstractmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        """Where the checkpoint keeps each tensor."""

    @abstractmethod
    def route(self, layer: Layer, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts ([T, K] int64) and their weights ([T, K] float32) for the normalised input of a layer."""

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attention: AttentionExecutor[Tensor]) -> Tensor:
        """Normalised hidden states [T, D] of the tokens at these positions of their sequences."""
        shape = self.shape
        x_TD = self.embed[token_ids_T]
        angles_Td = positions_T[:, None].float() * self.frequencies
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        for index, layer in enumerate(self.layers):
            h_TD = kernels.rms_norm(x_TD, layer.attn_norm, shape.rms_norm_eps)
            q, k, v = torch.split(
                kernels.project(h_TD, layer.qkv).view(len(h_TD), -1, shape.head_dim), heads, dim=1
            )
            q, k = kernels.rotate(q, angles_Td), kernels.rotate(k, angles_Td)
            x_TD = x_TD + kernels.project(attention(index, q, k, v).flatten(1), layer.o)
            h_TD = kernels.rms_norm(x_TD, layer.ffn_norm, shape.rms_norm_eps)
            x_TD = x_TD + self.experts(index, h_TD, *self.route(layer, h_TD))
        return kernels.rms_norm(x_TD, self.final_norm, shape.rms_norm_eps)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores of the next token, [T, V] float32."""
        return kernels.project(hidden_TD, self.head).float()


def attention_tensor_names(shape: ModelShape) -> dict[str, str]:
    """Everything but the feed-forward part, named as Llama's and Mixtral's checkpoints both do."""
    names = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    if not shape.tie_embeddings:
        names["head"] = "lm_head.weight"
    for i in range(shape.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names |= {ours + part: f"{theirs}self_attn.{part}_proj.weight" for part in "qkvo"}
        names[ours + "attn_norm"] = theirs + "input_layernorm.weight"
        names[ours + "ffn_norm"] = theirs + "post_attention_layernorm.weight"
    return names
