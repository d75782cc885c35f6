"""How fast a model will be, told from its shape, its share of memory and what this machine was measured to do.

A step goes through its layers one by one. A layer computes, and where not all experts are in memory it reads those
that it misses meanwhile; whichever takes longer is what the layer takes:

    T = max(compute + misses · t_miss, misses · S / B_disk) + misses · t_wait

With reading ahead, that holds for all of a layer but the first of a step; without, the disk has nothing to do while
attention computes. t_wait is what this leaves unexplained of layers that were measured. Experts are taken to be
chosen evenly, each by every token as likely as any other. Real text repeats its experts, so more of them are found in
memory than is said here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from localmoe.core.model import ModelShape, WeightFormat
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.layer_stream import streamed_entries
from localmoe.formats.store_layout import DenseEntry, StoreHeader, blob_layout, plan_header

_LOOKAHEAD_ACCURACY = 0.85
"""Share of what is read ahead that is then used; 0.80 to 0.89 for the next layer of published models."""


@dataclass(frozen=True, kw_only=True)
class PlannedStore:
    """Sizes of a store that need not exist (`engine.budget.StoreSizes`)."""

    header: StoreHeader

    @classmethod
    def of(cls, shape: ModelShape, weights: WeightFormat) -> "PlannedStore":
        return cls(header=plan_header(shape, weights, ""))

    @property
    def shape(self) -> ModelShape:
        return self.header.shape

    @property
    def weights(self) -> WeightFormat:
        return self.header.weights

    @property
    def blob_bytes(self) -> int:
        return blob_layout(self.shape, self.weights).num_bytes

    @property
    def total_bytes(self) -> int:
        return self.header.file_bytes

    @property
    def dense_entries(self) -> Sequence[DenseEntry]:
        return self.header.dense

    @property
    def layer_dense_bytes(self) -> float:
        """Attention, router and norms of one layer."""
        layers = sum(entry.num_bytes for entry in self.dense_entries if entry.name.startswith("layers."))
        return layers / self.shape.num_layers

    @property
    def head_bytes(self) -> int:
        """What makes logits; of the embedding, a token reads one row, too small to count."""
        head = "embed" if self.shape.tie_embeddings else "head"
        return sum(entry.num_bytes for entry in self.dense_entries if entry.name == head)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """A step of so many tokens, its weights in memory, measured on a few layers of the model's own sizes."""

    num_tokens: int
    layer_s: float
    """Of one layer: attention and experts, with the cost of calling them."""
    rest_s: float
    """Of everything that a step does once: embedding, head, drawing tokens."""
    miss_s: float
    """Of the processor's time, for each expert that is read: taking a slot, asking the disk, the checksum."""
    wait_s: float
    """For each expert that is read, beyond what the rest explains: it was not expected, or came late."""


@dataclass(frozen=True, kw_only=True)
class MachineSpeeds:
    """What was measured of this machine."""

    memory_bytes_s: float
    """Read by all threads, and nothing else done."""
    disk_bytes_s: float
    """Random direct reads of one expert's size."""
    decode: StepTimes
    """One token of each stream."""
    prompt: StepTimes
    """One chunk of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where a model's weights are, as far as a step depends on it."""

    hit_rate: float
    """Share of the experts that are used and are in memory."""
    streamed_bytes: int
    """Of attention, read for each step."""
    prefetch_layers: int


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What to expect. Sizes of memory add up to the budget and the reserve, but for less than one expert."""

    model: str
    format: WeightFormat
    streams: int
    store_bytes: int
    """On disk."""
    budget_bytes: int
    """The reserve taken off."""
    reserve_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    dense_bytes: int
    streamed_layers: int
    """Layers whose attention does not fit in memory, and is read for each step."""
    experts_bytes: int
    whole_bytes: int
    """Memory for all of it and every expert."""
    num_slots: int
    """Experts that fit in memory."""
    num_experts: int
    """Of all layers."""
    hit_rate: float
    """Uses of an expert that find it in memory, if all are chosen evenly."""
    ram_bytes_per_token: float
    """Weights that the processor reads for a decoded token."""
    disk_bytes_per_token: float
    """Weights that are not in memory when a decoded token needs them."""
    decode_tok_s: float
    """All streams together."""
    decode_limit: Literal["compute", "disk"]
    """What a layer of a decode step takes longer for."""
    prompt_tokens: int
    prefill_tok_s: float
    prefill_limit: Literal["compute", "disk"]
    memory_gb_s: float
    """Measured, as are the following."""
    decode_gb_s: float
    """At which a layer of a decode step reads its weights where all are in memory."""
    prefill_gop_s: float
    """Multiplications and additions of a layer of a prompt."""
    disk_gb_s: float
    disk_gb_s_to_keep_up: float
    """At which the disk would no longer be what decoding waits for; 0 where all experts are in memory."""


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What a layer of a step does, as predicted."""

    experts: float
    """Distinct ones that are used."""
    read_bytes: float
    """Of what is used and is not in memory."""
    compute_s: float
    read_s: float


