"""Speed of single CPU kernels on matrices of a model's sizes.

Weights rotate over a buffer of random bytes that is larger than any cache; a kernel never meets the same bytes twice
before all of them have passed. Scales are constant, so that all weights are numbers.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import msgspec
import numpy as np
import torch
from torch import Tensor

from localmoe.bench.engine import sequence_step
from localmoe.bench.machine import READ_BYTES, cpu_name, read_bandwidth_bytes_s
from localmoe.bench.weights import DENSE_SPREAD, EXPERT_SPREAD, constant_scales, set_exponents_
from localmoe.core.errors import EngineStartError
from localmoe.core.model import ModelShape, QkNorm, WeightFormat
from localmoe.engine.kv_cache import place
from localmoe.formats.packed import PackedMatrix, packed_bytes
from localmoe.formats.store import ExpertWeights
from localmoe.hardware.memory import available_memory_bytes
from localmoe.kernels.base import Attention, AttentionWeights, PagedStep, placed_experts, rotary_frequencies
from localmoe.kernels.cpu import CpuKernels

KERNELS = ("matrix", "moe", "head", "attention")
FORMATS = (WeightFormat.MXFP4, WeightFormat.NVFP4, WeightFormat.INT8, WeightFormat.BF16)
"""BF16 last: it turns the buffer into numbers of its own, which are still random bytes to the others."""
MATRIX_TOKENS = (1, 2, 4, 8, 16, 64, 512)
MOE_TOKENS = (1, 8, 512)
HEAD_TOKENS = (1, 8)
CONTEXT_TOKENS = (128, 1024, 4096)
PREFILL_TOKENS = 512
_FEW_TOKENS = 16
"""Up to here reading is what takes the time, so that bytes per second say something."""
_WARM_CALLS = 2
_FEWEST_CALLS = 5
_BLOCK_TOKENS = 16


class KernelTime(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel in one setting."""

    kernel: str
    """`matrix`: [hidden, hidden] times tokens; `moe`: the routed experts of a layer; `head`; `attention`: norm,
    projections and all, of one sequence."""
    format: WeightFormat
    """Of the weights; keys and values are BF16."""
    tokens: int
    context_tokens: int | None
    """With those computed; of attention only."""
    median_us: float
    gb_s: float | None
    """Bytes that must be read and written, each once; None above 16 tokens."""
    roof_fraction: float | None
    gflop_s: float
    """Two for each multiplication and addition."""


