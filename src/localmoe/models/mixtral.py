"""Mixtral (Jiang et al., 2024): Llama's attention, and a softmax router over the top-k experts of each layer."""

from typing import Any

from torch import Tensor

from localmoe.core.model import ExpertId, ModelShape, TensorNames
from localmoe.kernels import reference as kernels
from localmoe.models.config_json import ConfigReader, llama_family_shape
from localmoe.models.decoder import Decoder, Layer, attention_tensor_names


class Mixtral(Decoder):
    @staticmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        read = ConfigReader(config)
        read.require("sliding_window", None)
        experts, top_k = read.size("num_local_experts"), read.size("num_experts_per_tok")
        if top_k > experts:
            raise read.fail("num_experts_per_tok", f"it must not exceed num_local_experts ({experts})")
        return llama_family_shape(config, num_experts=experts, top_k=top_k)

    @staticmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        dense, experts = attention_tensor_names(shape), {}
        for i in range(shape.num_layers):
            block = f"model.layers.{i}.block_sparse_moe."
            dense[f"layers.{i}.router"] = block + "gate.weight"
            for e in range(shape.num_experts):
                gate, down, up = (f"{block}experts.{e}.w{number}.weight" for number in (1, 2, 3))
                experts[ExpertId(i, e)] = (gate, up, down)
        return TensorNames(dense=dense, experts=experts)

    def route(self, layer: Layer, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        assert layer.router is not None
        return kernels.top_k_softmax(kernels.project(x_TD, layer.router), self.shape.top_k)