def estimate(
    name: str,
    store: PlannedStore,
    plan: MemoryPlan,
    speeds: MachineSpeeds,
    *,
    prefetch_layers: int,
    reserve_bytes: int,
) -> Estimate:
    """Predict a model's memory and speed.

    Args:
        name: for the report.
        plan: of the store, by `engine.budget.plan_memory`.
        speeds: measured with the numbers of tokens that are to be predicted.
    """
    shape, decode, prompt = store.shape, speeds.decode, speeds.prompt
    num_experts = shape.num_layers * shape.num_experts
    num_slots = num_experts if plan.num_slots is None else plan.num_slots
    hit_rate = num_slots / num_experts
    one_layer_bytes = sum(entry.num_bytes for entry in streamed_entries(store.dense_entries, 0))
    spread = Spread(
        hit_rate=hit_rate,
        streamed_bytes=len(plan.streamed_layers) * one_layer_bytes,
        prefetch_layers=prefetch_layers,
    )
    decode_s, layer = predict_step(store, decode, speeds.disk_bytes_s, spread)
    prompt_s, prompt_layer = predict_step(store, prompt, speeds.disk_bytes_s, spread)
    layer_bytes = store.layer_dense_bytes + layer.experts * store.blob_bytes
    return Estimate(
        model=name,
        format=store.weights,
        streams=decode.num_tokens,
        store_bytes=store.total_bytes,
        budget_bytes=plan.budget_bytes,
        reserve_bytes=reserve_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        workspace_bytes=plan.workspace_bytes,
        dense_bytes=plan.dense_bytes,
        streamed_layers=len(plan.streamed_layers),
        experts_bytes=num_slots * plan.slot_bytes,
        whole_bytes=reserve_bytes + plan.kv_cache_bytes + plan.workspace_bytes + store.total_bytes,
        num_slots=num_slots,
        num_experts=num_experts,
        hit_rate=hit_rate,
        ram_bytes_per_token=(shape.num_layers * layer_bytes + store.head_bytes) / decode.num_tokens,
        disk_bytes_per_token=shape.num_layers * layer.read_bytes / decode.num_tokens,
        decode_tok_s=decode.num_tokens / decode_s,
        decode_limit=_limit(layer),
        prompt_tokens=prompt.num_tokens,
        prefill_tok_s=prompt.num_tokens / prompt_s,
        prefill_limit=_limit(prompt_layer),
        memory_gb_s=speeds.memory_bytes_s / 1e9,
        decode_gb_s=layer_bytes / decode.layer_s / 1e9,
        prefill_gop_s=2 * prompt.num_tokens * _layer_products(shape) / prompt.layer_s / 1e9,
        disk_gb_s=speeds.disk_bytes_s / 1e9,
        disk_gb_s_to_keep_up=layer.read_bytes / layer.compute_s / 1e9,
    )


def distinct_experts(shape: ModelShape, num_tokens: int) -> float:
    """Of a layer, that so many tokens use, on average, if each chooses evenly and for itself."""
    return shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** num_tokens)


def predict_step(
    store: PlannedStore, times: StepTimes, disk_bytes_s: float, spread: Spread
) -> tuple[float, LayerWork]:
    """Seconds of a step, and what each of its layers does."""
    shape = store.shape
    experts = distinct_experts(shape, times.num_tokens)
    # What is streamed is spread over the layers, and costs as much for a byte as experts do.
    misses = experts * (1 - spread.hit_rate) + spread.streamed_bytes / shape.num_layers / store.blob_bytes
    one_read_s = store.blob_bytes / disk_bytes_s
    compute_s = times.layer_s + misses * times.miss_s
    read_s = misses * one_read_s
    layer = LayerWork(experts=experts, read_bytes=misses * store.blob_bytes, compute_s=compute_s, read_s=read_s)
    wait_s = misses * times.wait_s
    # Until a layer's experts are known, there are no reads of that layer to run beside.
    dense_s = times.layer_s * store.layer_dense_bytes / (store.layer_dense_bytes + experts * store.blob_bytes)
    alone_s = dense_s + max(compute_s - dense_s, read_s) + wait_s
    if not spread.prefetch_layers:
        return times.rest_s + shape.num_layers * alone_s, layer
    # While it computes, the disk reads ahead, and some of that in vain.
    wasted_s = (1 - _LOOKAHEAD_ACCURACY) * min(read_s, compute_s)
    following_s = max(compute_s, read_s + wasted_s) + wait_s
    return times.rest_s + alone_s + (shape.num_layers - 1) * following_s, layer


def _limit(layer: LayerWork) -> Literal["compute", "disk"]:
    return "disk" if layer.read_s > layer.compute_s else "compute"


def _layer_products(shape: ModelShape) -> int:
    """Weights of a layer that one token is multiplied with."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    return attention + 3 * shape.top_k * shape.hidden_size * shape.expert_size
