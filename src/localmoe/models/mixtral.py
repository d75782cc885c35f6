"""Mixtral (Jiang et al., 2024): Llama's attention, and a softmax router over the top-k experts of each layer."""

from typing import Any

from localmoe.core.model import ModelShape, TensorNames
from localmoe.models.config_json import ConfigReader, llama_family_shape
from localmoe.models.decoder import Decoder
from localmoe.models.tensor_names import mixture_tensor_names


class Mixtral(Decoder):
    @staticmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        config = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6} | config
        read = ConfigReader(config)
        read.require("sliding_window", None)
        num_experts, top_k = read.mixture(num_experts=8, top_k=2)
        return llama_family_shape(config, num_experts=num_experts, top_k=top_k)

    @staticmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        return mixture_tensor_names(shape, "block_sparse_moe", ("w1", "w3", "w2"))
