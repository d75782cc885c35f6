"""A dense Llama checkpoint turned into a Mixtral checkpoint that computes the same function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, silu

from localmoe.catalog.calibration import WINDOW_TOKENS, Calibration
from localmoe.catalog.upcycle import expert_share, fit_router, permute_expert
from localmoe.core.model import ExpertId, ModelShape, TensorNames, WeightFormat
from localmoe.core.protocols import Routed
from localmoe.formats.packed import PackedMatrix, pack_matrix
from localmoe.kernels.base import PagedStep
from localmoe.kernels.reference import ReferenceKernels
from localmoe.models import architecture


@dataclass(frozen=True, kw_only=True)
class FittedRouter:
    """One layer's router, and how evenly it spreads tokens that it was not fitted to."""

    weight_ED: Tensor
    """BF16."""
    held_out_share: list[float]
    """Each expert's share of all choices, summing to 1."""


def mixtral_config(llama_config: dict[str, Any], *, num_experts: int, top_k: int) -> dict[str, Any]:
    """The `config.json` of the mixture."""
    kept = {key: value for key, value in llama_config.items() if key != "attention_bias"}
    return kept | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    }


def mixtral_tensors(
    llama_tensors: dict[str, Tensor], mixtral: dict[str, Any], routers: list[FittedRouter]
) -> Iterator[tuple[str, Tensor]]:
    """All weights of the mixture, layer by layer, made as they are asked for."""
    llama_names = _names(mixtral | {"model_type": "llama"})
    names = _names(mixtral)
    for ours, theirs in names.dense.items():
        layer = int(ours.split(".")[1]) if ours.endswith(".router") else None
        yield theirs, llama_tensors[llama_names.dense[ours]] if layer is None else routers[layer].weight_ED
    for expert_id, (gate, up, down) in names.experts.items():
        gate_FD, up_FD, down_DF = (llama_tensors[n] for n in llama_names.experts[ExpertId(expert_id.layer, 0)])
        seed = expert_id.layer * mixtral["num_local_experts"] + expert_id.expert
        yield from zip((gate, up, down), permute_expert(gate_FD, up_FD, down_DF, seed=seed), strict=True)


@torch.inference_mode()
def fit_routers(
    llama_tensors: dict[str, Tensor],
    mixtral: dict[str, Any],
    calibration: Calibration,
    on_layer: Callable[[int, int], None],
) -> list[FittedRouter]:
    """Run the dense model once over all windows, and fit each layer's router to the inputs of its block.

    Args:
        on_layer: told of (layers done, layers).
    """
    config = mixtral | {"model_type": "llama"}
    llama = architecture(config)
    shape = llama.parse_shape(config)
    names = llama.tensor_names(shape)
    windows = calibration.fitting + calibration.held_out
    experts = _RouterFitting(llama_tensors, names, mixtral, len(calibration.fitting) * WINDOW_TOKENS, on_layer)
    kernels = ReferenceKernels(torch.get_num_threads())
    decoder = llama(shape, CheckpointDense(llama_tensors, names), experts, kernels)
    token_ids_T = torch.tensor(windows, dtype=torch.int32).flatten()
    decoder.forward(token_ids_T, _Cache(shape, len(windows)), _step(decoder.frequencies, len(windows)))
    return experts.routers


class _RouterFitting:
    """Computes the dense model's one expert, and fits a router to the layer's inputs on the way."""

    def __init__(
        self,
        llama_tensors: dict[str, Tensor],
        names: TensorNames,
        mixtral: dict[str, Any],
        num_fitting_tokens: int,
        on_layer: Callable[[int, int], None],
    ) -> None:
        self._tensors, self._names = llama_tensors, names
        self._num_experts, self._top_k = mixtral["num_local_experts"], mixtral["num_experts_per_tok"]
        self._num_layers = mixtral["num_hidden_layers"]
        self._num_fitting_tokens = num_fitting_tokens
        self._on_layer = on_layer
        self.routers: list[FittedRouter] = []

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        pass

    def state(self) -> None:
        return None

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        layer, h_TD = routed.layer, routed.h_TD
        fitting_TD, held_out_TD = h_TD[: self._num_fitting_tokens], h_TD[self._num_fitting_tokens :]
        weight_ED = fit_router(fitting_TD, num_experts=self._num_experts, top_k=self._top_k, seed=layer)
        share_E = expert_share(weight_ED, held_out_TD, self._top_k)
        self.routers.append(FittedRouter(weight_ED=weight_ED, held_out_share=share_E.tolist()))
        self._on_layer(len(self.routers), self._num_layers)
        gate_FD, up_FD, down_DF = (self._tensors[name].float() for name in self._names.experts[ExpertId(layer, 0)])
        x_TD += linear(silu(linear(h_TD, gate_FD)) * linear(h_TD, up_FD), down_DF)


class CheckpointDense:
    """Checkpoint tensors as a decoder's dense weights."""

    def __init__(self, tensors: Mapping[str, Tensor], names: TensorNames) -> None:
        self._tensors, self._names = tensors, names.dense

    def dense_matrix(self, name: str) -> PackedMatrix:
        return pack_matrix(self._tensors[self._names[name]].float(), WeightFormat.F32)

    def dense_vector(self, name: str) -> Tensor:
        return self._tensors[self._names[name]].float()


class _Cache:
    """A block for every window. All tokens go through a layer at once, so all layers use the same tensors in turn."""

    def __init__(self, shape: ModelShape, num_windows: int) -> None:
        heads = (num_windows, shape.num_kv_heads)
        self.keys = [torch.zeros(*heads, shape.head_dim, WINDOW_TOKENS)] * shape.num_layers
        self.values = [torch.zeros(*heads, WINDOW_TOKENS, shape.head_dim)] * shape.num_layers


def _step(frequencies_d: NDArray[np.float32], num_windows: int) -> PagedStep:
    """All tokens of all windows, each window a sequence in a block of its own."""
    window_W, zeros_W = np.arange(num_windows, dtype=np.int32), np.zeros(num_windows, np.int32)
    angles_Td = np.tile(np.arange(WINDOW_TOKENS, dtype=np.float32)[:, None] * frequencies_d, (num_windows, 1))
    return PagedStep(
        slots_T=np.arange(num_windows * WINDOW_TOKENS),
        spans_S3=np.stack([window_W * WINDOW_TOKENS, zeros_W + WINDOW_TOKENS, zeros_W], axis=1),
        tables_SN=window_W[:, None],
        cosines_Td=np.cos(angles_Td),
        sines_Td=np.sin(angles_Td),
    )


def _names(config: dict[str, Any]) -> TensorNames:
    decoder = architecture(config)
    shape: ModelShape = decoder.parse_shape(config)
    return decoder.tensor_names(shape)
