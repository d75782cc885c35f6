"""The pre-norm decoder that the Llama family shares; `ModelShape` says all in which its members' arithmetic differs.

Shape suffixes: T tokens, D hidden size, S sampled rows, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from localmoe.core.model import ModelShape, TensorNames
from localmoe.core.protocols import ExpertExecutor, Routed
from localmoe.kernels.base import (
    AttentionWeights,
    DenseWeights,
    Kernels,
    PagedCache,
    PagedStep,
    RouterWeights,
    rotary_frequencies,
)


class Layer:
    """One layer's dense part, ready to be called."""

    def __init__(self, shape: ModelShape, dense: DenseWeights, index: int, kernels: Kernels) -> None:
        prefix = f"layers.{index}."
        normed = shape.qk_norm is not None
        self.attention = kernels.attention(
            AttentionWeights(
                norm_D=dense.dense_vector(prefix + "attn_norm"),
                q=dense.dense_matrix(prefix + "q"),
                k=dense.dense_matrix(prefix + "k"),
                v=dense.dense_matrix(prefix + "v"),
                o=dense.dense_matrix(prefix + "o"),
                q_norm=dense.dense_vector(prefix + "q_norm") if normed else None,
                k_norm=dense.dense_vector(prefix + "k_norm") if normed else None,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                eps=shape.rms_norm_eps,
            )
        )
        self.router = kernels.router(
            RouterWeights(
                norm_D=dense.dense_vector(prefix + "ffn_norm"),
                router=dense.dense_matrix(prefix + "router") if shape.num_experts > 1 else None,
                top_k=shape.top_k,
                normalize=shape.norm_top_k,
                eps=shape.rms_norm_eps,
            )
        )

    def choose(self, x_TD: Tensor) -> Tensor:
        """The experts [T, K] that the router would choose, likeliest first; int32."""
        _, ids_TK, _ = self.router(x_TD)
        return ids_TK


class Decoder(ABC):
    """Token ids to logits, given something that computes experts.

    Args:
        shape: the model's sizes.
        dense: every tensor of `TensorNames.dense`.
        experts: computes the routed experts of a layer.
        kernels: what everything else is computed with.
    """

    def __init__(
        self, shape: ModelShape, dense: DenseWeights, experts: ExpertExecutor[Tensor], kernels: Kernels
    ) -> None:
        self.shape = shape
        self.experts = experts
        self.device = kernels.device
        """Where hidden states and the cache are."""
        self.frequencies = rotary_frequencies(shape)
        self.embedding = kernels.embedding(dense.dense_matrix("embed"))
        self.layers = [Layer(shape, dense, index, kernels) for index in range(shape.num_layers)]
        self._choices = [layer.choose for layer in self.layers]
        final_norm_D = dense.dense_vector("final_norm")
        self.final_norm = kernels.norm(final_norm_D, shape.rms_norm_eps)
        """Of rows of `forward`; the head has its own."""
        self.head = kernels.head(
            final_norm_D,
            dense.dense_matrix("embed" if shape.tie_embeddings else "head"),
            shape.rms_norm_eps,
        )

    @staticmethod
    @abstractmethod
    def parse_shape(config: dict[str, Any]) -> ModelShape:
        """Read `config.json`. Raises CheckpointError for a value that this decoder does not compute."""

    @staticmethod
    @abstractmethod
    def tensor_names(shape: ModelShape) -> TensorNames:
        """Where the checkpoint keeps each tensor."""

    def forward(self, token_ids_T: Tensor, cache: PagedCache, step: PagedStep) -> Tensor:
        """Last layer's output [T, D] float32 for a step's tokens (int32), whose keys and values are stored."""
        x_TD = self.embedding(token_ids_T)
        for index, layer in enumerate(self.layers):
            layer.attention(x_TD, cache.keys[index], cache.values[index], step)
            h_TD, ids_TK, weights_TK = layer.router(x_TD)
            routed = Routed(
                layer=index, h_TD=h_TD, ids_TK=ids_TK, weights_TK=weights_TK, ahead=self._choices[index + 1 :]
            )
            self.experts(routed, x_TD)
        return x_TD

    def logits(self, x_SD: Tensor) -> Tensor:
        """Scores of the next token [S, V] float32, given rows of `forward`."""
        return self.head(x_SD)
