"""A dense Llama checkpoint turned into a Mixtral checkpoint that computes the same function."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from localmoe.catalog.calibration import WINDOW_TOKENS, Calibration
from localmoe.catalog.upcycle import expert_share, fit_router, permute_expert
from localmoe.core.model import ExpertId, ModelShape, TensorNames
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
    num_fitting_tokens = len(calibration.fitting) * WINDOW_TOKENS
    num_experts, top_k = mixtral["num_local_experts"], mixtral["num_experts_per_tok"]
    routers: list[FittedRouter] = []

    def experts(layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        fitting_TD, held_out_TD = x_TD[:num_fitting_tokens], x_TD[num_fitting_tokens:]
        weight_ED = fit_router(fitting_TD, num_experts=num_experts, top_k=top_k, seed=layer)
        share_E = expert_share(weight_ED, held_out_TD, top_k)
        routers.append(FittedRouter(weight_ED=weight_ED, held_out_share=share_E.tolist()))
        on_layer(len(routers), shape.num_layers)
        gate_FD, up_FD, down_DF = (llama_tensors[name].float() for name in names.experts[ExpertId(layer, 0)])
        return linear(silu(linear(x_TD, gate_FD)) * linear(x_TD, up_FD), down_DF)

    def attention(layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        # All windows are equally long and lie one after another, so they are a batch.
        q, k, v = (x.view(len(windows), -1, *x.shape[1:]).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    dense = {ours: llama_tensors[theirs].float() for ours, theirs in names.dense.items()}
    positions_T = torch.arange(WINDOW_TOKENS).repeat(len(windows))
    llama(shape, dense, experts).forward(torch.tensor(windows).flatten(), positions_T, attention)
    return routers


def _names(config: dict[str, Any]) -> TensorNames:
    decoder = architecture(config)
    shape: ModelShape = decoder.parse_shape(config)
    return decoder.tensor_names(shape)
