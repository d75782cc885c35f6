"""What a set of kernels offers: the operations of a decoder, each prepared once with its weights, then called.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token, H heads, G key-value heads, d head size,
S sequences, N cache blocks, B tokens per block, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import ModelShape, WeightFormat
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class PagedStep:
    """Where the tokens of one step live in the paged cache (Kwon et al., 2023), and how their heads are rotated."""

    slots_T: NDArray[np.int64]
    """Each token's own slot, block * B + offset."""
    spans_S3: NDArray[np.int32]
    """Of each sequence: its first row among the T tokens, its number of tokens, the position of the first."""
    tables_SN: NDArray[np.int32]
    """Of each sequence: its cache blocks in order of position, up to this step's last token; the rest is padding."""
    cosines_Td: NDArray[np.float32]
    """[T, d/2], of each token's rotary angles."""
    sines_Td: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """A layer's attention; vectors are float32."""

    norm_D: Tensor
    q: PackedMatrix
    k: PackedMatrix
    v: PackedMatrix
    o: PackedMatrix
    q_norm: Tensor | None
    """[d] or [H * d], by `ModelShape.qk_norm`."""
    k_norm: Tensor | None
    """[d] or [G * d]."""
    num_heads: int
    num_kv_heads: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class RouterWeights:
    """A layer's way to its experts."""

    norm_D: Tensor
    router: PackedMatrix | None
    """[E, D]; None with one expert."""
    top_k: int
    normalize: bool
    """Whether the chosen probabilities are scaled to sum to one."""
    eps: float


class DenseWeights(Protocol):
    """A model's dense tensors by our names; a store is one."""

    def dense_matrix(self, name: str) -> PackedMatrix: ...

    def dense_vector(self, name: str) -> Tensor: ...


class PagedCache(Protocol):
    """Keys [N, G, d, B] and values [N, G, B, d] of every layer, float32 or bfloat16; 16 divides B."""

    @property
    def keys(self) -> Sequence[Tensor]: ...

    @property
    def values(self) -> Sequence[Tensor]: ...


class Embedding(Protocol):
    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """Rows [T, D] float32 of the embedding for int32 ids."""
        ...


class Attention(Protocol):
    def __call__(self, x_TD: Tensor, keys_NGdB: Tensor, values_NGBd: Tensor, step: PagedStep) -> None:
        """Add the attention block's output to x: norm, project, norm and rotate heads, store this step's keys and
        values, attend causally, project.

        Args:
            x_TD: float32, contiguous; changed in place.
            keys_NGdB: the layer's cache, float32 or bfloat16; 16 divides B.
            values_NGBd: the same.
        """
        ...


class Router(Protocol):
    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed input [T, D] float32, the likeliest experts [T, K] int32 (ties to the lower id) and their
        weights [T, K] float32."""
        ...


class Experts(Protocol):
    """The experts of one layer. Those whose weights can be computed with are placed.

    A call computes all at once. Where weights are still on their way, `begin`, `compute` for parts of the experts as
    they come, and `finish` add up to the same bits; other operations may run in between.

    An id of -1 stands for no expert: the pair adds nothing, and the results of others are the same bits.
    """

    def place(self, expert: int, weights: ExpertWeights) -> None:
        """Compute this expert with these weights from now on; their memory must stay as it is until `remove`."""
        ...

    def remove(self, expert: int) -> None:
        """Forget an expert's weights."""
        ...

    def __call__(self, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, x_TD: Tensor) -> None:
        """Add `sum over k of weights[t, k] * expert[ids[t, k]](h[t])` to x in place; ids int32, the rest float32."""
        ...

    def begin(self, h_TD: Tensor, ids_TK: Tensor) -> None:
        """Take the inputs, and forget what a step before may have left unfinished."""
        ...

    def compute(self, experts: Sequence[int]) -> None:
        """Begin to compute these for all tokens that go to them; each expert at most once. It may go on while the
        caller does something else, until the next operation of these kernels; their memory must stay so long."""
        ...

    def finish(self, weights_TK: Tensor, x_TD: Tensor) -> None:
        """Add the weighted sum of what was computed to x in place."""
        ...


class Norm(Protocol):
    def __call__(self, x_TD: Tensor) -> Tensor:
        """Rows [T, D] float32 scaled to a root mean square of 1, times a weight for each column (Zhang and Sennrich,
        2019)."""
        ...


class Head(Protocol):
    def __call__(self, x_SD: Tensor) -> Tensor:
        """Scores of the next token [S, V] float32 from the last layer's output."""
        ...


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How a token is drawn from each of S rows of logits."""

    temperatures_S: NDArray[np.float32]
    """0 takes the likeliest, of equal ones the first."""
    top_k_S: NDArray[np.int32]
    """Only the k likeliest; 0: all."""
    top_p_S: NDArray[np.float32]
    """Then the likeliest that together hold this share (Holtzman et al., 2020); 1: all."""
    min_p_S: NDArray[np.float32]
    """Then those at least this share of the likeliest; 0: all."""
    uniforms_S: NDArray[np.float64]
    """In [0, 1): the share of what is left, in order of id, at which the token lies."""


class Kernels(Protocol):
    """One set of kernels."""

    @property
    def name(self) -> str:
        """For the log."""
        ...

    @property
    def level(self) -> str:
        """Instructions they are made of: a level of the C++ kernels, or `reference`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where hidden states, logits and the cache are; token ids and `PagedStep` come from the host."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether weights are read where they lie at every call, so that their bytes may change between calls."""
        ...

    def memory_bytes(self, stored_bytes: int, num_weights: int) -> int:
        """What a model takes in memory, of this many bytes and weights in its store."""
        ...

    def embedding(self, weights: PackedMatrix) -> Embedding: ...

    def attention(self, weights: AttentionWeights) -> Attention: ...

    def router(self, weights: RouterWeights) -> Router: ...

    def experts(self, num_experts: int, hidden_size: int, expert_size: int, weights: WeightFormat) -> Experts:
        """A layer's experts, none placed yet."""
        ...

    def norm(self, norm_D: Tensor, eps: float) -> Norm: ...

    def head(self, norm_D: Tensor, weights: PackedMatrix, eps: float) -> Head: ...

    def draw(self, logits_SV: Tensor, draws: Draws) -> list[int]:
        """A token of each row of float32 logits; -1 where one of them is not a finite number."""
        ...


def placed_experts(kernels: Kernels, weights: Sequence[ExpertWeights]) -> Experts:
    """A layer all of whose experts are in memory, in order of id."""
    gate = weights[0].gate
    experts = kernels.experts(len(weights), gate.columns, gate.rows, gate.format)
    for expert, matrices in enumerate(weights):
        experts.place(expert, matrices)
    return experts


def rotary_frequencies(shape: ModelShape) -> NDArray[np.float32]:
    """Angular frequencies [d/2], float32 (Su et al., 2021), stretched as Llama 3.1 does where the shape says."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies.numpy()
    wavelengths = 2 * math.pi / frequencies
    # 1 for wavelengths short against the original context (kept), 0 for long ones (divided by the factor).
    kept = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return (frequencies * kept + frequencies / scaling.factor * (1 - kept)).numpy()
