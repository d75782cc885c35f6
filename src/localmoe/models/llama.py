"""Llama (Touvron et al., 2023; Llama 3): dense, the mixture of one expert."""

from typing import Any

from localmoe.core.model import ExpertId, ModelShape, TensorNames
from localmoe.models.config_json import ConfigReader, llama_family_shape
from localmoe.models.decoder import Decoder
from localmoe.models.tensor_names import attention_tensor_names


class Llama(Decoder):
    @staticmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        ConfigReader(config).require("mlp_bias", False, None)
        return llama_family_shape(config, num_experts=1, top_k=1)

    @staticmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        experts = {}
        for i in range(shape.num_layers):
            mlp = f"model.layers.{i}.mlp."
            experts[ExpertId(i, 0)] = (mlp + "gate_proj.weight", mlp + "up_proj.weight", mlp + "down_proj.weight")
        return TensorNames(dense=attention_tensor_names(shape), experts=experts)
