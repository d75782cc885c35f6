"""Every operation of a decoder in plain torch: what the fast kernels are tested against, and what computes where none
of them runs.

Shape suffixes: T tokens, D hidden size, F expert width, E experts, K experts per token, H heads, G key-value
heads, d head size, S sequences, N cache blocks, B tokens per block, L cached length, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from localmoe.core.model import WeightFormat
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store import ExpertWeights
from localmoe.kernels.base import (
    Attention,
    AttentionWeights,
    Draws,
    Embedding,
    Experts,
    Head,
    Norm,
    PagedStep,
    Router,
    RouterWeights,
)

_FEW_TOKENS = 16


class ReferenceKernels:
    """The operations of `base` in float32; weights are expanded to float32 when they are given.

    Args:
        num_threads: torch's, for the whole process.
    """

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.level = "reference"
        self.name = f"{self.level}, {num_threads} threads"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def in_place(self) -> bool:
        return False

    def memory_bytes(self, stored_bytes: int, num_weights: int) -> int:
        return 4 * num_weights

    def embedding(self, weights: PackedMatrix) -> Embedding:
        table_VD = weights.dequantize()
        return lambda token_ids_T: table_VD[token_ids_T]

    def attention(self, weights: AttentionWeights) -> Attention:
        w, head_dim = weights, weights.q.rows // weights.num_heads
        qkv = torch.cat([w.q.dequantize(), w.k.dequantize(), w.v.dequantize()])
        o = w.o.dequantize()
        heads = [w.num_heads, w.num_kv_heads, w.num_kv_heads]

        def attend(x_TD: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: PagedStep) -> None:
            h_TD = rms_norm(x_TD, w.norm_D, w.eps)
            q, k, v = torch.split(project(h_TD, qkv).view(len(h_TD), -1, head_dim), heads, dim=1)
            cosines, sines = torch.from_numpy(step.cosines_Td), torch.from_numpy(step.sines_Td)
            q = rotate(qk_norm(q, w.q_norm, w.eps), cosines, sines)
            k = rotate(qk_norm(k, w.k_norm, w.eps), cosines, sines)
            write_kv(k, v, keys_NGdB, values_NGBd, torch.from_numpy(step.slots_T))
            x_TD += project(paged_attention(q, keys_NGdB, values_NGBd, step).flatten(1), o)

        return attend

    def router(self, weights: RouterWeights) -> Router:
        router = None if weights.router is None else weights.router.dequantize()

        def route(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h_TD = rms_norm(x_TD, weights.norm_D, weights.eps)
            if router is None:
                return h_TD, torch.zeros(len(x_TD), 1, dtype=torch.int32), torch.ones(len(x_TD), 1)
            ids_TK, weights_TK = top_k_softmax(project(h_TD, router), weights.top_k, normalize=weights.normalize)
            return h_TD, ids_TK.int(), weights_TK

        return route

    def experts(self, num_experts: int, hidden_size: int, expert_size: int, weights: WeightFormat) -> Experts:
        return _ReferenceExperts()

    def norm(self, norm_D: Tensor, eps: float) -> Norm:
        return lambda x_TD: rms_norm(x_TD, norm_D, eps)

    def head(self, norm_D: Tensor, weights: PackedMatrix, eps: float) -> Head:
        head_VD = weights.dequantize()
        return lambda x_SD: project(rms_norm(x_SD, norm_D, eps), head_VD)

    def draw(self, logits_SV: Tensor, draws: Draws) -> list[int]:
        token_ids_S = logits_SV.argmax(-1)
        cumulative_SV = filtered_probabilities(logits_SV, draws).double().cumsum(-1)
        targets_S1 = torch.from_numpy(draws.uniforms_S)[:, None] * cumulative_SV[:, -1:]
        # right=True: the first token whose cumulative sum exceeds the target, which has a probability above zero.
        drawn_S = torch.searchsorted(cumulative_SV, targets_S1, right=True).squeeze(-1)
        token_ids_S = torch.where(torch.from_numpy(draws.temperatures_S) > 0, drawn_S, token_ids_S)
        return torch.where(logits_SV.isfinite().all(-1), token_ids_S, -1).tolist()


class _ReferenceExperts:
    """A layer's experts as float32 matrices."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        """Of those placed: gate and up [2F, D], down [D, F]."""

    def place(self, expert: int, weights: ExpertWeights) -> None:
        gate_up_2FD = torch.cat([weights.gate.dequantize(), weights.up.dequantize()])
        self._weights[expert] = gate_up_2FD, weights.down.dequantize()

    def remove(self, expert: int) -> None:
        del self._weights[expert]

    def __call__(self, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, x_TD: Tensor) -> None:
        self.begin(h_TD, ids_TK)
        self.compute(sorted(set(ids_TK.flatten().tolist()) - {-1}))
        self.finish(weights_TK, x_TD)

    def begin(self, h_TD: Tensor, ids_TK: Tensor) -> None:
        self._h_TD, self._ids_TK = h_TD.clone(), ids_TK.clone()
        self._out_TKD = torch.zeros(*ids_TK.shape, h_TD.shape[1])

    def compute(self, experts: Sequence[int]) -> None:
        for expert in experts:
            rows, slots = torch.where(self._ids_TK == expert)
            self._out_TKD[rows, slots] = swiglu(self._h_TD[rows], *self._weights[expert])

    def finish(self, weights_TK: Tensor, x_TD: Tensor) -> None:
        # One expert after the other, so that no sum depends on which other tokens are in the batch.
        weights_TK = weights_TK.masked_fill(self._ids_TK < 0, 0.0)
        for out_TD, weights_T in zip(self._out_TKD.unbind(1), weights_TK.unbind(1), strict=True):
            x_TD += out_TD * weights_T[:, None]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich, 2019) over the last axis, in float32."""
    return weight_D * (x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps))


def qk_norm(x_THd: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Queries or keys before rotation.

    Args:
        weight: [d] norms heads alone, [H * d] all together; None: as they are.
    """
    if weight is None:
        return x_THd
    if len(weight) == x_THd.shape[2]:
        return rms_norm(x_THd, weight, eps)
    return rms_norm(x_THd.flatten(1), weight, eps).view(x_THd.shape)


