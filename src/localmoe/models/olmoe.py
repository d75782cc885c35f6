"""OLMoE (Muennighoff et al., 2024): queries and keys normed whole, probabilities of the top-k experts as they are."""

from typing import Any

from localmoe.core.model import ModelShape, QkNorm, TensorNames
from localmoe.models.config_json import ConfigReader, llama_family_shape
from localmoe.models.decoder import Decoder
from localmoe.models.tensor_names import mixture_tensor_names


class Olmoe(Decoder):
    @staticmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        config = {"rms_norm_eps": 1e-5} | config
        read = ConfigReader(config)
        read.require("clip_qkv", None)
        read.require("sliding_window", None)
        num_experts, top_k = read.mixture(num_experts=64, top_k=8)
        return llama_family_shape(
            config,
            num_experts=num_experts,
            top_k=top_k,
            qk_norm=QkNorm.PROJECTION,
            norm_top_k=read.flag("norm_topk_prob"),
        )

    @staticmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        return mixture_tensor_names(shape)
