"""The routed experts of one layer on the device.

Experts lie in slots of one slab, a whole blob of the store each; a table says which expert is in which slot. What is
computed is decided on the device: nothing here waits for it, and every launch's size follows from the number of
tokens, so that a step can be captured in a graph.

A step is `begin` (inputs rounded, pairs of token and chosen expert sorted by expert), `compute` (all experts that are
here, or some of them: one launch for gate, up and SwiGLU, one for down), `finish` (weighted sum of what was computed,
in order of k). An expert that was not computed adds nothing; whoever computes it adds its part.

A pair's result depends on its token and expert alone, so results are the same bits in any slots and any batch.

Shape suffixes: T tokens, K experts per token, E experts, P pairs (T * K), D hidden size, F expert size; in kernels
also R rows of a tile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.core.model import WeightFormat
from localmoe.formats.store import ExpertWeights
from localmoe.formats.store_layout import BlobLayout
from localmoe.kernels.triton.product import (
    LAUNCH,
    NVFP4,
    TILE_ROWS,
    product,
    store_input,
    tile_tokens,
    tiling,
    to_device,
    units,
)
from localmoe.kernels.triton.rows import prepare

_SORT_PAIRS = 1024
_SUM_COLUMNS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertSlab:
    """Memory for experts on the device; any number of layers may share it.

    Raises:
        ValueError: the tensors do not fit the layout.
    """

    layout: BlobLayout
    blobs: Tensor
    """uint8 [num_slots, slot bytes], contiguous; a slot begins with a blob of the layout, 64 divides its size."""
    tensor_scales: Tensor
    """float32 [num_slots, 3], of gate, up and down; read for NVFP4 only."""

    def __post_init__(self) -> None:
        num_slots, slot_bytes = self.blobs.shape
        if (
            self.blobs.dtype != torch.uint8
            or not self.blobs.is_contiguous()
            or slot_bytes < self.layout.num_bytes
            or slot_bytes % 64
            or self.tensor_scales.shape != (num_slots, 3)
            or self.tensor_scales.dtype != torch.float32
            or not self.tensor_scales.is_contiguous()
        ):
            raise ValueError(
                f"a slab of {self.blobs.dtype} {tuple(self.blobs.shape)} with scales "
                f"{self.tensor_scales.dtype} {tuple(self.tensor_scales.shape)} cannot hold blobs of "
                f"{self.layout.num_bytes} bytes"
            )

    @classmethod
    def allocate(cls, layout: BlobLayout, num_slots: int, device: torch.device) -> "ExpertSlab":
        """Uninitialised slots of just a blob's size."""
        return cls(
            layout=layout,
            blobs=torch.empty(num_slots, layout.num_bytes, dtype=torch.uint8, device=device),
            tensor_scales=torch.ones(num_slots, 3, device=device),
        )

    def write(self, slot: int, weights: ExpertWeights) -> None:
        """Copy one expert, piece by piece."""
        matrices = (weights.gate, weights.up, weights.down)
        for matrix, place in zip(matrices, (self.layout.gate, self.layout.up, self.layout.down), strict=True):
            self.blobs[slot, place.values] = matrix.values.to(self.blobs.device, non_blocking=True)
            self.blobs[slot, place.scales] = matrix.scales.to(self.blobs.device, non_blocking=True)
        scales = torch.tensor([matrix.tensor_scale for matrix in matrices])
        self.tensor_scales[slot] = scales.to(self.blobs.device, non_blocking=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """What is computed between `begin` and `finish`."""

    ids_TK: Tensor
    h_TD: Tensor
    """As products take it."""
    order_P: Tensor
    """int32, the pairs sorted by expert."""
    starts_2E: Tensor
    """int32, where each expert's pairs begin in `order_P`, and how many they are."""
    out_PD: Tensor
    """float32, what each pair's expert made of its token; undefined where that was not computed."""
    computed_E: Tensor
    """int32, slots of the experts that were computed, -1 for the rest."""


class _LayerExperts:
    """What all of a layer's experts share, however they come to their slots."""

    def __init__(self, slab: ExpertSlab, num_experts: int) -> None:
        self._slab = slab
        layout, device = slab.layout, slab.blobs.device
        self._format: WeightFormat = layout.gate.format
        self._tiling = tiling(self._format)
        self._hidden, self._width = layout.gate.columns, layout.gate.rows
        values_unit, scales_unit = units(self._format)
        self._values, self._scales = slab.blobs.view(values_unit), slab.blobs.view(scales_unit)
        self._strides = (self._values.stride(0), self._scales.stride(0))
        self._places = [
            run.start // unit.element_size()
            for matrix in (layout.gate, layout.up, layout.down)
            for run, unit in zip((matrix.values, matrix.scales), (self._values, self._scales), strict=True)
        ]
        """Where gate's values and scales, up's and down's begin in a slot, in units of their types."""
        self._slots_E = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        self._step: _Step | None = None

    def remove(self, expert: int) -> None:
        """Forget an expert's slot."""
        self._slots_E[expert] = -1

    def begin(self, h_TD: Tensor, ids_TK: Tensor) -> None:
        """Take a step's inputs [T, D] float32 and choices [T, K] int32, from 0 to num_experts - 1, or -1 for none."""
        device, num_experts = ids_TK.device, len(self._slots_E)
        step = _Step(
            ids_TK=ids_TK,
            h_TD=prepare(h_TD, self._tiling),
            order_P=torch.empty(ids_TK.numel(), dtype=torch.int32, device=device),
            starts_2E=torch.empty(2, num_experts, dtype=torch.int32, device=device),
            out_PD=torch.empty(ids_TK.numel(), self._hidden, device=device),
            computed_E=torch.full_like(self._slots_E, -1),
        )
        _sort[(num_experts,)](
            ids_TK, step.order_P, step.starts_2E, ids_TK.numel(), num_experts, P=_SORT_PAIRS, **LAUNCH
        )  # fmt: skip
        self._step = step

    def compute(self, experts: Sequence[int] | None = None) -> None:
        """Compute these experts for all tokens that go to them, each at most once a step; None: all placed ones."""
        step = self._step
        assert step is not None, "begin comes first"
        slots_E = self._slots_E.clone()
        if experts is not None:
            wanted_E = np.zeros(len(slots_E), np.bool_)
            wanted_E[list(experts)] = True
            slots_E.masked_fill_(~to_device(wanted_E, slots_E.device), -1)
        torch.maximum(step.computed_E, slots_E, out=step.computed_E)
        num_pairs, num_experts = step.ids_TK.numel(), len(self._slots_E)
        tile = tile_tokens(num_pairs // num_experts)
        # Each expert fills whole tiles but for one, and no tile is empty.
        num_tiles = min(num_pairs, num_pairs // tile + min(num_experts, num_pairs))
        inner_PF = step.h_TD.new_empty(num_pairs, self._width)
        slab = (self._values, self._scales, self._slab.tensor_scales, *self._strides)
        table = (step.order_P, step.starts_2E, slots_E, num_experts)
        options = {
            "E": triton.next_power_of_2(num_experts),
            "FORMAT": self._tiling.format,
            "EXACT": self._tiling.exact,
            "R": TILE_ROWS,
            "K": self._tiling.step_columns,
            "T": tile,
            "num_stages": self._tiling.num_stages,
            **LAUNCH,
        }
        _gate_up[(num_tiles, triton.cdiv(self._width, TILE_ROWS))](
            *table, *slab, *self._places[:4], step.h_TD, inner_PF, self._hidden, self._width,
            TOP_K=step.ids_TK.shape[1], FP4=self._tiling.fp4, **options,
        )  # fmt: skip
        _down[(num_tiles, triton.cdiv(self._hidden, TILE_ROWS))](
            *table, *slab, *self._places[4:], inner_PF, step.out_PD, self._width, self._hidden, **options
        )  # fmt: skip

    def finish(self, weights_TK: Tensor, x_TD: Tensor) -> None:
        """Add the weighted sum of what was computed to x [T, D] float32; weights [T, K] float32."""
        step = self._step
        assert step is not None, "begin comes first"
        num_tokens, top_k = weights_TK.shape
        _sum[(num_tokens, triton.cdiv(self._hidden, _SUM_COLUMNS))](
            step.ids_TK, step.computed_E, weights_TK, step.out_PD, x_TD, self._hidden, top_k, D=_SUM_COLUMNS,
            **LAUNCH,
        )  # fmt: skip
        self._step = None

    def __call__(self, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, x_TD: Tensor) -> None:
        """All of a step."""
        self.begin(h_TD, ids_TK)
        self.compute()
        self.finish(weights_TK, x_TD)


class SlotExperts(_LayerExperts):
    """Experts in slots that somebody else fills.

    Args:
        slab: any number of layers may share it.
        num_experts: of the layer.
    """

    def place(self, expert: int, slot: int) -> None:
        """From now on this expert is in this slot; it must be filled before `compute`, in order of the stream."""
        self._slots_E[expert] = slot


class ResidentExperts(_LayerExperts):
    """Experts that have a slot each, into which their weights are copied.

    Args:
        slab: this layer's own.
        num_experts: the slab's slots.
    """

    def place(self, expert: int, weights: ExpertWeights) -> None:
        """Copy an expert's weights, and compute with them from now on."""
        self._slab.write(expert, weights)
        self._slots_E[expert] = expert


@triton.jit(do_not_specialize=["num_pairs"])
def _sort(ids, order, starts, num_pairs, num_experts, P: tl.constexpr):
    """A program's expert's pairs, in ascending order, follow those of all lower experts, -1 included."""
    expert = tl.program_id(0)
    start = 0
    for first in range(0, num_pairs, P):
        at_P = first + tl.arange(0, P)
        ids_P = tl.load(ids + at_P, mask=at_P < num_pairs, other=num_experts)
        start += tl.sum((ids_P < expert).to(tl.int32), axis=0)
    end = start
    for first in range(0, num_pairs, P):
        at_P = first + tl.arange(0, P)
        mine_P = tl.load(ids + at_P, mask=at_P < num_pairs, other=num_experts) == expert
        count_P = mine_P.to(tl.int32)
        tl.store(order + end + tl.cumsum(count_P, axis=0) - 1, at_P, mask=mine_P)
        end += tl.sum(count_P, axis=0)
    tl.store(starts + expert, start)
    tl.store(starts + num_experts + expert, end - start)


@triton.jit
def _tile(starts, slots, num_experts, tile, E: tl.constexpr, T: tl.constexpr):
    """What a tile computes: its slot (-1: there is no such tile), its first place in `order` and the end of its
    expert's places. Experts that are here take as many tiles each as they need, in order of id."""
    at_E = tl.arange(0, E)
    in_E = at_E < num_experts
    slots_E = tl.load(slots + at_E, mask=in_E, other=-1)
    counts_E = tl.load(starts + num_experts + at_E, mask=in_E, other=0)
    tiles_E = tl.where(slots_E >= 0, (counts_E + T - 1) // T, 0)
    ends_E = tl.cumsum(tiles_E, axis=0)
    # The expert whose tiles include ours; none for a tile beyond the last.
    mine_E = (tile >= ends_E - tiles_E) & (tile < ends_E)
    starts_E = tl.load(starts + at_E, mask=in_E, other=0)
    slot = tl.max(tl.where(mine_E, slots_E, -1), axis=0)
    first = tl.sum(tl.where(mine_E, starts_E + (tile - ends_E + tiles_E) * T, 0), axis=0)
    end = tl.sum(tl.where(mine_E, starts_E + counts_E, 0), axis=0)
    return slot.to(tl.int64), first, end


@triton.jit
def _gate_up(
    order, starts, slots, num_experts, values, scales, tensor_scales, slot_values, slot_scales,
    gate_values, gate_scales, up_values, up_scales, h, inner, hidden, width,
    TOP_K: tl.constexpr, FP4: tl.constexpr, E: tl.constexpr, FORMAT: tl.constexpr, EXACT: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`silu(gate @ h) * (up @ h)`, at the pairs' places in `order`, as the input of `_down`."""
    slot, first, end = _tile(starts, slots, num_experts, tl.program_id(0), E, T)
    if slot < 0:
        return
    at_T = first + tl.arange(0, T)
    in_T = at_T < end
    tokens_T = (tl.load(order + at_T, mask=in_T, other=0) // TOP_K).to(tl.int64)
    values += slot * slot_values
    scales += slot * slot_scales
    row = tl.program_id(1) * R
    gate_RT = product(
        values + gate_values, scales + gate_scales, row, width, hidden, h, tokens_T, in_T, FORMAT, EXACT, R, K, T
    )  # fmt: skip
    up_RT = product(
        values + up_values, scales + up_scales, row, width, hidden, h, tokens_T, in_T, FORMAT, EXACT, R, K, T
    )  # fmt: skip
    if FORMAT == NVFP4:
        gate_RT *= tl.load(tensor_scales + slot * 3)
        up_RT *= tl.load(tensor_scales + slot * 3 + 1)
    inner_RT = gate_RT / (1.0 + tl.exp(-gate_RT)) * up_RT
    at_R = row + tl.arange(0, R)
    mask = (at_R < width)[:, None] & in_T[None, :]
    store_input(inner + at_T.to(tl.int64)[None, :] * width, at_R[:, None], inner_RT, mask, FP4)


@triton.jit
def _down(
    order, starts, slots, num_experts, values, scales, tensor_scales, slot_values, slot_scales,
    down_values, down_scales, inner, out, width, hidden,
    E: tl.constexpr, FORMAT: tl.constexpr, EXACT: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`down @ inner`, at the pairs' own places."""
    slot, first, end = _tile(starts, slots, num_experts, tl.program_id(0), E, T)
    if slot < 0:
        return
    at_T = first + tl.arange(0, T)
    in_T = at_T < end
    row = tl.program_id(1) * R
    values += slot * slot_values + down_values
    scales += slot * slot_scales + down_scales
    out_RT = product(values, scales, row, hidden, width, inner, at_T.to(tl.int64), in_T, FORMAT, EXACT, R, K, T)
    if FORMAT == NVFP4:
        out_RT *= tl.load(tensor_scales + slot * 3 + 2)
    pairs_T = tl.load(order + at_T, mask=in_T, other=0).to(tl.int64)
    at_R = row + tl.arange(0, R)
    mask = (at_R < hidden)[:, None] & in_T[None, :]
    tl.store(out + pairs_T[None, :] * hidden + at_R[:, None], out_RT, mask=mask)


@triton.jit
def _sum(ids, slots, weights, pairs, x, hidden, top_k, D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at_D = tl.program_id(1) * D + tl.arange(0, D)
    mask = at_D < hidden
    sum_D = tl.zeros((D,), dtype=tl.float32)
    for k in range(top_k):
        pair = token * top_k + k
        expert = tl.load(ids + pair)
        if tl.load(slots + expert, mask=expert >= 0, other=-1) >= 0:
            sum_D += tl.load(weights + pair) * tl.load(pairs + pair * hidden + at_D, mask=mask, other=0.0)
    x += token * hidden
    tl.store(x + at_D, tl.load(x + at_D, mask=mask, other=0.0) + sum_D, mask=mask)
