"""Speed of whole steps of the native engine, against the bytes that they must read.

Steps go through the engine's executor, so that the cost of Python is inside, on plans that are made here: no
scheduler, no speculation, random token ids in place of sampled ones. The experts that a model chooses on its own
output repeat themselves far more than on other text.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.bench.grammars import GrammarStreams, grammar_ms
from localmoe.bench.machine import READ_BYTES, cpu_name, read_bandwidth_bytes_s
from localmoe.bench.shapes import BenchModel
from localmoe.core.errors import ChecksumError, ConfigError, EngineFaultError, EngineStartError
from localmoe.core.events import TierState
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.core.plans import BatchPlan, SequenceStep
from localmoe.core.protocols import ExpertExecutor, Routed, TokenMatcher
from localmoe.core.request import SamplingParams
from localmoe.engine.config import EngineConfig, kv_bytes_per_token, num_weights
from localmoe.engine.executor import Executor, forward_with
from localmoe.engine.kv_cache import KVCache
from localmoe.engine.load import load_decoder
from localmoe.formats.packed import packed_bytes
from localmoe.formats.store import Store
from localmoe.formats.store_layout import dense_format, dense_shapes, plan_header
from localmoe.kernels.base import Kernels
from localmoe.models.decoder import Decoder

PREFILLS = 3
DECODE_STEPS = 48
WARM_STEPS = 2
"""Steps at the start of each decode that are not counted."""
_FEWEST_STEPS = 8
_DECODE_LIMIT_S = 15.0
"""A decode that takes longer than this ends early, so that the whole run takes about two minutes at most."""
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to measure."""

    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of sequences to decode at once; contains 1."""
    prompt_tokens: int = 512
    """Computed in one step."""
    bandwidth_bytes: int = READ_BYTES
    """How much is read to measure the machine."""


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; figures of decoding are by the number of streams."""

    machine: str
    level: str
    threads: int
    shape: str
    format: WeightFormat
    read_bandwidth_gb_s: float
    """Best of reads before and after the steps."""
    prompt_tokens: int
    prefill_tok_s: float
    decode_tok_s: float
    """Of one stream."""
    aggregate_tok_s: dict[int, float]
    """Of all streams together."""
    overlap: float
    """Mean share of a token's experts that its stream's previous token used, too, in the same layer."""
    distinct_experts: dict[int, float]
    """Mean number of experts that a layer uses in a step."""
    bytes_per_token: float
    """What one stream's step must read and write; see `step_bytes`."""
    step_bytes: dict[int, float]
    read_gb_s: dict[int, float]
    """Bytes of a step by its mean time."""
    roof_fraction: dict[int, float]
    """That as a share of the machine's read bandwidth."""
    grammar_ms: dict[int, float]
    """What a step takes longer where each stream follows a JSON schema; empty for a shape without a tokenizer."""


class RecordingExperts:
    """Computes experts and remembers which."""

    def __init__(self, experts: ExpertExecutor[Tensor]) -> None:
        self.watched = experts
        self.needs_each_layer = False
        self._ids: list[Tensor] = []

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        self.watched.begin_step(is_prompt_T)

    def state(self) -> TierState | None:
        return self.watched.state()

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        self._ids.append(routed.ids_TK)
        self.watched(routed, x_TD)

    def replayed(self, ids_LTK: Tensor) -> None:
        self._ids += ids_LTK

    def take(self) -> NDArray[np.int32]:
        """Experts [layers, T, K] of the step since the last call."""
        ids_LTK: NDArray[np.int32] = torch.stack(self._ids).numpy(force=True)
        self._ids = []
        return ids_LTK


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One number of streams; means over the steps that count."""

    step_s: float
    overlap: float
    distinct_experts: float
    step_bytes: float


def check_memory(model: BenchModel, weights: WeightFormat, kernels: Kernels, available_bytes: int) -> None:
    """Refuse a model that does not fit, before anything is written. Raises EngineStartError."""
    stored_bytes = plan_header(model.shape, weights, "").file_bytes
    needed_bytes = kernels.memory_bytes(stored_bytes, num_weights(model.shape))
    if needed_bytes > available_bytes:
        raise EngineStartError(
            f"{model.name} in {weights} takes {needed_bytes / 1e9:.1f} GB of memory, {available_bytes / 1e9:.1f} GB "
            f"are available; choose another --shape or --format"
        )


def check_context(model: BenchModel, workload: Workload) -> None:
    """Raises ConfigError where a sequence of the workload does not fit the model's context."""
    if max(workload.prompt_tokens, DECODE_STEPS) > model.shape.max_context_tokens:
        raise ConfigError(
            f"--prompt-tokens is {workload.prompt_tokens}; decoding takes {DECODE_STEPS}, and the context of "
            f"{model.name} is {model.shape.max_context_tokens}"
        )


