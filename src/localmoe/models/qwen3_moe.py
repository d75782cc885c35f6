"""Qwen3's mixtures of experts (Qwen Team, 2025): each head of queries and keys is normed."""

from typing import Any

from localmoe.core.model import ModelShape, QkNorm, TensorNames
from localmoe.models.config_json import ConfigReader, llama_family_shape
from localmoe.models.decoder import Decoder
from localmoe.models.tensor_names import mixture_tensor_names


class Qwen3Moe(Decoder):
    @staticmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        config = {"num_key_value_heads": 4} | config
        read = ConfigReader(config)
        read.require("use_sliding_window", False, None)
        # Layers without a mixture, and experts that every token visits.
        read.require("decoder_sparse_step", 1)
        read.require("mlp_only_layers", [], None)
        read.require("shared_expert_intermediate_size", 0, None)
        num_experts, top_k = read.mixture(num_experts=128, top_k=8)
        return llama_family_shape(
            config,
            num_experts=num_experts,
            top_k=top_k,
            expert_size_key="moe_intermediate_size",
            qk_norm=QkNorm.HEAD,
            norm_top_k=read.flag("norm_topk_prob"),
        )

    @staticmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        return mixture_tensor_names(shape)