def rotate(x_THd: Tensor, cosines_Td: Tensor, sines_Td: Tensor) -> Tensor:
    """Rotary embedding on half-split pairs (x[i], x[i + d/2]) by angles [T, d/2]."""
    cos, sin = cosines_Td.unsqueeze(1), sines_Td.unsqueeze(1)
    first, second = x_THd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def project(x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    """`x @ weight.T`, [T, F].

    While tokens are few, BLAS reads a weight matrix about three times faster as the left factor than as the right
    one; and a vector alone would go to a matrix-vector routine that uses one thread, so it is doubled.
    """
    num_tokens = len(x_TD)
    if num_tokens > _FEW_TOKENS:
        return linear(x_TD, weight_FD)
    columns_DT = x_TD.repeat(2, 1).T if num_tokens == 1 else x_TD.T
    return (weight_FD @ columns_DT).T[:num_tokens].contiguous()


def swiglu(x_TD: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """Gated feed-forward block (Shazeer, 2020); gate's rows first, then up's."""
    gate_TF, up_TF = project(x_TD, gate_up_2FD).chunk(2, dim=-1)
    return project(silu(gate_TF) * up_TF, down_DF)


def top_k_softmax(logits_TE: Tensor, k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The k likeliest of all experts, likeliest first, and their probabilities; ([T, K] int64, [T, K] float32).

    The choice is by logit, so that the rounding of exp has no say in it; of equal logits the lower expert id comes
    first.

    Args:
        normalize: scale the chosen probabilities to sum to one.
    """
    ids_TK = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    probabilities_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    if normalize:
        probabilities_TK /= probabilities_TK.sum(-1, keepdim=True)
    return ids_TK, probabilities_TK


def causal_attention(q_THd: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> Tensor:
    """Attention of the last T of L positions of one sequence, each over itself and what precedes it; [T, H, d]."""
    num_tokens, length = len(q_THd), len(k_LGd)
    mask = torch.ones(num_tokens, length, dtype=torch.bool).tril(length - num_tokens) if num_tokens > 1 else None
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_LGd, v_LGd))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)


def write_kv(k_TGd: Tensor, v_TGd: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, slots_T: Tensor) -> None:
    """Store keys and values at their slots, rounded to the cache's dtype."""
    block_tokens = keys_NGdB.shape[3]
    blocks_T, offsets_T = slots_T // block_tokens, slots_T % block_tokens
    keys_NGdB[blocks_T, :, :, offsets_T] = k_TGd.to(keys_NGdB.dtype)
    values_NGBd[blocks_T, :, offsets_T] = v_TGd.to(values_NGBd.dtype)


def paged_attention(q_THd: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: PagedStep) -> Tensor:
    """Causal attention of every token of a step over its sequence's cached blocks; [T, H, d].

    The blocks must hold finite numbers up to the end of each sequence: what is masked is multiplied by zero.
    """
    out_THd = torch.empty_like(q_THd)
    block_tokens = keys_NGdB.shape[3]
    for (first_row, count, start), table in zip(step.spans_S3.tolist(), step.tables_SN, strict=True):
        length = start + count
        blocks = torch.from_numpy(table[: -(-length // block_tokens)])
        k_LGd = keys_NGdB[blocks].permute(0, 3, 1, 2).flatten(0, 1)[:length].float()
        v_LGd = values_NGBd[blocks].permute(0, 2, 1, 3).flatten(0, 1)[:length].float()
        rows = slice(first_row, first_row + count)
        out_THd[rows] = causal_attention(q_THd[rows], k_LGd, v_LGd)
    return out_THd


def filtered_probabilities(logits_SV: Tensor, draws: Draws) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p; zero for what they exclude, not renormalised.

    A temperature of 0 is taken for 1.
    """
    temperatures_S = torch.from_numpy(draws.temperatures_S)
    temperatures_S1 = torch.where(temperatures_S > 0, temperatures_S, 1.0)[:, None]
    # Shifted first, so that a tiny temperature overflows to minus infinity and never to infinity.
    scaled_SV = (logits_SV - logits_SV.amax(-1, keepdim=True)) / temperatures_S1
    probabilities_SV = scaled_SV.softmax(-1)
    filters = zip(draws.top_k_S.tolist(), draws.top_p_S.tolist(), draws.min_p_S.tolist(), strict=True)
    for row, (top_k, top_p, min_p) in zip(probabilities_SV, filters, strict=True):
        if 0 < top_k < len(row):
            row[row < row.topk(top_k).values[-1]] = 0
        if top_p < 1:
            likeliest = row.sort(descending=True).values
            cumulative = likeliest.double().cumsum(0)
            last = int(torch.searchsorted(cumulative, top_p * cumulative[-1]))
            row[row < likeliest[min(last, len(row) - 1)]] = 0
        if min_p > 0:
            row[row < min_p * row.max()] = 0
    return probabilities_SV