def measure_engine(
    model: BenchModel,
    store_path: Path,
    kernels: Kernels,
    num_threads: int,
    config: EngineConfig,
    workload: Workload,
    say: Callable[[str], None],
) -> EngineReport:
    """Measure a store.

    Args:
        num_threads: of the kernels, and to read memory with.
        config: as for serving, as far as single steps go.
        say: told what is being measured.

    Raises:
        ConfigError: the prompt does not fit the model's context.
        EngineStartError: there are no C++ kernels to measure the machine with.
        StoreError: the store is damaged.
    """
    check_context(model, workload)
    say("reading memory")
    before = read_bandwidth_bytes_s(num_threads, workload.bandwidth_bytes)
    say("reading and checking the store")
    decoder, weights = _load(store_path, kernels, num_threads)
    bench = StepBench(decoder, kernels, weights, config, workload)
    say(f"prefill of {workload.prompt_tokens} tokens")
    prefill_s = bench.prefill_s(workload.prompt_tokens)
    decoded = {}
    for num_streams in workload.streams:
        say(f"decode, streams: {num_streams}")
        decoded[num_streams] = bench.decode(num_streams)
    grammars_ms = {}
    if model.tokenizer_path is not None:
        for num_streams in workload.streams:
            say(f"decode by a grammar, streams: {num_streams}")
            grammars_ms[num_streams] = grammar_ms(bench, model.tokenizer_path, num_streams)
    del bench, decoder  # their memory is needed to read
    say("reading memory once more")
    # A shared machine changes its speed within minutes, and no step should beat the roof that it is held against.
    bandwidth = max(before, read_bandwidth_bytes_s(num_threads, workload.bandwidth_bytes))
    aggregate_tok_s = {n: n / d.step_s for n, d in decoded.items()}
    read_bytes_s = {n: d.step_bytes / d.step_s for n, d in decoded.items()}
    return EngineReport(
        machine=cpu_name(),
        level=kernels.level,
        threads=num_threads,
        shape=model.name,
        format=weights,
        read_bandwidth_gb_s=bandwidth / 1e9,
        prompt_tokens=workload.prompt_tokens,
        prefill_tok_s=workload.prompt_tokens / prefill_s,
        decode_tok_s=aggregate_tok_s[1],
        aggregate_tok_s=aggregate_tok_s,
        overlap=decoded[1].overlap,
        distinct_experts={n: d.distinct_experts for n, d in decoded.items()},
        bytes_per_token=decoded[1].step_bytes,
        step_bytes={n: d.step_bytes for n, d in decoded.items()},
        read_gb_s={n: rate / 1e9 for n, rate in read_bytes_s.items()},
        roof_fraction={n: rate / bandwidth for n, rate in read_bytes_s.items()},
        grammar_ms=grammars_ms,
    )


def _load(store_path: Path, kernels: Kernels, num_threads: int) -> tuple[Decoder, WeightFormat]:
    with Store.open(store_path) as store:
        try:
            store.check(num_threads)
        except ChecksumError as error:
            raise ChecksumError(f"{error}; delete the file, and it is made anew") from error
        return load_decoder(store, kernels), store.weights


def step_bytes(
    shape: ModelShape, weights: WeightFormat, num_experts: int, num_streams: int, kv_tokens: int, kv_dtype: str
) -> int:
    """Bytes of a decode step, each counted once: experts and dense matrices as stored, norms, a row of the
    embedding for each stream, and keys and values.

    Args:
        num_experts: that the step uses, over all layers.
        kv_tokens: whose keys and values the step reads or writes, over all streams.
    """
    F, D = shape.expert_size, shape.hidden_size
    expert_bytes = sum(sum(packed_bytes(weights, *size)) for size in ((F, D), (F, D), (D, F)))
    total_bytes = num_experts * expert_bytes + kv_tokens * kv_bytes_per_token(shape, kv_dtype)
    for name, dimensions in dense_shapes(shape).items():
        if len(dimensions) == 1:
            total_bytes += 4 * dimensions[0]
            continue
        matrix_bytes = sum(packed_bytes(dense_format(name, dimensions, weights), *dimensions))
        if name == "embed":
            total_bytes += num_streams * matrix_bytes // dimensions[0]
        if name != "embed" or shape.tie_embeddings:
            total_bytes += matrix_bytes
    return total_bytes