class KernelReport(msgspec.Struct, frozen=True, kw_only=True):
    machine: str
    level: str
    threads: int
    read_bandwidth_gb_s: float
    kernels: list[KernelTime]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A kernel ready to be timed."""

    kernel: str
    format: WeightFormat
    tokens: int
    context_tokens: int | None = None
    num_bytes: float
    flop: float
    calls: Iterator[Callable[[], object]]
    """Without end; each works on the next weights."""


def measure_kernels(
    shape: ModelShape,
    kernels: CpuKernels,
    num_threads: int,
    say: Callable[[str], None],
    *,
    only: Collection[str] = KERNELS,
    rotation_bytes: int = READ_BYTES,
    limit_s: float = 0.5,
) -> KernelReport:
    """Time kernels.

    Args:
        shape: says the sizes.
        num_threads: of the kernels, and to read memory with.
        only: of `KERNELS`.
        rotation_bytes: least that weights rotate over.
        limit_s: of each setting, once it has run a few times.

    Raises:
        EngineStartError: there is not the memory.
    """
    # A layer more than that, so that whole layers make up that much.
    buffer_bytes = rotation_bytes + 3 * shape.num_experts * shape.expert_size * shape.hidden_size * 2
    needed_bytes = buffer_bytes + buffer_bytes // 4  # scales and results, roughly
    if needed_bytes > (available_bytes := available_memory_bytes()):
        raise EngineStartError(
            f"measuring takes {needed_bytes / 1e9:.1f} GB of memory, {available_bytes / 1e9:.1f} GB are available; "
            f"end what takes it"
        )
    say("reading memory")
    bandwidth = read_bandwidth_bytes_s(num_threads, rotation_bytes)
    say("drawing weights")
    buffer = _random_bytes(buffer_bytes)
    times: list[KernelTime] = []
    for weights in FORMATS:
        if weights is WeightFormat.BF16:
            set_exponents_(buffer, EXPERT_SPREAD)
        for kernel, works in (("matrix", _matrix_works), ("moe", _moe_works)):
            if kernel in only:
                say(f"{kernel}, {weights}")
                times += [_measure(work, bandwidth, limit_s) for work in works(shape, kernels, weights, buffer)]
    for kernel, dense_works in (("head", _head_works), ("attention", _attention_works)):
        if kernel in only:
            say(kernel)
            times += [_measure(work, bandwidth, limit_s) for work in dense_works(shape, kernels, buffer)]
    return KernelReport(
        machine=cpu_name(),
        level=kernels.level,
        threads=num_threads,
        read_bandwidth_gb_s=bandwidth / 1e9,
        kernels=times,
    )


def _measure(work: Work, bandwidth: float, limit_s: float) -> KernelTime:
    times_s: list[float] = []
    while len(times_s) < _WARM_CALLS + _FEWEST_CALLS or sum(times_s) < limit_s:
        call = next(work.calls)
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    median_s = statistics.median(times_s[_WARM_CALLS:])
    bytes_s = work.num_bytes / median_s if work.tokens <= _FEW_TOKENS else None
    return KernelTime(
        kernel=work.kernel,
        format=work.format,
        tokens=work.tokens,
        context_tokens=work.context_tokens,
        median_us=median_s * 1e6,
        gb_s=None if bytes_s is None else bytes_s / 1e9,
        roof_fraction=None if bytes_s is None else bytes_s / bandwidth,
        gflop_s=work.flop / median_s / 1e9,
    )


class _Cutter:
    """Cuts matrices of one format out of a buffer, one behind the other."""

    def __init__(self, buffer: Tensor, weights: WeightFormat, spread: float) -> None:
        self._buffer = buffer
        self._weights = weights
        self._spread = spread
        self._start = 0

    def fill(self, *sizes: tuple[int, int]) -> Iterator[list[PackedMatrix]]:
        """Groups of matrices of these sizes, as many groups as there is room for."""
        group_bytes = sum(packed_bytes(self._weights, *size)[0] for size in sizes)
        for _ in range(len(self._buffer) // group_bytes):
            yield [self._matrix(*size) for size in sizes]

    def _matrix(self, rows: int, columns: int) -> PackedMatrix:
        values_bytes, scales_bytes = packed_bytes(self._weights, rows, columns)
        values = self._buffer[self._start : self._start + values_bytes]
        self._start += values_bytes
        # Each matrix has its own scales: they are read, too.
        scales, tensor_scale = constant_scales(self._weights, self._spread, scales_bytes)
        return PackedMatrix(
            format=self._weights,
            rows=rows,
            columns=columns,
            values=values,
            scales=scales,
            tensor_scale=tensor_scale,
        )


def _matrix_works(shape: ModelShape, kernels: CpuKernels, weights: WeightFormat, buffer: Tensor) -> Iterator[Work]:
    D = shape.hidden_size
    matrices = [kernels.linear(matrix) for (matrix,) in _Cutter(buffer, weights, EXPERT_SPREAD).fill((D, D))]
    for tokens in MATRIX_TOKENS:
        x_TD = _normal(tokens, D)
        yield Work(
            kernel="matrix",
            format=weights,
            tokens=tokens,
            num_bytes=sum(packed_bytes(weights, D, D)),
            flop=2 * tokens * D * D,
            calls=cycle([partial(matrix, x_TD) for matrix in matrices]),
        )


def _moe_works(shape: ModelShape, kernels: CpuKernels, weights: WeightFormat, buffer: Tensor) -> Iterator[Work]:
    F, D, E, K = shape.expert_size, shape.hidden_size, shape.num_experts, shape.top_k
    sizes = [(F, D), (F, D), (D, F)] * E
    layers = [
        placed_experts(
            kernels,
            [
                ExpertWeights(gate=gate, up=up, down=down)
                for gate, up, down in zip(group[::3], group[1::3], group[2::3], strict=True)
            ],
        )
        for group in _Cutter(buffer, weights, EXPERT_SPREAD).fill(*sizes)
    ]
    expert_bytes = sum(sum(packed_bytes(weights, *size)) for size in sizes[:3])
    rng = np.random.default_rng(0)
    for tokens in MOE_TOKENS:
        drawn_TK = torch.from_numpy(rng.permuted(np.tile(np.arange(E), (tokens, 1)), axis=1)[:, :K])
        # Few tokens use few experts: each round over the layers takes others, as many of them.
        shifted = [((drawn_TK + shift) % E).int().contiguous() for shift in range(0, E, K)]
        h_TD, x_TD = _normal(tokens, D), _normal(tokens, D)
        weights_TK = torch.full((tokens, K), 1 / K)
        yield Work(
            kernel="moe",
            format=weights,
            tokens=tokens,
            num_bytes=len(np.unique(drawn_TK)) * expert_bytes,
            flop=6 * tokens * K * F * D,
            calls=cycle(
                [partial(layer, h_TD, ids_TK, weights_TK, x_TD) for ids_TK in shifted for layer in layers]
            ),
        )


def _head_works(shape: ModelShape, kernels: CpuKernels, buffer: Tensor) -> Iterator[Work]:
    V, D = shape.vocab_size, shape.hidden_size
    cutter, norm_D = _Cutter(buffer, WeightFormat.INT8, DENSE_SPREAD), torch.ones(D)
    heads = [kernels.head(norm_D, matrix, shape.rms_norm_eps) for (matrix,) in cutter.fill((V, D))]
    for tokens in HEAD_TOKENS:
        x_SD = _normal(tokens, D)
        yield Work(
            kernel="head",
            format=WeightFormat.INT8,
            tokens=tokens,
            num_bytes=sum(packed_bytes(WeightFormat.INT8, V, D)),
            flop=2 * tokens * V * D,
            calls=cycle([partial(head, x_SD) for head in heads]),
        )


def _attention_works(shape: ModelShape, kernels: CpuKernels, buffer: Tensor) -> Iterator[Work]:
    """Weights in the first half of the buffer, which holds bfloat16 numbers, the cache in the second."""
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    half = len(buffer) // 2
    layers = _attention_layers(shape, kernels, buffer[:half])
    num_blocks = half // (4 * kv_size * _BLOCK_TOKENS)
    cache = buffer[half:].view(torch.bfloat16)[: 2 * num_blocks * kv_size * _BLOCK_TOKENS].view(2, num_blocks, -1)
    keys_NGdB = cache[0].view(num_blocks, shape.num_kv_heads, shape.head_dim, _BLOCK_TOKENS)
    values_NGBd = cache[1].view(num_blocks, shape.num_kv_heads, _BLOCK_TOKENS, shape.head_dim)
    weights_per_token = shape.hidden_size * (2 * q_size + 2 * kv_size)
    weights_bytes = sum(packed_bytes(WeightFormat.INT8, 2 * q_size + 2 * kv_size, shape.hidden_size))
    for tokens, context in (*((1, context) for context in CONTEXT_TOKENS), (PREFILL_TOKENS, PREFILL_TOKENS)):
        steps = _sequences(shape, tokens, context, num_blocks)
        x_TD = _normal(tokens, shape.hidden_size)
        calls = [
            partial(layer, x_TD, keys_NGdB, values_NGBd, step)
            for step, layer in zip(steps, cycle(layers), strict=False)
        ]
        seen = sum(range(context - tokens + 1, context + 1))
        yield Work(
            kernel="attention",
            format=WeightFormat.INT8,
            tokens=tokens,
            context_tokens=context,
            num_bytes=weights_bytes + 4 * kv_size * context,
            flop=2 * tokens * weights_per_token + 4 * q_size * seen,
            calls=cycle(calls),
        )


def _attention_layers(shape: ModelShape, kernels: CpuKernels, buffer: Tensor) -> list[Attention]:
    D, q_size, kv_size = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    q_norm, k_norm = {
        None: (None, None),
        QkNorm.HEAD: (torch.ones(shape.head_dim), torch.ones(shape.head_dim)),
        QkNorm.PROJECTION: (torch.ones(q_size), torch.ones(kv_size)),
    }[shape.qk_norm]
    cutter = _Cutter(buffer, WeightFormat.INT8, DENSE_SPREAD)
    return [
        kernels.attention(
            AttentionWeights(
                norm_D=torch.ones(D),
                q=q,
                k=k,
                v=v,
                o=o,
                q_norm=q_norm,
                k_norm=k_norm,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                eps=shape.rms_norm_eps,
            )
        )
        for q, k, v, o in cutter.fill((q_size, D), (kv_size, D), (kv_size, D), (D, q_size))
    ]


def _sequences(shape: ModelShape, tokens: int, context: int, num_blocks: int) -> list[PagedStep]:
    """The last tokens of as many sequences as the cache holds, a step for each."""
    width, frequencies = -(-context // _BLOCK_TOKENS), rotary_frequencies(shape)
    assert width <= num_blocks, "the buffer is larger than a context"
    sequences = [
        sequence_step((0,) * tokens, context - tokens, range(first, first + width))
        for first in range(0, num_blocks - width + 1, width)
    ]
    return [place([sequence], _BLOCK_TOKENS, frequencies) for sequence in sequences]


def _random_bytes(num_bytes: int) -> Tensor:
    """A few random bytes over and over: the same bytes at another place are as far away as others."""
    drawn = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
    return torch.from_numpy(np.resize(drawn, num_bytes))


def _normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