def cache_blocks(workload: Workload, block_tokens: int) -> int:
    """Of the cache that a workload needs."""
    return max(
        -(-workload.prompt_tokens // block_tokens), max(workload.streams) * -(-DECODE_STEPS // block_tokens)
    )


class StepBench:
    """A decoder and a cache for the largest of the measurements, which each begin with an empty context."""

    def __init__(
        self, decoder: Decoder, kernels: Kernels, weights: WeightFormat, config: EngineConfig, workload: Workload
    ) -> None:
        self._shape = decoder.shape
        self.vocab_size, self.device = decoder.shape.vocab_size, kernels.device
        self._weights = weights
        self._block_tokens = config.block_tokens
        self._kv_dtype = "f32" if config.kv_cache_dtype == "f32" else "bf16"
        self._recorder = RecordingExperts(decoder.experts)
        decoder.experts = self._recorder
        self._num_blocks = num_blocks = cache_blocks(workload, config.block_tokens)
        dtype = torch.float32 if self._kv_dtype == "f32" else torch.bfloat16
        cache = KVCache(decoder.shape, num_blocks, config.block_tokens, dtype, kernels.device)
        forward = forward_with(decoder, cache, self._recorder, max_num_seqs=max(workload.streams))
        self._executor = Executor(decoder, cache, kernels, forward)
        self._rng = np.random.default_rng(0)

    def prefill_s(self, num_tokens: int) -> float:
        """Median time of a prompt alone, after one to warm up."""
        times_s = [self.step(1, num_tokens, 0)[0] for _ in range(1 + PREFILLS)]
        return statistics.median(times_s[1:])

    def decode(self, num_streams: int) -> Decoded:
        """Streams that grow by a token a step."""
        times_s: list[float] = []
        steps: list[NDArray[np.int32]] = []
        for position in range(DECODE_STEPS):
            if len(times_s) >= WARM_STEPS + _FEWEST_STEPS and sum(times_s) > _DECODE_LIMIT_S:
                break
            elapsed_s, ids_LTK = self.step(num_streams, 1, position)
            times_s.append(elapsed_s)
            steps.append(ids_LTK)
        ids_PLTK = np.stack(steps)
        repeated = (ids_PLTK[1:, ..., None] == ids_PLTK[:-1, ..., None, :]).any(-1)
        distinct_PL = [[len(np.unique(layer)) for layer in step] for step in ids_PLTK[WARM_STEPS:]]
        bytes_P = [
            step_bytes(
                self._shape,
                self._weights,
                sum(layers),
                num_streams,
                num_streams * (WARM_STEPS + index + 1),
                self._kv_dtype,
            )
            for index, layers in enumerate(distinct_PL)
        ]
        return Decoded(
            step_s=statistics.mean(times_s[WARM_STEPS:]),
            overlap=float(repeated.mean()),
            distinct_experts=float(np.mean(distinct_PL)),
            step_bytes=statistics.mean(bytes_P),
        )

    def step(
        self, num_streams: int, num_tokens: int, start: int, grammars: GrammarStreams | None = None
    ) -> tuple[float, NDArray[np.int32]]:
        """Seconds of a step in which each stream computes so many random tokens, and its experts [layers, T, K].

        Args:
            grammars: that what is drawn follows.
        """
        blocks_per_stream = self._num_blocks // num_streams
        ids_ST = self._rng.integers(0, self._shape.vocab_size, (num_streams, num_tokens)).tolist()
        matchers: Sequence[TokenMatcher | None] = grammars.matchers if grammars else [None] * num_streams
        started_s = time.perf_counter()
        sequences = [
            sequence_step(
                ids_T, start, range(stream * blocks_per_stream, (stream + 1) * blocks_per_stream), matcher
            )
            for stream, (ids_T, matcher) in enumerate(zip(ids_ST, matchers, strict=True))
        ]
        plan = BatchPlan(sequences=tuple(sequences))
        results = self._executor.execute(plan, grammars.begin_masks(plan) if grammars else {})
        if grammars is not None:
            grammars.take(plan, results)
        elapsed_s = time.perf_counter() - started_s
        for result in results.values():
            if result.fault:
                raise EngineFaultError(f"the model cannot compute: {result.fault}")
        return elapsed_s, self._recorder.take()


def sequence_step(
    token_ids: Sequence[int], start: int, blocks: range, matcher: TokenMatcher | None = None
) -> SequenceStep:
    """The next tokens of a sequence that lies in these blocks of the cache."""
    return SequenceStep(
        sequence_id=blocks.start,
        token_ids=tuple(token_ids),
        start=start,
        block_table=tuple(blocks),
        samples=True,
        sampling=_GREEDY,
        seed=0,
        history=([], []),
        scores_prompt=False,
        matcher=matcher,
    )
